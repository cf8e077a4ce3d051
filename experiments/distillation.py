# SPDX-License-Identifier: Apache-2.0
"""A damaged model is taught by what it was: forward and reverse KL, on the data's answers and on
the student's own samples.

    python experiments/distillation.py --model=HF_DIR --stories=STORIES.txt --output=DIR
        [--seeds=0,1 --steps=60]

The student is the teacher with noise on every matrix, 0.3 of the matrix's standard deviation.  All
methods see 16 beginnings of stories a step, and learn 32 tokens behind each: the story's, or the
student's own (``on_policy`` of them, at temperature 1).  Held out are the last stories: the table
is of the runs' metrics.jsonl, D(student, teacher) on these stories in the direction that is
trained.  At the end each is continued eight times: KL(student || teacher) of own samples, nats a
token.  Runs that DIR/results.json already has are not made again.
"""

from __future__ import annotations

import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import stories
from absl import app, flags, logging

from align_jax import evaluate, losses
from align_jax.core.config import ConfigDict, defaults
from align_jax.core.options import DataOptions, RolloutOptions
from align_jax.data import datasets
from align_jax.data.tokenizer import load_tokenizer
from align_jax.evals.generation import generation
from align_jax.interop import hf
from align_jax.online import rewards
from align_jax.runs import loop
from align_jax.runs.weights import load_model

NOISE, HELD_OUT, NEW_TOKENS = 0.3, 48, 32
CHARACTERS = 120  # of a story behind its beginning: about as many tokens as are sampled
METHODS: Mapping[str, dict[str, Any]] = {
    "forward, λ = 0": {"beta": 0.0},
    "reverse, λ = 0": {"beta": 1.0},
    "reverse, λ = 1/2": {"beta": 1.0, "on_policy": 0.5},
    # with 1 the data's answers are not read, and nothing is measured on those held out
    "reverse, λ = 15/16": {"beta": 1.0, "on_policy": 0.9375},
}


def write_student(teacher: str, folder: pathlib.Path) -> str:
    """Write the teacher with noise on its matrices as a checkpoint."""
    loaded = load_model(teacher, compute_dtype="float32")
    leaves, tree = jax.tree.flatten(loaded.params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    noisy = [
        x + NOISE * x.std() * jax.random.normal(key, x.shape, x.dtype) if x.ndim > 1 else x
        for x, key in zip(leaves, keys)
    ]
    hf.save(str(folder), loaded.config, jax.tree.unflatten(tree, noisy))
    load_tokenizer(teacher).save_pretrained(folder)
    return str(folder)


def write_data(source: str, folder: pathlib.Path) -> tuple[str, str]:
    """Write the stories to learn from, and the last ones."""
    stories.main(source, str(folder))
    rows = map(json.loads, (folder / "stories.jsonl").read_text().splitlines())
    lines = [
        json.dumps(row | {"completion": row["completion"][:CHARACTERS]}) + "\n" for row in rows
    ]
    names = []
    for name, part in (("train", lines[:-HELD_OUT]), ("held_out", lines[-HELD_OUT:])):
        (folder / f"{name}.jsonl").write_text("".join(part))
        names.append(str(folder / f"{name}.jsonl"))
    return names[0], names[1]


def make_config(
    method: str, seed: int, steps: int, student: str, teacher: str, data: Sequence[str]
) -> ConfigDict:
    """Return a run's config."""
    config = defaults()
    config.seed, config.total_steps, config.batch_size, config.max_length = seed, steps, 16, 80
    config.model.path, config.model.compute_dtype, config.model.remat = student, "float32", "none"
    config.reference.path, config.reference.dtype = teacher, "float32"
    config.data.train, config.data.eval = data
    config.data.layout = "plain"
    config.objective = ConfigDict(losses.options("gkd", **METHODS[method]))
    config.rollout.responses_per_prompt, config.rollout.max_new_tokens = 1, NEW_TOKENS
    config.optimizer.learning_rate, config.optimizer.schedule = 1e-3, "linear"
    config.optimizer.b2, config.optimizer.warmup_steps = 0.99, 5
    config.eval.every_steps, config.checkpoint.every_steps = max(1, steps // 4), 0
    return config


def measure(workdir: pathlib.Path, held_out: str) -> dict[str, Any]:
    """Read the held-out divergences of a run, and sample what it has become."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    curve = {row["step"]: row["eval/divergence"] for row in rows if "eval/divergence" in row}
    policy = evaluate.run_policy(str(workdir))
    if not policy.name.endswith(f"@{rows[-1]['step']}") or len(curve) < 5:
        raise SystemExit(f"{workdir} was stopped early; the same command goes on")
    found = generation(
        policy,
        datasets.load(held_out, "prompts", DataOptions(), chat=False),
        rewards.resolve({"length": {"target": 20}}, load_model=load_model),
        RolloutOptions(responses_per_prompt=8, max_new_tokens=NEW_TOKENS, rows=128),
        max_length=80,
        seed=1000,
    )
    own = found["objective/kl"] / found["completions/mean_length"]
    return {"divergence": curve, "own": own, "seconds": rows[-1]["time"] - rows[0]["time"]}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Write means over seeds, and half the range of the last ones, as a Markdown table."""
    steps = list(results[0]["divergence"])
    lines = [
        f"| method | {' | '.join(f'step {step}' for step in steps)} | own samples | seconds |",
        "|---" * (len(steps) + 3) + "|",
    ]
    for method in dict.fromkeys(one["method"] for one in results):
        runs = [one for one in results if one["method"] == method]
        cells = [statistics.mean(one["divergence"][step] for one in runs) for step in steps]
        own = [one["own"] for one in runs]
        spread = f"{statistics.mean(own):.3f} ± {(max(own) - min(own)) / 2:.3f}"
        seconds = statistics.mean(one["seconds"] for one in runs)
        curve = " | ".join(f"{cell:.3f}" for cell in cells)
        lines.append(f"| {method} | {curve} | {spread} | {seconds:.0f} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Run from the command line."""
    values = flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    folder = pathlib.Path(values.output)
    folder.mkdir(parents=True, exist_ok=True)
    data = write_data(values.stories, folder)
    student = write_student(values.model, folder / "student")
    file = folder / "results.json"
    results = json.loads(file.read_text()) if file.exists() else []
    for seed in map(int, values.seeds):
        for number, method in enumerate(METHODS):
            if any((one["method"], one["seed"]) == (method, seed) for one in results):
                continue
            workdir = folder / f"run_{number}_{seed}"
            config = make_config(method, seed, values.steps, student, values.model, data)
            loop.train(config, str(workdir))
            found = {"method": method, "seed": seed}
            found |= json.loads(json.dumps(measure(workdir, data[1])))
            results.append(found)
            file.write_text(json.dumps(results, indent=1))
            print(table(results), flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "The teacher, a Hugging Face folder.", required=True)
    flags.DEFINE_string("stories", None, "A text of stories.", required=True)
    flags.DEFINE_string("output", None, "Folder of the runs.", required=True)
    flags.DEFINE_list("seeds", ["0", "1"], "Seeds.")
    flags.DEFINE_integer("steps", 60, "Of each run.", 4)
    app.run(main)
