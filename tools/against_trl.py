# SPDX-License-Identifier: Apache-2.0
"""Train here and by TRL on the same model and data, each in a process of its own, and print the
ratio.

    python tools/against_trl.py --model=DIR --data=PAIRS.jsonl --trl_python=TRL/bin/python
        [--objective=dpo] [--batch_size=8] [--max_length=512] [--steps=8]
        [--set=KEY=VALUE ...] [--trl=KEY=VALUE ...]

Both read the file from its start, hold float32 parameters, and compute in bfloat16 on an
accelerator and in float32 on a CPU.  An example is a pair (dpo, reward), a prompt with its chosen
answer (sft), or a prompt with its chosen and the next one with its rejected answer (kto).  The
first steps, which compile, are left out; the median counts.  A pair's tokens are its prompt twice,
its chosen and its rejected answer, however they are laid out.  FLOPs are 2 N a token for each
forward pass and 4 N for the backward pass, and the causal attention's as many L d n^2 of a row of n
tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[1]


class Method(NamedTuple):
    """An objective on both sides."""

    theirs: str  # TRL's trainer and config are called so
    layout: str  # what "auto" chooses here where the order is free
    flops: int  # of a token, in N: 2 for a forward pass, 4 for the backward pass
    rows: Callable[[int, dict[str, str]], dict[str, Any]]  # (number, pair) -> the example


def _pair(number: int, pair: dict[str, str]) -> dict[str, Any]:
    return {key: pair[key] for key in ("prompt", "chosen", "rejected")}


def _chosen(number: int, pair: dict[str, str]) -> dict[str, Any]:
    return {"prompt": pair["prompt"], "completion": pair["chosen"]}


def _labeled(number: int, pair: dict[str, str]) -> dict[str, Any]:
    good = number % 2 == 0
    answer = pair["chosen" if good else "rejected"]
    return {"prompt": pair["prompt"], "completion": answer, "label": good}


METHODS = {
    "dpo": Method("DPO", "shared_prefix", 8, _pair),
    "sft": Method("SFT", "packed", 6, _chosen),
    "kto": Method("KTO", "packed", 12, _labeled),  # with both models' mismatched pairs
    "reward": Method("Reward", "shared_prefix", 6, _pair),
}


def examples(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the file's examples of the objective."""
    lines = pathlib.Path(options.data).read_text(encoding="utf-8").splitlines()
    method = METHODS[options.objective]
    return [method.rows(number, json.loads(line)) for number, line in enumerate(lines)]


WARM_UP = 3  # steps left out: those that compile, and the one under way meanwhile


