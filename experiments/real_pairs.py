# SPDX-License-Identifier: Apache-2.0
"""What do public pairs teach a real model, and what does it lose?

    python experiments/real_pairs.py --model=HF_DIR --pairs=FILE --text=STORIES.txt --output=DIR
        [--objectives=dpo,ipo,simpo,orpo,kto,cdpo --adapters=full,lora --seeds=0 --steps=48 ...]
    python experiments/real_pairs.py --page=docs/real_pairs.md --output=DIR[,DIR ...]

A share of the pairs is held out.  At the start and at each third of the steps: how often the policy
gives the chosen answer more implicit reward than the rejected one, by how much, Σ_t log π - log
π_start of its own answers to held-out prompts, and nats a token on other text.  Its first answers
are kept, for a look at the start's beside them.  DIR/results.jsonl is not computed again.
"""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import frontier
import numpy as np
from absl import app, flags, logging

from align_jax import evaluate, losses
from align_jax.core.config import ConfigDict
from align_jax.core.options import DataOptions, RolloutOptions
from align_jax.data import datasets
from align_jax.evals.generation import sample, sequence_logps
from align_jax.evals.policy import EvaluatedPolicy, standard_error
from align_jax.models.model import LoadedModel
from align_jax.online.rewards import WeightedRewards

SHOWN = 4  # answers that are kept
OPTIONS = {
    "cdpo": ("dpo", {"label_smoothing": 0.1}),
    "ipo": ("ipo", {"lengths": "sum", "beta": 0.05}),
    "simpo": ("simpo", {"beta": 2.0}),
}


def split(
    source: str, text: str, folder: pathlib.Path, chat: bool, held_out: int, most: int
) -> None:
    """Write training pairs, held-out ones, their prompts, and other text.

    Args:
        source: of the pairs.
        text: stories, divided by <|endoftext|>.
        folder: where to.
        chat: whether prompts are conversations.
        held_out: pairs.
        most: characters of a prompt with an answer; longer pairs are left out.
    """
    examples = datasets.load(source, "pairs", DataOptions(), chat=chat)
    rows = [
        {"prompt": one.prompt, "chosen": one.responses[0], "rejected": one.responses[1]}
        for one in examples.items
        if len(str(one.prompt)) + max(map(len, map(str, one.responses))) < most
    ]
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    frontier.write_rows(folder / "held_out.jsonl", rows[:held_out])
    frontier.write_rows(folder / "train.jsonl", rows[held_out:])
    prompts = [{"prompt": row["prompt"]} for row in rows[:held_out]]
    frontier.write_rows(folder / "prompts.jsonl", prompts)
    stories = pathlib.Path(text).read_text(encoding="utf-8").split("<|endoftext|>")
    parts = [one.strip()[:400].partition(". ") for one in stories[:64]]
    other = [{"prompt": a + ".", "completion": " " + b} for a, _, b in parts if b]
    frontier.write_rows(folder / "text.jsonl", other)


def measure(
    policy: EvaluatedPolicy, folder: pathlib.Path, new_tokens: int, length: int
) -> dict[str, Any]:
    """Measure a policy beside its reference."""
    how = {"batch_size": 16, "max_length": length}
    pairs, text = f"preference={folder}/held_out.jsonl", f"perplexity={folder}/text.jsonl"
    found = evaluate.evaluate(policy, [pairs, text], options={"preference": how, "perplexity": how})
    chat = bool(policy.tokenizer.chat_template)
    examples = datasets.load(
        str(folder / "prompts.jsonl"), "prompts", DataOptions(), chat=chat, limit=32
    )
    options = RolloutOptions(responses_per_prompt=1, max_new_tokens=new_tokens, rows=32)
    said = sample(policy, examples, WeightedRewards(()), options, max_length=length, seed=7)
    prompts, answers = [one.prompt for one in said], [one.completions for one in said]
    kl = np.asarray([one.token_logps.sum() for several in answers for one in several])
    kl -= sequence_logps(policy, policy.reference, prompts, answers, options.rows)
    held = found[pairs]
    return {
        "accuracy": held["rewards/accuracies"],
        "accuracy/stderr": held["rewards/accuracies/stderr"],
        "margin": held["rewards/margins"],
        "chosen": held["rewards/chosen"],
        "pairs": held["examples"],
        "kl": float(kl.mean()),
        "kl/stderr": standard_error(kl),
        "nll": found[text]["nll"],
        "said": [(str(one.example.prompt), one.completions[0].text) for one in said[:SHOWN]],
    }


def make_config(name: str, adapter: str, seed: int, folder: pathlib.Path) -> ConfigDict:
    """Return a run's config."""
    values = flags.FLAGS
    config = frontier.base_config(values.model, seed)
    config.data.train, config.max_length = str(folder / "train.jsonl"), values.max_length
    objective, options = OPTIONS.get(name, (name, {}))
    config.objective = ConfigDict(losses.options(objective) | options)
    config.batch_size, config.total_steps = values.groups, values.steps
    config.optimizer.learning_rate = values.rate if adapter == "full" else values.lora_rate
    config.model.lora.rank = 0 if adapter == "full" else 16
    return config


