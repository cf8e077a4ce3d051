# SPDX-License-Identifier: Apache-2.0
"""GRPO of several turns from random weights: a tiny byte-level Llama learns to find a number.

    python experiments/guess.py --output=DIR [--seeds=0,1,2 --steps=100]

A secret from 1 to 7; the model says a digit, hears "higher" or "lower", and may guess three times:
the environment is ``Guess`` below.  Three guesses that do not listen find 3 of 7 secrets (0.43) at
best; halving what is left finds them all.  The reward, 1 for the secret, is the environment's own.
There is no supervised stage: the first digits are lucky bytes.  Before and after training each
secret is played 64 times at temperature 1.
"""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Sequence

from absl import app, flags, logging

from align_jax import evaluate, losses
from align_jax.core.config import ConfigDict, defaults
from align_jax.core.options import DataOptions, RolloutOptions
from align_jax.data import datasets
from align_jax.evals.generation import generation
from align_jax.online import rewards
from align_jax.runs import loop
from align_jax.runs.weights import load_model

SECRETS, GUESSES, SAMPLES = 7, 3, 64
MODEL = dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    tie_word_embeddings=True,
)
# a guess is one byte; between two stand the end of a turn and a turn of the user
TURNS = dict(
    environment="guess:Guess", max_turns=GUESSES, max_turn_tokens=1, max_new_tokens=16, rows=1024
)


class Guess:
    """The environment of one episode; ``secret`` is a column of the data."""

    def __init__(self, secret: int) -> None:
        self.secret = secret

    def step(self, said: str) -> tuple[str, bool, float]:
        """Answer a guess: text, whether the game is over, reward."""
        if said == str(self.secret):
            return "", True, 1.0
        return ("h" if said < str(self.secret) else "l"), False, 0.0


def make_config(seed: int, steps: int, data: str) -> ConfigDict:
    """Return a run's config; ``steps`` counts rollouts."""
    config = defaults()
    config.seed, config.max_length = seed, 32
    config.batch_size, config.rollout.prompts = SECRETS, 4 * SECRETS
    config.total_steps = 4 * steps
    config.model.family, config.model.config = "llama", ConfigDict(MODEL)
    config.model.compute_dtype, config.model.remat = "float32", "none"
    config.reference.dtype = "float32"
    config.data.train, config.data.strings, config.data.eval_fraction = data, "messages", 0.0
    config.data.layout = "shared_prefix"
    config.objective = ConfigDict(losses.options("grpo", loss_type="dapo", entropy_coef=0.02))
    config.rollout.update(TURNS)
    config.rollout.responses_per_prompt = 16
    config.rewards = ConfigDict({"environment": 1.0})
    config.optimizer.learning_rate, config.optimizer.schedule = 2e-3, "linear"
    config.optimizer.b2, config.optimizer.warmup_steps = 0.99, 10
    config.checkpoint.every_steps = 0
    return config


def write_data(folder: pathlib.Path) -> str:
    """Write a row for each secret."""
    rows = [{"prompt": "?", "secret": n + 1} for n in range(SECRETS)]
    path = folder / "secrets.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def main(argv: Sequence[str]) -> None:
    """Run from the command line."""
    values = flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    folder = pathlib.Path(values.output)
    folder.mkdir(parents=True, exist_ok=True)
    data = write_data(folder)
    lines = ["| seed | found | guesses | rollouts | seconds |", "|---|---|---|---|---|"]
    for seed in map(int, values.seeds):
        began = time.monotonic()
        workdir = str(folder / f"guess_{seed}")
        config = make_config(seed, values.steps, data)
        loop.train(config, workdir)
        seconds = time.monotonic() - began
        policy = evaluate.run_policy(workdir)
        if not policy.name.endswith(f"@{config.total_steps}"):
            raise SystemExit(f"{workdir} was stopped early; the same command goes on")
        options = DataOptions(strings="messages")
        found = generation(
            policy,
            datasets.load(data, "prompts", options, chat=True),
            rewards.resolve({"environment": 1.0}, load_model=load_model),
            RolloutOptions(responses_per_prompt=SAMPLES, **TURNS),
            max_length=32,
            seed=1000,
        )
        guesses = found["completions/mean_length"]
        lines.append(
            f"| {seed} | {found['reward']:.3f} | {guesses:.2f} | {values.steps} | {seconds:.0f} |"
        )
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("output", None, "Folder of the runs.", required=True)
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds.")
    flags.DEFINE_integer("steps", 100, "Rollouts of each run.", 1)
    app.run(main)
