# SPDX-License-Identifier: Apache-2.0
"""Compile every config for the topology that its docstring names, and write the tables of
docs/plan.md.

    python tools/plan_all_configs.py [--only=dpo_7b,kto_7b] [--extra=dpo_7b@v5p:2x2x2]

One to five minutes a config on two free cores.  Each estimate is kept as JSON in docs/plan/, so
that one config can be done anew; the tables are written from all of them.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS, RESULTS = ROOT / "docs" / "plan.md", ROOT / "docs" / "plan"
EXTRA = (
    "dpo_7b@v5p:2x2x2",
    "dpo_7b@v6e:16x16+--config.batch_size=256+--config.max_length=2048",
    "dpo_7b@2*v5e:8x8+--config.mesh.data=2",
    "dpo_lora_7b@v5e:8x8+--config.batch_size=64+--config.microbatches=1",
    "dpo_lora_7b@v5p:2x2x2",
)
HEAD = """# What each config needs

Every program of each config, compiled with the TPU compiler for the topology that its docstring
names, by `python tools/plan_all_configs.py` (JAX {jax}, libtpu {libtpu}); nothing here ran on a
TPU. HBM is the compiler's own figure for one device, with all that the run holds meanwhile. Times
are a roofline, every unit at its peak: *exposed* waits for all communication, *overlapped* hides
all of it; real steps are slower than both by what matrix products miss of their peak. Collectives
are bytes that one chip receives in a step; the *lower bound* is what the mesh cannot do without
(`align_jax/planner/communication.py`): weights gathered for each forward and each backward pass
of each microbatch, gradients scattered or summed, states summed over `tensor`, keys and values
gathered over `sequence`, tokens over `expert`. No step has an all-to-all.

Where a slice's chips form a square or a cube and all of them share the gradients, the compiler
turns every reduce-scatter, an explicit `psum_scatter` too, into an all-reduce and a slice (its
log: "Plain all-reduce may use ND algorithm"; seen on v5e:8x8, v5p:4x4x4 and v6e:8x8; not on
v5e:4x8). These are twice the bytes, but over all axes of the torus at once where the scatter is
one ring, so not twice the time. With the compiler's options
`xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter` and
`xla_tpu_prefer_async_allgather_to_allreduce` they stay scatters (dpo_7b on v5e:8x8: 61.2 GB
instead of 76.5); nobody has timed them, so they are not set.

## Train steps

"""
EARLIER = """† compiled with an earlier version of this code, which gathered the output head
otherwise; the traffic with HBM was counted too high then, and the experts' collectives too low.

"""
TRAIN = (
    "config",
    "topology",
    "mesh",
    "HBM used of usable, GiB",
    "parameters, optimizer, reference, temporaries",
    "model PFLOP a step",
    "collectives, GB",
    "lower bound, GB",
    "step, s: overlapped to exposed",
    "tokens/s",
    "MFU",
)
OTHERS = (
    "config",
    "topology",
    "program",
    "HBM used of usable, GiB",
    "temporaries, cache, GiB",
    "collectives, GB",
    "lower bound, GB",
    "exposed, s",
    "runs a rollout",
)


def topology_of(config: pathlib.Path) -> str | None:
    """Return the topology that a config's docstring names."""
    found = re.search(r"^Topology: ([0-9*a-z]+:[0-9x]+)", config.read_text(), re.MULTILINE)
    return found[1] if found else None


def compile_one(name: str, topology: str, overrides: list[str]) -> None:
    """Run align_jax.plan for a config and keep its JSON."""
    key = re.sub(r"\W+", "_", "_".join([name, topology, *overrides]))
    command = [
        sys.executable,
        "-m",
        "align_jax.plan",
        f"--config=configs/{name}.py",
        f"--topology={topology}",
        f"--json={RESULTS / key}.json",
        *overrides,
    ]
    print(" ".join(command[1:]), flush=True)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout or done.stderr[-3000:], flush=True)
    if done.returncode == 0:
        file = RESULTS / f"{key}.json"
        (found,) = json.loads(file.read_text())
        file.write_text(
            json.dumps({"config": name, "overrides": overrides, **found}, indent=1) + "\n"
        )


