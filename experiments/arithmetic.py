# SPDX-License-Identifier: Apache-2.0
"""GRPO from random weights: a tiny byte-level Llama learns to add from the reward alone.

    python experiments/arithmetic.py --output=DIR [--seeds=0,1,2 --steps=200]

The 55 questions ``a+b=`` whose sum has one digit are asked, 32 samples of each; three of them are
held out of training (`config.data.eval_fraction`).  There is no supervised stage: the first right
answers are lucky bytes.  A completion earns 0.8 if its number is the sum and the rest if it is
nothing but the sum and then ends.  After training each question is sampled 64 times at temperature
1; the accuracy is the share of samples that are exactly the sum.
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

NEW_TOKENS = 2  # a digit and the end of the answer
SAMPLES = 64  # of each question, in the measurement
MODEL = dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    tie_word_embeddings=True,
)


def make_config(seed: int, steps: int, questions: str) -> ConfigDict:
    """Return a run's config; ``steps`` counts rollouts."""
    config = defaults()
    config.seed, config.max_length = seed, 64
    config.batch_size, config.rollout.prompts = 11, 55
    config.total_steps = steps * config.rollout.prompts // config.batch_size
    config.model.family, config.model.config = "llama", ConfigDict(MODEL)
    config.model.compute_dtype, config.model.remat = "float32", "none"
    config.reference.dtype = "float32"
    config.data.train, config.data.layout = questions, "shared_prefix"
    # the bytes alone
    config.data.chat_template = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
    config.objective = ConfigDict(losses.options("grpo", loss_type="dapo", entropy_coef=0.02))
    config.rollout.responses_per_prompt, config.rollout.max_new_tokens = 32, NEW_TOKENS
    config.rewards = ConfigDict({"numeric": 0.8, "exact": 0.2})
    config.optimizer.learning_rate, config.optimizer.schedule = 2e-3, "linear"
    config.optimizer.b2, config.optimizer.warmup_steps = 0.99, 10
    config.checkpoint.every_steps = 0
    return config


def write_questions(folder: pathlib.Path) -> str:
    """Write the questions with their answers."""
    path = folder / "questions.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) + "\n"
            for a in range(10)
            for b in range(10 - a)
        )
    )
    return str(path)


def main(argv: Sequence[str]) -> None:
    """Run from the command line."""
    values = flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    folder = pathlib.Path(values.output)
    folder.mkdir(parents=True, exist_ok=True)
    questions = write_questions(folder)
    lines = ["| seed | accuracy | rollouts | minutes |", "|---|---|---|---|"]
    for seed in map(int, values.seeds):
        began = time.monotonic()
        workdir = str(folder / f"grpo_{seed}")
        config = make_config(seed, values.steps, questions)
        loop.train(config, workdir)
        minutes = (time.monotonic() - began) / 60
        policy = evaluate.run_policy(workdir)
        if not policy.name.endswith(f"@{config.total_steps}"):
            raise SystemExit(f"{workdir} was stopped early; the same command goes on")
        examples = datasets.load(
            questions, "prompts", DataOptions(), chat=bool(policy.tokenizer.chat_template)
        )
        found = generation(
            policy,
            examples,
            rewards.resolve({"exact": 1.0}, load_model=load_model),
            RolloutOptions(responses_per_prompt=SAMPLES, max_new_tokens=NEW_TOKENS, rows=1600),
            max_length=64,
            seed=1000,
        )
        lines.append(f"| {seed} | {found['reward']:.4f} | {values.steps} | {minutes:.1f} |")
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("output", None, "Folder of the runs.", required=True)
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds.")
    flags.DEFINE_integer("steps", 200, "Rollouts of each run.", 1)
    app.run(main)