def study(folder: pathlib.Path) -> None:
    """Run what is not there yet."""
    values = flags.FLAGS
    length = {"max_length": values.max_length}
    begun = evaluate.model_policy(values.model, values.model, dtype="float32", **length)
    if not (folder / "text.jsonl").exists():
        chat = bool(begun.tokenizer.chat_template)
        split(values.pairs, values.text, folder, chat, values.held_out, 3 * values.max_length)
    start = LoadedModel(begun.model, begun.params)
    file = folder / "results.jsonl"
    text = file.read_text() if file.exists() else ""
    done = {(row["label"], row["seed"]) for row in map(json.loads, text.splitlines())}
    data = {"model": pathlib.Path(values.model).name, "data": pathlib.Path(values.pairs).name}
    data |= {"steps": values.steps, "groups": values.groups}
    sizes = folder, values.new_tokens, values.max_length
    if ("start", 0) not in done:
        row = {**data, "label": "start", "seed": 0, "step": 0, **measure(begun, *sizes)}
        frontier.append(file, row)
    compiled: dict[Any, Any] = {}
    for seed in map(int, values.seeds):
        for name in values.objectives:
            for adapter in values.adapters:
                label = f"{name}, {adapter}"
                if (label, seed) in done:
                    continue
                began, rows = time.process_time(), []
                config = make_config(name, adapter, seed, folder)
                rate = config.optimizer.learning_rate
                method = frontier.Method(label, {}, "learning_rate", (rate,))
                job = frontier.Job("real pairs", label, method, rate, seed)
                for stage in frontier.train(config, job, start, compiled):
                    found = measure(stage.policy, *sizes)
                    row = {**data, "label": label, "seed": seed, "step": stage.step, "rate": rate}
                    rows.append({**row, **found, "cpu_seconds": time.process_time() - began})
                    print(label, seed, stage.step, found["accuracy"], found["kl"], flush=True)
                frontier.append(file, *rows)


def tables(folder: pathlib.Path) -> list[str]:
    """Write a study's table, and the answers before and after."""
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    start = next(row for row in rows if row["label"] == "start")
    hours = sum(row["cpu_seconds"] for row in rows if row["step"] == row["steps"]) / 3600
    lines = [
        f"## {start['model']} on {start['data']}",
        "",
        f"{start['steps']} steps of {start['groups']} pairs, {start['pairs']:.0f} pairs held out "
        f"(an accuracy's standard error is {0.5 / start['pairs'] ** 0.5:.3f}), a seed each; "
        f"{hours:.2f} core-hours.  The start's text costs {start['nll']:.3f} nats a token.",
        "",
        "| objective | rate | step | held-out accuracy | margin | KL of its answers, nats | "
        "other text, nats a token |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["label"] != "start":
            lines.append(
                f"| {row['label']} | {row['rate']:g} | {row['step']} | {row['accuracy']:.3f} | "
                f"{row['margin']:.3f} | {row['kl']:.2f} ± {row['kl/stderr']:.2f} | "
                f"{row['nll']:.3f} |"
            )
    last = {row["label"]: row for row in rows if row["step"] == row["steps"]}
    shown = [label for label in last if label.startswith("dpo")][-1:]
    for label in shown:
        lines += ["", f"First held-out prompts, answered before and after {label}:", ""]
        lines += ["| prompt | before | after |", "|---|---|---|"]
        for (prompt, before), (_, after) in zip(start["said"], last[label]["said"]):
            cells = [" ".join(one.split()).replace("|", "\\|") for one in (prompt, before, after)]
            lines.append("| " + " | ".join(one[:300] or "(nothing)" for one in cells) + " |")
    return lines


def page(folders: Sequence[str], output: pathlib.Path) -> None:
    """Write the page."""
    lines = [
        "# Real pairs",
        "",
        "What public pairs teach a real model, and what it loses: `experiments/real_pairs.py`, "
        "whose first lines say what is measured.  These are small models, few steps and one seed: "
        "the numbers show whether held-out preferences are learned and at which distance, not that "
        "an objective is better than another where they differ by less than two standard errors.",
    ]
    for folder in folders:
        lines += ["", *tables(pathlib.Path(folder))]
    output.write_text("\n".join(lines) + "\n")


def main(argv: Sequence[str]) -> None:
    """Run from the command line."""
    values = flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    if values.page:
        page(values.output, pathlib.Path(values.page))
        return
    folder = pathlib.Path(values.output[0])
    folder.mkdir(parents=True, exist_ok=True)
    study(folder)


if __name__ == "__main__":
    flags.DEFINE_list("output", None, "Folder of the results; for the page several.", required=True)
    flags.DEFINE_string("page", "", "Write the page of the results instead.")
    flags.DEFINE_string("model", "", "A checkpoint.")
    flags.DEFINE_string("pairs", "", "Pairs, in any format that align_jax reads.")
    flags.DEFINE_string("text", "", "Stories, whose perplexity is watched.")
    flags.DEFINE_list("objectives", ["dpo", "ipo", "simpo", "orpo", "kto", "cdpo"], "Objectives.")
    flags.DEFINE_list("adapters", ["full", "lora"], "Of full and lora.")
    flags.DEFINE_list("seeds", ["0"], "Seeds.")
    flags.DEFINE_integer("steps", 48, "Steps, a multiple of 3.")
    flags.DEFINE_integer("groups", 16, "Pairs of a step.")
    flags.DEFINE_integer("held_out", 128, "Pairs held out.")
    flags.DEFINE_integer("max_length", 192, "Tokens of a prompt with an answer.")
    flags.DEFINE_integer("new_tokens", 40, "Of a sampled answer.")
    flags.DEFINE_float("rate", 3e-4, "Learning rate of full fine-tunes.")
    flags.DEFINE_float("lora_rate", 2e-3, "Learning rate of adapters.")
    app.run(main)
