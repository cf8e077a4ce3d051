# SPDX-License-Identifier: Apache-2.0
"""Compile every config for the topology that its docstring names, and write the table of docs/plan.md.

    python tests/tpu/all_configs.py [--only=dpo_7b,kto_7b] [--extra=dpo_7b@v5p:2x2x2]

Half a minute to three a config on two free cores.  Each forecast is kept as JSON in docs/plan/, so that one config
can be done anew; the table is written from all of them.
"""
from __future__ import annotations

import argparse
import json
import pathlib
import re
import runpy
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCS, RESULTS = ROOT / "docs" / "plan.md", ROOT / "docs" / "plan"
EXTRA = ("dpo_7b@v5p:2x2x2", "dpo_lora_7b@v5e:4x4", "dpo_7b@2*v5e:8x8+--config.mesh.data=2")
HEAD = """# What each config needs

The very train step of each config, compiled with the TPU compiler for the topology that its docstring names, by
`python tests/tpu/all_configs.py` (JAX {jax}, libtpu {libtpu}); nothing here ran on a TPU.  HBM is the compiler's own
figure for one device.  The time is a roofline, every unit at its peak: *exposed* waits for all communication,
*overlapped* hides all of it; real steps are slower than both by what matrix products miss of their peak.  Collectives
are bytes that one chip receives in a step; *least* is what sharded weights cannot do without: the bfloat16 weights
gathered once for each forward and each backward pass of each microbatch, and one bfloat16 gradient scattered (meshes of
`data` and `fsdp` alone).  No step has an all-to-all.

Where a slice's chips form a square or a cube and all of them share the gradients, the compiler turns every
reduce-scatter, an explicit `psum_scatter` too, into an all-reduce and a slice: twice the bytes (seen with one
`psum_scatter` on v5e:8x8, v5p:4x4x4 and v6e:8x8; not on v5e:4x8).

"""
COLUMNS = ("config", "topology", "mesh", "HBM used of usable, GiB", "parameters, optimizer, reference, temporaries",
           "model PFLOP a step", "collectives, GB", "least, GB", "step, s: overlapped to exposed", "tokens/s", "MFU")


def topology_of(config: pathlib.Path) -> str | None:
    """Return the topology that a config's docstring names."""
    found = re.search(r"^Topology: ([0-9*a-z]+:[0-9x]+)", config.read_text(), re.MULTILINE)
    return found[1] if found else None


def compile_one(name: str, topology: str, overrides: list[str]) -> None:
    """Run align_jax.plan for a config and keep its JSON."""
    key = re.sub(r"\W+", "_", "_".join([name, topology, *overrides]))
    command = [sys.executable, "-m", "align_jax.plan", f"--config=configs/{name}.py", f"--topology={topology}",
               f"--json={RESULTS / key}.json", *overrides]
    print(" ".join(command[1:]), flush=True)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout or done.stderr[-3000:], flush=True)
    if done.returncode == 0:
        file = RESULTS / f"{key}.json"
        row = json.loads(file.read_text())[0]
        file.write_text(json.dumps({"config": name, "overrides": overrides, **row}, indent=1) + "\n")


def least(row: dict[str, Any]) -> float:
    """Return the bytes that a chip must receive where weights are sharded over fsdp and full remat is on."""
    mesh, hbm, flops = row["mesh"], row["hbm"], row["flops"]
    config = runpy.run_path(str(ROOT / "configs" / f"{row['config']}.py"))["get_config"]()
    elsewhere = 1 - 1 / mesh["fsdp"]
    trained, held = (hbm[kind] / size * mesh["fsdp"] for kind, size in (("parameters", 4), ("reference", 2)))
    passes = 2 + (flops["reference"] + flops["statistics"]) / flops["recomputed"]
    return 2 * elsewhere * (config.microbatches * passes * max(trained, held) + trained)


def line(row: dict[str, Any]) -> str:
    """Write one row of the table."""
    gib, hbm = 2**30, row["hbm"]
    mesh = " ".join(f"{axis}={size}" for axis, size in row["mesh"].items() if size > 1) or "one device"
    parts = ", ".join(f"{hbm[kind] / gib:.2f}" for kind in ("parameters", "optimizer", "reference", "temporaries"))
    moved: dict[str, float] = {}
    for one in row["collectives"]:
        moved[f"{one['kind']} ({one['axes']})"] = one["bytes"] / 1e9
    largest = ", ".join(f"{name} {size:.1f}" for name, size in moved.items() if size >= 0.05)
    sharded = all(size == 1 for axis, size in row["mesh"].items() if axis not in ("data", "fsdp"))
    bound = f"{least(row) / 1e9:.1f}" if sharded and row["flops"]["recomputed"] else ""
    s, speed, mfu = row["seconds"], row["tokens_per_second"], row["mfu"]
    fits = "" if row["fits"] else " **does not fit**"
    times = f"{s['overlapped']:.2f} to {s['exposed']:.2f} | {speed[0]:,.0f} to {speed[1]:,.0f} | " \
            f"{mfu[0]:.0%} to {mfu[1]:.0%}" if row["fits"] else " | | "
    return (f"| {row['config']} | {row['topology']} | {mesh} | {hbm['used'] / gib:.2f} of {hbm['capacity'] / gib:.2f}"
            f"{fits} | {parts} | {row['flops']['model'] / 1e15:.2f} | {largest} | {bound} | {times} |")


def main() -> None:
    """Compile what is asked for and write the table."""
    import jax
    import libtpu
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="configs, separated by commas; none = all; '-' = the table alone")
    parser.add_argument("--extra", default=",".join(EXTRA), help="CONFIG@TOPOLOGY+FLAG, separated by commas")
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
    rows = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]
    table = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *map(line, rows)]
    DOCS.write_text(HEAD.format(jax=jax.__version__, libtpu=libtpu.__version__) + "\n".join(table) + "\n")


if __name__ == "__main__":
    main()
