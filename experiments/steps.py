# SPDX-License-Identifier: Apache-2.0
"""A reward for each step against one for the whole answer, which is hardly ever right at first.

    python experiments/steps.py --output=DIR [--seeds=0,1 --rollouts=80]

Asked "3:" the answer is the next four digits, a line each: 4, 5, 6, 7 (behind 9 comes 0).  The
policy begins as one that has learned the form alone: four lines, each with any digit, so that one
answer in 10,000 is right.  A process reward model learns, of such answers with their steps labeled,
whether a digit is the one before it plus 1.  Then GRPO learns from three rewards:

    outcome   1 for the whole answer, else 0
    steps     the process reward model's probability of each step, at the step's end
    least     the least of these probabilities, as one number an answer

After training each of the ten questions is sampled 64 times at temperature 1.
"""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Sequence

import numpy as np
from absl import app, flags, logging

from align_jax import evaluate, export, losses, train
from align_jax.core.config import ConfigDict, defaults
from align_jax.core.options import DataOptions, RolloutOptions
from align_jax.data import datasets
from align_jax.evals.generation import generation
from align_jax.online import rewards
from align_jax.runs.weights import load_model

DIGITS, NEW_TOKENS = 4, 8  # four digits, three line ends, the end of the answer
SAMPLES = 64  # of each question, in the measurement
MODEL = dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)


def answer(first: int) -> list[str]:
    """Return the right steps."""
    return [str((first + i + 1) % 10) for i in range(DIGITS)]


def write_data(folder: pathlib.Path) -> dict[str, str]:
    """Write the questions, answers of any digits, and answers whose steps are labeled."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[dict]] = {"form": [], "labeled": [], "held_out": []}
    for number in range(2304):
        first = int(rng.integers(10))
        told = [str(digit) for digit in rng.integers(0, 10, DIGITS)]
        rows["form"].append({"prompt": f"{first}:", "completion": "\n".join(told)})
        steps, labels, before = [], [], first
        for _ in range(DIGITS):  # half of the steps are right
            right = (before + 1) % 10
            before = right if rng.random() < 0.5 else int(rng.integers(10))
            steps.append(str(before))
            labels.append(before == right)
        row = {"prompt": f"{first}:", "completions": steps, "labels": labels}
        rows["labeled" if number < 2048 else "held_out"].append(row)
    rows["questions"] = [{"prompt": f"{n}:", "answer": "\n".join(answer(n))} for n in range(10)]
    found = {}
    for name, several in rows.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in several))
        found[name] = str(path)
    return found


def make_config(objective: str, data: str, seed: int, **options: float | str) -> ConfigDict:
    """Return what the runs have in common."""
    config = defaults()
    config.seed, config.max_length = seed, 16
    config.model.family, config.model.config = "llama", ConfigDict(MODEL)
    config.model.compute_dtype, config.model.remat = "float32", "none"
    config.reference.dtype = "float32"
    config.data.train, config.data.layout, config.data.eval_fraction = data, "plain", 0.0
    config.objective = ConfigDict(losses.options(objective, **options))
    config.optimizer.learning_rate, config.optimizer.schedule = 1e-3, "linear"
    config.optimizer.b2, config.optimizer.warmup_steps = 0.99, 10
    config.checkpoint.every_steps, config.log.every_steps = 0, 10
    return config


def offline(objective: str, data: str, held_out: str, steps: int, folder: pathlib.Path) -> str:
    """Train and export the policy's start or the process reward model; return the checkpoint."""
    config = make_config(objective, data, 0)
    config.batch_size, config.total_steps = 64, steps
    config.data.eval, config.eval.every_steps = held_out, steps
    train.train(config, str(folder / objective))
    export.export_run(str(folder / objective), str(folder / f"{objective}_hf"))
    return str(folder / f"{objective}_hf")


def online(start: str, questions: str, reward: dict, seed: int, rollouts: int) -> ConfigDict:
    """Return a run of GRPO."""
    config = make_config("grpo", questions, seed, loss_type="dapo")
    config.model.path, config.batch_size, config.total_steps = start, 10, rollouts
    config.rollout.responses_per_prompt, config.rollout.max_new_tokens = 32, NEW_TOKENS
    config.rewards = ConfigDict(reward)
    return config


def accuracy(workdir: str, questions: str) -> float:
    """Return the share of samples that are the whole right answer."""
    policy = evaluate.run_policy(workdir)
    examples = datasets.load(questions, "prompts", DataOptions(), chat=False)
    scored = rewards.resolve({"exact": 1.0}, load_model=load_model)
    options = RolloutOptions(responses_per_prompt=SAMPLES, max_new_tokens=NEW_TOKENS, rows=640)
    return generation(policy, examples, scored, options, max_length=16, seed=1000)["reward"]


def main(argv: Sequence[str]) -> None:
    """Run from the command line."""
    values = flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    folder = pathlib.Path(values.output)
    folder.mkdir(parents=True, exist_ok=True)
    data = write_data(folder)
    start = offline("sft", data["form"], "", 150, folder)
    model = offline("reward_process", data["labeled"], data["held_out"], 100, folder)
    last = (folder / "reward_process" / "metrics.jsonl").read_text().splitlines()
    held = [row for row in map(json.loads, last) if "eval/accuracy" in row]
    print(f"the process reward model is right about {held[-1]['eval/accuracy']:.3f} of new steps")
    print(f"the start is right in {accuracy(str(folder / 'sft'), data['questions']):.4f}")
    kinds = {
        "outcome": {"exact": 1.0},
        "steps": {"process": {"path": model}},
        "least": {"process": {"path": model, "aggregate": "min"}},
    }
    lines = ["| reward | seed | right answers | seconds |", "|---|---|---|---|"]
    for seed in map(int, values.seeds):
        for name, reward in kinds.items():
            began, workdir = time.monotonic(), str(folder / f"{name}_{seed}")
            train.train(online(start, data["questions"], reward, seed, values.rollouts), workdir)
            seconds = time.monotonic() - began
            right = accuracy(workdir, data["questions"])
            lines.append(f"| {name} | {seed} | {right:.3f} | {seconds:.0f} |")
            print("\n".join(lines), flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("output", None, "Folder of the runs.", required=True)
    flags.DEFINE_list("seeds", ["0", "1"], "Seeds.")
    flags.DEFINE_integer("rollouts", 80, "Of each run.", 1)
    app.run(main)
