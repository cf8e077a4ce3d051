# SPDX-License-Identifier: Apache-2.0
"""What a program will need on chips that need not be there: memory from the compiler, time from a
roofline.

    lowered program ─ the real compiler ─┬─ memory by kind, used and free
                                         ├─ collectives: kind, mesh axes, bytes ─┐
    shapes ─ operations (flops.py) ──────┼─ traffic with HBM ────────────────────┼─ seconds: overlapped ... exposed
    table of chips ──────────────────────┴───────────────────────────────────────┘

The time is a bound and not a measurement: every unit at its peak.  ``overlapped`` hides all
communication behind computation, ``exposed`` hides none.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import pathlib
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from align_jax.parallel.chips import GIB, Topology
from align_jax.planner import hlo
from align_jax.planner.collectives import Collective, read_collectives, summarize
from align_jax.training.flops import StepFlops

DIE_TO_DIE = 6.0  # TPU7x: between the two devices of a chip, in links (its data sheet)


class Program(NamedTuple):
    """A program of a run, ready to be compiled.

    Attributes:
        name: "train", "eval", "prefill", ...
        lowered: for devices that need not be there.
        passed: its arguments, shapes with shardings.
        held: kind of memory ("parameters", "optimizer", ...) -> what of that kind lies on the
            devices while it runs, arguments or not.
        flops: of one run.
        least: by mesh axes, the least bytes that a device must receive (``minimum.least``).
        returned: what of ``held`` is its result and no argument.
        runs: how often an online run has it in each rollout.
        mesh: over whose axes it is split; None: the run's.
    """

    name: str
    lowered: jax.stages.Lowered
    passed: Any
    held: Mapping[str, Any]
    flops: StepFlops
    least: Mapping[str, float]
    returned: Any = ()
    runs: int = 1
    mesh: jax.sharding.Mesh | None = None


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of HBM on one device while a program runs.

    Attributes:
        kinds: what for -> bytes: of what the run holds ("parameters", "optimizer", "reference",
            "batch", ...); "temporaries", the compiler's peak of activations, gradients, gathered
            weights; "program", the code and what the compiler's layouts add to the arguments.
        capacity: what a program may use.
        complete: false where the program does not fit: the compiler then says the total alone.
    """

    kinds: Mapping[str, int]
    capacity: int
    complete: bool = True

    @property
    def used(self) -> int:
        """All of them."""
        return sum(self.kinds.values())

    @property
    def free(self) -> int:
        """What is left; negative where the program does not fit."""
        return self.capacity - self.used


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a step.

    Attributes:
        text: the optimized program; "" where it does not fit or cannot be written.
        stats: arguments, temporaries, output, alias and code in bytes; empty where it does not fit.
        needed: bytes that a step which does not fit would need.
        seconds: that the compilation took.
    """

    text: str
    stats: Mapping[str, int]
    needed: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Forecast:
    """The forecast of one program on one topology."""

    name: str
    runs: int
    topology: Topology
    mesh: Mapping[str, int]
    memory: Memory
    flops: StepFlops
    collectives: Sequence[Mapping[str, Any]]  # rows of collectives.summarize
    least: Mapping[str, float]  # by mesh axes: bytes that a device must receive
    seconds: Mapping[str, float]  # compute, memory, interconnect, network: each alone, at its peak
    compile_seconds: float
    largest: Sequence[tuple[str, tuple[int, ...], int]]  # the largest arrays: type, shape, bytes

    @property
    def fits(self) -> bool:
        """Tell whether the program fits into HBM, beside all that the run holds."""
        return self.memory.free >= 0

    @property
    def moved(self) -> float:
        """Bytes that a device receives in collectives."""
        return sum(row["bytes"] for row in self.collectives)

    @property
    def overlapped(self) -> float:
        """Seconds of a run whose communication hides behind computation."""
        return max(self.seconds.values())

    @property
    def exposed(self) -> float:
        """Seconds of a run that waits for all communication."""
        communication = self.seconds["interconnect"] + self.seconds["network"]
        return max(self.seconds["compute"], self.seconds["memory"]) + communication

    def mfu(self, seconds: float) -> float:
        """Return the model's operations a second over the chips' peak."""
        return self.flops.model / (seconds * len(self.topology.devices) * self.topology.chip.flops)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, for JSON."""
        return {
            "program": self.name,
            "runs": self.runs,
            "topology": self.topology.name,
            "chips": self.topology.chips,
            "mesh": dict(self.mesh),
            "fits": self.fits,
            "hbm": {
                **self.memory.kinds,
                "used": self.memory.used,
                "free": self.memory.free,
                "capacity": self.memory.capacity,
            },
            "flops": {
                **dataclasses.asdict(self.flops),
                "model": self.flops.model,
                "hardware": self.flops.hardware,
            },
            "collectives": [{**row, "dtypes": dict(row["dtypes"])} for row in self.collectives],
            "least": dict(self.least),
            "seconds": {**self.seconds, "overlapped": self.overlapped, "exposed": self.exposed},
            "tokens_per_second": [
                self.flops.tokens / self.exposed,
                self.flops.tokens / self.overlapped,
            ]
            if self.overlapped
            else [],
            "mfu": [self.mfu(self.exposed), self.mfu(self.overlapped)] if self.overlapped else [],
            "compile_seconds": self.compile_seconds,
        }


