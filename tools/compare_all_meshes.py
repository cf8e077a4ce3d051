# SPDX-License-Identifier: Apache-2.0
"""Train over every mesh shape of eight simulated devices, compare with one device, and write
docs/meshes.md.

    python tools/compare_all_meshes.py [--only="fsdp=8,data=2 tensor=4"]

Five steps of {DPO, KTO} x {full, LoRA}: the dense model where expert=1, the mixture of experts over
every shape, in float32.  Half an hour of CPU time, half of it XLA's; ``--only`` prints some meshes'
rows and writes nothing. Exits with status 1 where something differs by more than the tolerances
below, or a mesh is refused.
"""

from __future__ import annotations

import argparse
import itertools
import os
import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
os.environ["JAX_PLATFORMS"] = "cpu"
# Much is compiled and little computed: without optimizations that takes a third of the time.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
sys.path[:0] = [str(ROOT), str(ROOT / "tests/training")]

import jax
import jaxlib
import numpy as np
import tiny_runs

from align_jax.parallel.mesh import AXES
from align_jax.planner.collectives import read_collectives
from align_jax.planner.hlo import parse

DOCS = ROOT / "docs" / "meshes.md"
DEVICES, STEPS = 8, 5
LOSS, PARAMETERS = 1e-5, 5e-6  # relative, absolute
OBJECTIVES, RANKS = ("dpo", "kto"), (0, 2)
MOVING = ("all-to-all", "ragged-all-to-all", "collective-permute")  # what no step should need
HEAD = """# Every mesh gives what one device gives

`python tools/compare_all_meshes.py` (JAX {jax}, jaxlib {jaxlib}, {devices} simulated CPU
devices): {steps} steps of DPO and KTO, full and LoRA, over every shape of the mesh, against the
same steps on one device. Each figure is the largest of those four runs.

- *loss*: the largest relative difference of any step's loss; the bound is {loss:.0e}.
- *parameters*: the largest absolute difference of any trained parameter after the last step; the
  bound is {parameters:.0e}. The parameter that moves most moves by {least:.3f} to {most:.3f}.
- *dense* is a Llama, for shapes with expert=1; *experts* a Mixtral of eight experts with the
  load-balancing loss (its LoRA adapts the attention alone). All is float32. The optimizer is
  AdamW at a rate of 1e-2, the gradient clipped to norm 1, epsilon 1e-3: by the usual 1e-8 a
  gradient that is all rounding would decide the direction of a whole step.
- The last column names what the compiled steps of any of these runs have of the collectives that
  no step should need.
- With bfloat16 products what `tensor` adds up over devices is added in bfloat16, as it is moved: of
  independent parts the sum's rounding is 1.5, 1.9 and 2.4 times a single product's over 2, 4 and 8
  devices (by NumPy, 4096 terms). Sums in float32 would move twice the bytes.
- A shape that the code refused would stand here with its error.

"""
COLUMNS = (
    "mesh",
    "dense: loss",
    "parameters",
    "experts: loss",
    "parameters",
    "all-to-all, collective-permute",
)


def mesh_shapes() -> list[dict[str, int]]:
    """Return every way to write the number of devices as a product over the axes."""
    powers = [2**i for i in range(DEVICES.bit_length())]
    return [
        dict(zip(AXES, sizes))
        for sizes in itertools.product(powers, repeat=len(AXES))
        if np.prod(sizes) == DEVICES
    ]


def name_of(mesh: dict[str, int]) -> str:
    """Write a mesh as the documentation does: the axes that split something."""
    return " ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1)


def differences(one: tuple, many: tuple) -> tuple[float, float]:
    """Return the largest relative difference of the losses and the largest absolute one of the
    parameters."""
    losses = [[step["loss"] for step in run[0]] for run in (one, many)]
    parameters = jax.tree.map(lambda x, y: np.abs(x - y).max(), one[1], many[1])
    return float(np.abs(np.divide(*losses) - 1).max()), float(np.max(jax.tree.leaves(parameters)))


