# SPDX-License-Identifier: Apache-2.0
"""A reward for each step against one for the whole answer, which is seldom right at first.

    python experiments/steps.py --output=DIR [--seeds=0,1,2 --rollouts=60]

Asked "3:" the answer is the next eight digits, a line each: 4, 5, 6, ... (behind 9 comes 0).  The
policy begins as one that has learned answers of which about half of the steps are right, so that
a whole answer is right once in hundreds of samples.  A process reward model learns, of such answers
with their steps labeled, whether a digit is the one before it plus 1.  Then GRPO learns from three
rewards, each beside 1 for the form, eight digits on eight lines:

    outcome   1 for the whole right answer, else 0
    steps     the process reward model's probability of each step, at the step's end
    least     the least of these probabilities, as one number an answer

Before and after training each of the ten questions is sampled 64 times at temperature 1.  What
DIR/results.md has already is not trained again.
"""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging

from align_jax import evaluate, export, losses
from align_jax.core.config import ConfigDict, defaults
from align_jax.core.options import DataOptions, RolloutOptions
from align_jax.data import datasets
from align_jax.evals.generation import sample
from align_jax.evals.policy import EvaluatedPolicy
from align_jax.online import rewards
from align_jax.runs import loop
from align_jax.runs.weights import load_model

DIGITS, NEW_TOKENS = 8, 16  # eight digits, seven line ends, the end of the answer
SHARE = 0.45  # of the steps that the policy first learns, right by more than chance
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
        for name, share in (("form", SHARE), ("labeled", 0.5)):
            steps, labels, before = [], [], first
            for _ in range(DIGITS):
                right = (before + 1) % 10
                before = right if rng.random() < share else int(rng.integers(10))
                steps.append(str(before))
                labels.append(before == right)
            row: dict = {"prompt": f"{first}:", "completions": steps, "labels": labels}
            if name == "form":
                row = {"prompt": f"{first}:", "completion": "\n".join(steps)}
            elif number >= 2048:
                name = "held_out"
            rows[name].append(row)
    rows["questions"] = [{"prompt": f"{n}:", "answer": "\n".join(answer(n))} for n in range(10)]
    found = {}
    for name, several in rows.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in several))
        found[name] = str(path)
    return found


def make_config(objective: str, data: str, seed: int, **options: Any) -> ConfigDict:
    """Return what the runs have in common."""
    config = defaults()
    config.seed, config.max_length = seed, 32
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
    """Train and export the policy's start or the process reward model, unless an earlier call has;
    return the checkpoint."""
    exported = folder / f"{objective}_hf"
    if (exported / "config.json").exists():
        return str(exported)
    config = make_config(objective, data, 0)
    config.batch_size, config.total_steps = 64, steps
    config.data.eval, config.eval.every_steps = held_out, steps
    loop.train(config, str(folder / objective))
    export.export_run(str(folder / objective), str(exported))
    return str(exported)


def online(start: str, questions: str, reward: dict, seed: int, rollouts: int) -> ConfigDict:
    """Return a run of GRPO."""
    config = make_config("grpo", questions, seed, loss_type="dapo", beta=0.02)
    config.model.path, config.batch_size, config.total_steps = start, 10, rollouts
    config.rollout.responses_per_prompt, config.rollout.max_new_tokens = 32, NEW_TOKENS
    form = {"kind": "regex", "pattern": r"^(\d\n){7}\d$"}
    config.rewards = ConfigDict(reward | {"form": form})
    return config


def measure(policy: EvaluatedPolicy, questions: str) -> tuple[float, float]:
    """Return the shares of right steps and of whole right answers among new samples."""
    examples = datasets.load(questions, "prompts", DataOptions(), chat=False)
    scored = rewards.resolve({"exact": 1.0}, load_model=load_model)
    options = RolloutOptions(responses_per_prompt=SAMPLES, max_new_tokens=NEW_TOKENS, rows=640)
    found = sample(policy, examples, scored, options, max_length=32, seed=1000)
    hits, count = 0, 0
    for one in found:
        for said in one.completions:
            before = int(str(one.example.prompt)[0])
            for digit in said.text.split("\n"):
                count += 1
                hits += digit == str((before + 1) % 10)
                before = int(digit) if digit.isdecimal() else -2
    return hits / count, float(np.mean([one.rewards for one in found]))


def main(argv: Sequence[str]) -> None:
    """Run from the command line."""
    values = flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    folder = pathlib.Path(values.output)
    folder.mkdir(parents=True, exist_ok=True)
    data = write_data(folder)
    start = offline("sft", data["form"], "", 300, folder)
    model = offline("reward_process", data["labeled"], data["held_out"], 100, folder)
    last = (folder / "reward_process" / "metrics.jsonl").read_text().splitlines()
    held = [row for row in map(json.loads, last) if "eval/accuracy" in row]
    print(f"the process reward model is right about {held[-1]['eval/accuracy']:.3f} of new steps")
    right, whole = measure(evaluate.run_policy(str(folder / "sft")), data["questions"])
    print(f"at the start {right:.3f} of the steps and {whole:.4f} of the answers are right")
    kinds: dict[str, dict] = {
        "outcome": {"exact": 1.0},
        "steps": {"process": {"path": model}},
        "least": {"process": {"path": model, "aggregate": "min"}},
    }
    lines = ["| reward | seed | right steps | right answers | seconds |", "|---|---|---|---|---|"]
    file = folder / "results.md"
    lines = file.read_text().splitlines() if file.exists() else lines
    for seed in map(int, values.seeds):
        for name, reward in kinds.items():
            if any(line.startswith(f"| {name} | {seed} |") for line in lines):
                continue
            began, workdir = time.monotonic(), str(folder / f"{name}_{seed}")
            loop.train(online(start, data["questions"], reward, seed, values.rollouts), workdir)
            seconds = time.monotonic() - began
            policy = evaluate.run_policy(workdir)
            if not policy.name.endswith(f"@{values.rollouts}"):
                raise SystemExit(f"{workdir} was stopped early; the same command goes on")
            right, whole = measure(policy, data["questions"])
            lines.append(f"| {name} | {seed} | {right:.3f} | {whole:.3f} | {seconds:.0f} |")
            file.write_text("\n".join(lines) + "\n")
            print(file.read_text(), flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("output", None, "Folder of the runs.", required=True)
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds.")
    flags.DEFINE_integer("rollouts", 60, "Of each run.", 1)
    app.run(main)