def ours(options: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """Train here; return what was measured."""
    sys.path.insert(0, str(ROOT))
    import jax

    from align_jax import losses
    from align_jax.core import config as configs
    from align_jax.runs import loop, setup

    config = configs.defaults()
    folder.mkdir(parents=True)
    data = folder.with_suffix(".jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in examples(options)))
    config.model.path, config.data.train = options.model, str(data)
    config.data.shuffle, config.data.eval_fraction = False, 0.0
    config.data.layout = METHODS[options.objective].layout
    config.objective = configs.ConfigDict(losses.options(options.objective))
    config.batch_size, config.max_length = options.batch_size, options.max_length
    config.data.max_prompt_length = options.max_length * 7 // 8
    config.total_steps, config.total_epochs = options.steps + WARM_UP, 0.0
    config.mesh.fsdp, config.optimizer.learning_rate = -1, 1e-6
    config.checkpoint.every_steps = 0
    for text in options.set:
        key, _, value = text.partition("=")
        *parents, name = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        kind = type(node[name])
        node[name] = value == "True" if kind is bool else kind(value)
    report = setup.prepare(configs.read(config), str(folder)).train.report
    began = time.monotonic()
    loop.train(config, str(folder))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "tokens_per_second" in row]
    seconds = [
        (after["num_tokens"] - before["num_tokens"]) / after["tokens_per_second"]
        for before, after in zip(steps, steps[1:])
    ][WARM_UP - 2 :]
    memory = jax.local_devices()[0].memory_stats() or {}
    return {
        "seconds": seconds,
        "pairs": report["groups_per_step"],
        "losses": [row["loss"] for row in steps],
        "memory": memory.get("peak_bytes_in_use") or resident(),
        "stored_tokens": (steps[-1]["num_tokens"] - steps[0]["num_tokens"]) / (len(steps) - 1),
        "device": jax.devices()[0].device_kind,
        "total": time.monotonic() - began,
    }


def resident() -> int:
    """Return this process's largest resident memory, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def theirs(options: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """Train by TRL's trainer; return what was measured."""
    import datasets
    import torch
    import transformers
    import trl

    gpu = torch.cuda.is_available()
    wanted = examples(options)[: options.batch_size * (options.steps + WARM_UP)]
    method = METHODS[options.objective]
    given = dict(text.split("=", 1) for text in options.trl)
    args = getattr(trl, f"{method.theirs}Config")(
        output_dir=str(folder),
        per_device_train_batch_size=options.batch_size,
        max_length=options.max_length,
        max_steps=options.steps + WARM_UP,
        learning_rate=1e-6,
        train_sampling_strategy="sequential",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        bf16=gpu,
        use_cpu=not gpu,
        **{key: json.loads(value) for key, value in given.items()},
    )
    seconds: list[float] = []
    tokens: list[int] = []
    squares: list[int] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.monotonic()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if gpu:
                torch.cuda.synchronize()
            seconds.append(time.monotonic() - self.began)

    trainer = getattr(trl, f"{method.theirs}Trainer")(
        model=options.model,
        args=args,
        train_dataset=datasets.Dataset.from_list(wanted),
        callbacks=[Clock()],
    )
    collate = trainer.data_collator

    def counted(rows: list) -> Any:
        batch = collate(rows)
        mask = batch.get(
            "attention_mask", batch["input_ids"] != trainer.processing_class.pad_token_id
        )
        lengths = mask.sum(-1)
        tokens.append(int(lengths.sum()))
        squares.append(int((lengths**2).sum()))
        return batch

    trainer.data_collator = counted
    began = time.monotonic()
    trainer.train()
    config = trainer.model.config
    return {
        "seconds": seconds[WARM_UP:],
        "pairs": options.batch_size,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "memory": torch.cuda.max_memory_allocated() if gpu else resident(),
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "total": time.monotonic() - began,
        "tokens": statistics.mean(tokens[WARM_UP : WARM_UP + options.steps]),
        "squares": statistics.mean(squares[WARM_UP : WARM_UP + options.steps]),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "width": config.num_hidden_layers * config.num_attention_heads * config.head_dim,
        "attention": config._attn_implementation,
        "version": trl.__version__,
    }


def run(side: str, python: str, arguments: list[str], written: pathlib.Path) -> dict[str, Any]:
    """Run one side in a process of its own; its output is this one's."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [python, __file__, f"--side={side}", f"--json={written}", *arguments]
    done = subprocess.run(command, env=environment)
    if done.returncode:
        return {"error": f"status {done.returncode}"}
    found: dict[str, Any] = json.loads(written.read_text())
    return found


def table(found: dict[str, dict[str, Any]], times: int) -> str:
    """Write the two sides and their ratio as text; ``times``: FLOPs of a token, in parameters."""
    sys.path.insert(0, str(ROOT))
    from align_jax.parallel.chips import CHIPS

    out, rates = [], {}
    for side, one in found.items():
        if "error" in one:
            out.append(f"{side}: {one['error']}")
            continue
        seconds = statistics.median(one["seconds"])
        rates[side] = one["pairs"] / seconds
        line = f"{side}: {seconds:.3f} s a step, {rates[side]:.2f} examples/s"
        counts = found["trl"]
        if "tokens" in counts:
            # both take the same pairs, so as many tokens a pair
            tokens, squares = (counts[key] / counts["pairs"] for key in ("tokens", "squares"))
            flops = times * (counts["parameters"] * tokens + counts["width"] * squares)
            line += f", {tokens * rates[side]:,.0f} examples' tokens/s"
            kinds = (chip for chip in CHIPS.values() if one["device"].startswith(chip.kind))
            peak = next((chip.flops for chip in kinds), 0.0)
            line += f", MFU {flops * rates[side] / peak:.1%}" if peak else ""
        out.append(f"{line}, {one['memory'] / 2**30:.2f} GiB ({one['device']})")
    if len(rates) == 2:
        out.append(f"ratio of examples/s: {rates['ours'] / rates['trl']:.2f}")
    return "\n".join(out)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="JSON lines of prompt, chosen, rejected")
    parser.add_argument("--trl_python", default=sys.executable, help="of an environment with TRL")
    parser.add_argument("--objective", default="dpo", choices=METHODS)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--set", action="append", default=[], help="a key of our config")
    parser.add_argument("--trl", action="append", default=[], help="of TRL's config; value in JSON")
    parser.add_argument("--side", default="", choices=("", "ours", "trl"), help="one of them alone")
    parser.add_argument("--json", default="", help="file of all that was measured")
    options = parser.parse_args()
    if options.side and not options.json:
        parser.error("--side: one side alone is written to a file: --json=FILE")
    with tempfile.TemporaryDirectory() as made:
        folder = pathlib.Path(made)
        if options.side:
            measured = (ours if options.side == "ours" else theirs)(options, folder / "run")
            pathlib.Path(options.json).write_text(json.dumps(measured))
            return
        arguments = [one for one in sys.argv[1:] if not one.startswith("--json")]
        found = {
            side: run(side, python, arguments, folder / f"{side}.json")
            for side, python in (("trl", options.trl_python), ("ours", sys.executable))
        }
    print(table(found, METHODS[options.objective].flops))
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
