# SPDX-License-Identifier: Apache-2.0
"""Train configs/tiny.py with every objective and write what became of each one's held-out metric.

    python tools/measure_tiny.py [--results=FILE.jsonl] [--table=docs/objectives.md] [NAME ...]

A line of JSON an objective is added to the results as soon as it is measured, and what is there
already is not measured again; the table is written from the whole file.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import pathlib
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import jax

from align_jax import export, losses
from align_jax.runs import loop

# rows of the table that other objectives add, not objectives by themselves
TERMS = ("entropy", "ptx")
ALSO = ("dpo+sft", "dpo+bco_pair+sft", "online_dpo", "online_ipo", "online_kto")

HEAD = """# The objectives, measured

Every row is `python -m align_jax.train --config=configs/tiny.py:NAME --workdir=DIR`: a byte-level
Llama of 330,000 parameters from random weights, {steps} steps of 32 prompts made by code, one
seed. *Before* and *after* are the objective's own metric on {examples} held-out prompts
(`Objective.metric`); for objectives that learn from the policy's own samples, the mean reward
(share of lower-case letters among 16 bytes) of four samples of 12 held-out prompts each. At the
start policy and reference are one, so no chosen answer is ahead and accuracies by log-ratios are
0. *CPU* is processor time, compiling included; on two idle cores a run takes between half of it
and all of it. The teacher of `gkd` is what `sft` makes, the guide of `tgdpo` what `dpo` makes.
Written by `tools/measure_tiny.py` (JAX {jax}, seed 0).

Options and formulas of each: `python -m align_jax.objectives`.

| objective | data | metric | before | after | CPU, s | paper |
|---|---|---|---|---|---|---|
"""


def tiny(name: str):
    """Load configs/tiny.py:NAME."""
    spec = importlib.util.spec_from_file_location("tiny", ROOT / "configs" / "tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(name)


def objective(name: str) -> losses.Objective:
    """Return the table's row for a name of configs/tiny.py: of a sum, the first."""
    return losses.OBJECTIVES[name.removeprefix("online_").partition("+")[0]]


def metric(name: str) -> str:
    """Return the metric that should improve, with its direction."""
    return "reward up" if name.startswith("online_") else objective(name).metric


# objective -> a key that names another model, and the objective that makes that one here
OTHER_MODEL = {"gkd": ("reference.path", "sft"), "tgdpo": ("reference.guide", "dpo")}


@functools.cache
def trained(name: str) -> str:
    """Train configs/tiny.py:NAME and export it; return the folder."""
    folder = tempfile.mkdtemp()
    loop.train(tiny(name), f"{folder}/run")
    export.export_run(f"{folder}/run", f"{folder}/model")
    return f"{folder}/model"


def measure(name: str) -> dict[str, object]:
    """Train, and return the metric before and after with the processor time that it took, in
    seconds."""
    config, key = tiny(name), metric(name).partition(" ")[0]
    if name in OTHER_MODEL:
        other, maker = OTHER_MODEL[name]
        config.update_from_flattened_dict({other: trained(maker)})
    config.log.every_steps, config.eval.every_steps = 1, 0
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stderr(nowhere):
            loop.train(config, folder)
        rows = [
            json.loads(line)
            for line in (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()
        ]
    seconds = time.process_time() - started
    if rows[-1]["step"] != config.total_steps:
        raise RuntimeError(
            f"{name}: stopped after step {rows[-1]['step']} of {config.total_steps}; run this again"
        )
    jax.clear_caches()
    found = [row[f"eval/{key}"] for row in rows if f"eval/{key}" in row]
    return {
        "name": name,
        "metric": metric(name),
        "before": found[0],
        "after": found[-1],
        "seconds": seconds,
        "steps": config.total_steps,
        "examples": config.eval.max_examples,
    }


def table(results: dict[str, dict]) -> str:
    """Write the results as Markdown, in the order of the table of objectives."""
    order = [name for name in names() if name in results]
    one = results[order[0]]
    text = HEAD.format(steps=one["steps"], examples=one["examples"], jax=jax.__version__)
    for name in order:
        row, entry = results[name], objective(name)
        data = "samples" if row["metric"] == "reward up" else entry.data
        text += (
            f"| {name} | {data} | {row['metric']} | {row['before']:.3f} | {row['after']:.3f} | "
            f"{row['seconds']:.0f} | {entry.paper} |\n"
        )
    return text


def names() -> list[str]:
    """Return everything that is measured."""
    return [name for name in losses.OBJECTIVES if name not in TERMS] + list(ALSO)


def main() -> None:
    """Measure what is not in the results yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("tiny.jsonl"))
    parser.add_argument("--table", type=pathlib.Path, default=ROOT / "docs" / "objectives.md")
    options = parser.parse_args()
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    results = {row["name"]: row for row in map(json.loads, lines)}
    for name in options.names or names():
        if name in results:
            continue
        results[name] = measure(name)
        with options.results.open("a") as file:
            file.write(json.dumps(results[name]) + "\n")
        print(json.dumps(results[name]), flush=True)
    options.table.parent.mkdir(parents=True, exist_ok=True)
    options.table.write_text(table(results))


if __name__ == "__main__":
    main()