def compile_step(lowered: jax.stages.Lowered) -> Compiled:
    """Compile a step; a step that does not fit is a result, not an error.

    The program is read from XLA's dump: asking the executable for its text fails on some
    topologies.

    Raises:
        jax.errors.JaxRuntimeError: the compiler failed for another reason.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled = lowered.compile(
                compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
            )
        except jax.errors.JaxRuntimeError as error:
            needed = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", str(error))
            if needed is None:
                raise
            scale = 1024 ** ("KMGT".index(needed[2]) + 1)
            return Compiled("", {}, int(float(needed[1]) * scale), time.monotonic() - began)
        stats = compiled.memory_analysis()
        files = sorted(
            pathlib.Path(folder).glob("*after_optimizations.txt"),
            key=lambda file: -file.stat().st_size,
        )
        text = files[0].read_text() if files else ""
    sizes = {
        name: getattr(stats, f"{name}_size_in_bytes")
        for name in ("argument", "output", "alias", "temp", "generated_code")
    }
    return Compiled(text, sizes, 0, time.monotonic() - began)


def tree_bytes(tree: Any) -> int:
    """Return the bytes that a tree of shapes with shardings takes on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def memory_of(compiled: Compiled, program: Program, capacity: int) -> Memory:
    """Divide by kind the memory that is taken while a program runs.

    Args:
        compiled: from ``compile_step``.
        program: what was compiled.
        capacity: bytes of a device.
    """
    kinds = {kind: tree_bytes(tree) for kind, tree in program.held.items()}
    if not compiled.stats:
        return Memory(
            kinds | {"temporaries": max(0, compiled.needed - tree_bytes(program.passed))},
            capacity,
            False,
        )
    stats = compiled.stats
    kinds["temporaries"] = stats["temp"] + max(
        0, stats["output"] - stats["alias"] - tree_bytes(program.returned)
    )
    kinds["program"] = stats["generated_code"] + max(
        0, stats["argument"] - tree_bytes(program.passed)
    )
    return Memory(kinds, capacity)


def bandwidth(collective: Collective, topology: Topology, devices: Sequence[Any]) -> float:
    """Return the bytes/s that each of a collective's devices receives.

    Within a slice a ring uses both directions of each torus axis that the group spans (one on an
    axis that does not close); between slices each device has its share of the data-center network.

    Args:
        collective: the collective.
        topology: the topology.
        devices: the mesh's, in its order.
    """
    if collective.network:
        return topology.chip.network
    coordinates = np.asarray([devices[place].coords for place in collective.group])
    spanned = [axis for axis in range(len(topology.shape)) if len(set(coordinates[:, axis])) > 1]
    links = sum(2.0 if topology.wraps(axis) else 1.0 for axis in spanned)
    if collective.kind == "collective-permute":
        links = 2.0  # to a neighbor, and the program sends to both sides
    if not spanned:
        links = DIE_TO_DIE
    return links * topology.chip.link