def by_size(sizes: dict[str, float]) -> str:
    """Write bytes by name, those below 50 MB left out."""
    return ", ".join(f"{name} {size / 1e9:.1f}" for name, size in sizes.items() if size >= 5e7)


def head(row: dict[str, Any]) -> tuple[str, str, str]:
    """Return a program's HBM, what it moves, and the lower bound of that."""
    gib, hbm = 2**30, row["hbm"]
    moved = {f"{one['kind']} ({one['axes']})": one["bytes"] for one in row["collectives"]}
    fits = "" if row["fits"] else " **does not fit**"
    return (
        f"{hbm['used'] / gib:.2f} of {hbm['capacity'] / gib:.2f}{fits}",
        by_size(moved),
        by_size(row["least"]),
    )


def title(found: dict[str, Any]) -> str:
    """Name a config and what of it was set otherwise."""
    changes = [
        flag.removeprefix("--config.")
        for flag in found["overrides"]
        if flag.startswith("--config.")
    ]
    return " ".join([found["config"], *changes]) + " †" * found.get("earlier", False)


def train_line(config: str, row: dict[str, Any]) -> str:
    """Write a train step's row."""
    gib, kinds = 2**30, row["hbm"]
    mesh = (
        " ".join(f"{axis}={size}" for axis, size in row["mesh"].items() if size > 1) or "one device"
    )
    parts = ", ".join(
        f"{kinds[kind] / gib:.2f}"
        for kind in ("parameters", "optimizer", "reference", "temporaries")
    )
    used, moved, bound = head(row)
    s, speed, mfu = row["seconds"], row["tokens_per_second"], row["mfu"]
    times = (
        f"{s['overlapped']:.2f} to {s['exposed']:.2f} | {speed[0]:,.0f} to {speed[1]:,.0f} | "
        f"{mfu[0]:.0%} to {mfu[1]:.0%}"
        if row["fits"]
        else " | | "
    )
    flops = row["flops"]["model"] / 1e15
    return (
        f"| {config} | {row['topology']} | {mesh} | {used} | {parts} | {flops:.2f} | {moved} | "
        f"{bound} | {times} |"
    )


def other_line(config: str, row: dict[str, Any]) -> str:
    """Write another program's row."""
    gib, kinds = 2**30, row["hbm"]
    used, moved, bound = head(row)
    runs = f"{row['runs']:,}" if row["runs"] > 1 else ""
    return (
        f"| {config} | {row['topology']} | {row['program']} | {used} | "
        f"{kinds['temporaries'] / gib:.2f}, {kinds.get('cache', 0) / gib:.2f} | {moved} | {bound} "
        f"| {row['seconds']['exposed']:.3f} | {runs} |"
    )


def table(columns: tuple[str, ...], lines: list[str]) -> str:
    """Write a table."""
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *lines]) + "\n"


def main() -> None:
    """Compile what is asked for and write the table."""
    import jax
    import libtpu

    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        default="",
        help="configs, separated by commas; none = all; '-' = the tables alone",
    )
    parser.add_argument(
        "--extra", default=",".join(EXTRA), help="CONFIG@TOPOLOGY+FLAG, separated by commas"
    )
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    wanted = options.only.split(",") if options.only else []
    for config in sorted((ROOT / "configs").glob("*.py")):
        topology = topology_of(config)
        if topology and (not wanted or config.stem in wanted):
            compile_one(config.stem, topology, [])
    for extra in options.extra.split(",") if options.extra else ():
        name, _, rest = extra.partition("@")
        topology, *overrides = rest.split("+")
        if not wanted or name in wanted:
            compile_one(name, topology, overrides)
    found = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]
    rows = [(title(one), row) for one in found for row in one["programs"]]
    text = HEAD.format(jax=jax.__version__, libtpu=libtpu.__version__)
    text += EARLIER if any(one.get("earlier") for one in found) else ""
    text += table(TRAIN, [train_line(*row) for row in rows if row[1]["program"] == "train"])
    alone = [title(one) for one in found if len(one["programs"]) == 1]
    text += "\n## Other programs\n\n"
    text += f"Of these only the train step was compiled: {'; '.join(alone)}.\n\n" if alone else ""
    text += table(OTHERS, [other_line(*row) for row in rows if row[1]["program"] != "train"])
    DOCS.write_text(text)


if __name__ == "__main__":
    main()