def travel(run: tuple, *arguments: Any) -> float:
    """Return how far the parameter that moves most has moved."""
    start = tiny_runs.weights_of(*arguments, options=())[1]
    return float(
        max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y).max(), run[1], start)))
    )


def compare(mesh: dict[str, int], model: str, alone: dict[tuple, tuple]) -> dict[str, Any]:
    """Run the four settings of a model over a mesh; return the largest differences and the moving
    collectives."""
    split, worst, moving = tuple((axis, size) for axis, size in mesh.items() if size > 1), [], set()
    for objective, rank in itertools.product(OBJECTIVES, RANKS):
        try:
            run = tiny_runs.steps_of(
                objective, split, rank=rank, devices=DEVICES, steps=STEPS, model=model, ahead=True
            )
        except ValueError as error:
            return {"refused": f"{objective} rank {rank}: {error}"}
        worst.append(differences(alone[objective, model, rank], run))
        moving |= {
            f"{one.kind} ({'+'.join(one.axes(mesh))})"
            for one in read_collectives(parse(run[2].as_text()))
            if one.kind in MOVING
        }
        print(
            f"  {objective} {model} rank {rank}: loss {worst[-1][0]:.1e}, parameters "
            f"{worst[-1][1]:.1e}",
            flush=True,
        )
    loss, parameters = np.max(worst, axis=0)  # where anything is NaN, NaN
    tiny_runs.steps_of.cache_clear()  # the compiled steps of 35 meshes would be held
    jax.clear_caches()
    return {"loss": loss, "parameters": parameters, "moving": moving}


def line(mesh: dict[str, int], results: dict[str, dict[str, Any]]) -> str:
    """Write one row of the table."""
    cells = []
    for model in tiny_runs.MODELS:
        found = results.get(model)
        if found is None:
            cells += ["", ""]
        elif "refused" in found:
            cells += ["refused", " ".join(found["refused"].split())]
        else:
            cells += [
                f"{found[name]:.1e}{'' if found[name] <= bound else ' **over**'}"
                for name, bound in (("loss", LOSS), ("parameters", PARAMETERS))
            ]
    moving = sorted(set().union(*(found.get("moving", ()) for found in results.values())))
    return f"| {' | '.join([name_of(mesh), *cells, ', '.join(moving) or 'none'])} |"


def main() -> None:
    """Compare what is asked for and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default="", help="meshes such as 'data=2 fsdp=4', separated by commas; none = all"
    )
    wanted = parser.parse_args().only
    meshes = [mesh for mesh in mesh_shapes() if not wanted or name_of(mesh) in wanted.split(",")]
    settings = list(itertools.product(OBJECTIVES, tiny_runs.MODELS, RANKS))
    alone = {
        (objective, model, rank): tiny_runs.steps_of(objective, rank=rank, model=model, steps=STEPS)
        for objective, model, rank in settings
    }
    moved = [travel(alone[setting], *setting) for setting in settings]
    table = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for mesh in meshes:
        print(name_of(mesh), flush=True)
        models = [model for model in tiny_runs.MODELS if model == "experts" or mesh["expert"] == 1]
        table.append(line(mesh, {model: compare(mesh, model, alone) for model in models}))
        print(table[-1], flush=True)
    head = HEAD.format(
        jax=jax.__version__,
        jaxlib=jaxlib.__version__,
        steps=STEPS,
        devices=DEVICES,
        loss=LOSS,
        parameters=PARAMETERS,
        least=min(moved),
        most=max(moved),
    )
    print("\n" + head + "\n".join(table))
    if not wanted:
        DOCS.write_text(head + "\n".join(table) + "\n")
    sys.exit(any("**over**" in row or "| refused |" in row for row in table))


if __name__ == "__main__":
    main()