def roofline(
    program: hlo.Program | None,
    collectives: Sequence[Collective],
    flops: StepFlops,
    topology: Topology,
    devices: Sequence[Any],
) -> dict[str, float]:
    """Return the seconds that computation, memory, interconnect and network take, each alone and at
    its peak."""
    chip = topology.chip
    seconds = {
        "compute": flops.hardware / (len(topology.devices) * chip.flops),
        "memory": 0.0,
        "interconnect": 0.0,
        "network": 0.0,
    }
    if program is not None:
        seconds["memory"] = hlo.memory_traffic(program) / chip.hbm_bandwidth
    for collective in collectives:
        way = "network" if collective.network else "interconnect"
        seconds[way] += (
            collective.count * collective.traffic / bandwidth(collective, topology, devices)
        )
    return seconds


def forecast(program: Program, topology: Topology, mesh: jax.sharding.Mesh) -> Forecast:
    """Compile a program for a topology and say what it needs.

    Args:
        program: lowered on a mesh over the topology's devices.
        topology: from ``chips.describe_topology``.
        mesh: the run's.
    """
    mesh = program.mesh or mesh
    compiled = compile_step(program.lowered)
    parsed = hlo.parse(compiled.text) if compiled.text else None
    collectives = read_collectives(parsed) if parsed else []
    shapes = sorted(hlo.array_shapes(compiled.text).items(), key=lambda item: -item[1])
    return Forecast(
        program.name,
        program.runs,
        topology,
        dict(mesh.shape),
        memory_of(compiled, program, topology.chip.hbm),
        program.flops,
        summarize(collectives, mesh.shape),
        program.least,
        roofline(parsed, collectives, program.flops, topology, list(mesh.devices.flat)),
        compiled.seconds,
        [(dtype, shape, size) for (dtype, shape), size in shapes[:50]],
    )


def advice(
    found: Forecast,
    *,
    microbatches: int,
    remat: str,
    rows_a_device: float | int,
    adapter: bool,
    eval_batch_size: int = 0,
) -> list[str]:
    """Say what to change in a config one of whose programs does not fit, the cheapest first.

    Args:
        found: the forecast.
        microbatches, remat: of the config.
        rows_a_device: rows of a microbatch on one device.
        adapter: whether only an adapter is trained.
        eval_batch_size: groups that are evaluated at once.
    """
    memory, short = found.memory, -found.memory.free / GIB
    kinds = collections.Counter(memory.kinds)
    lines = [
        f"{found.name} needs {memory.used / GIB:.2f} GiB of {memory.capacity / GIB:.2f} "
        f"GiB: {short:.2f} GiB too "
        "much"
    ]
    static = sum(kinds.values()) - sum(
        kinds[kind] for kind in ("batch", "cache", "temporaries", "program")
    )
    if memory.used - static > memory.capacity - static and static < memory.capacity:
        lines += _smaller(found.name, microbatches, remat, rows_a_device, eval_batch_size)
    if kinds["reference"] > 0.2 * memory.capacity:
        lines.append("config.reference.mode=cached: no reference weights beside the policy")
    if kinds["optimizer"] + kinds["parameters"] > 0.5 * memory.capacity and not adapter:
        lines.append("config.optimizer.moment_dtype=bfloat16: two bytes less a parameter")
        lines.append("config.model.lora.rank=16: train an adapter; base and reference are one copy")
    if static > 0.8 * memory.capacity:
        least = math.ceil(found.topology.chips * memory.used / memory.capacity)
        lines.append(f"a larger slice: at least {least} chips, with mesh.fsdp=-1")
    return lines


def _smaller(
    name: str, microbatches: int, remat: str, rows_a_device: float | int, eval_batch_size: int
) -> list[str]:
    """Say what makes a program's own arrays smaller."""
    if name in ("prefill", "decode"):
        return ["config.rollout.rows halved: fewer completions at a time, a smaller cache"]
    if name.startswith("reward "):
        return [f"config.rewards.{name.removeprefix('reward ')}.rows or .max_length halved"]
    if name == "eval":
        return [f"config.eval.batch_size={eval_batch_size // 2}: half the rows at a time"]
    lines = (
        [f"config.microbatches={microbatches * 2}: half the activations at a time"]
        if rows_a_device >= 2
        else []
    )
    if remat != "full" and name == "train":
        lines.append("config.model.remat=full: keep each layer's input only")
    if rows_a_device < 2:
        lines.append(
            "config.mesh.sequence or config.mesh.tensor doubled: split a row's activations"
        )
    return lines
