# SPDX-License-Identifier: Apache-2.0
"""The cost model: what a program needs on chips that need not be there.

    lowered program ─ the real compiler ─┬─ memory by kind, used and free
                                         ├─ collectives: kind, axes, bytes ─┐
    shapes ─ operations (flops.py) ──────┼─ traffic with HBM ───────────────┼─ seconds, overlapped
    table of chips ──────────────────────┴──────────────────────────────────┘  and exposed

The time is a bound and not a measurement: every unit at its peak.  ``overlapped`` hides all
communication behind computation, ``exposed`` hides none.
"""

from __future__ import annotations

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

from align_jax.planner import hlo
from align_jax.planner.collectives import Collective, read_collectives, summarize
from align_jax.planner.topology import Topology
from align_jax.training.flops import StepFlops

DIE_TO_DIE = 6.0  # TPU7x: between the two devices of a chip, in links (its data sheet)


class Program(NamedTuple):
    """A program of a run, ready to be compiled.

    Attributes:
        name: "train", "eval", "prefill", ...
        lowered: for devices that need not be there.
        arguments: shapes with shardings.
        resident: kind of memory ("parameters", "optimizer", ...) -> what of that kind lies on the
            devices while it runs, arguments or not.
        flops: of one run.
        lower_bound: by mesh axes, the least bytes that a device must receive
            (``communication.lower_bound``).
        outputs: what of ``resident`` is its result and no argument.
        runs: how often an online run has it in each rollout.
        mesh: over whose axes it is split; None: the run's.
    """

    name: str
    lowered: jax.stages.Lowered
    arguments: Any
    resident: Mapping[str, Any]
    flops: StepFlops
    lower_bound: Mapping[str, float]
    outputs: Any = ()
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
class CompiledProgram:
    """What the compiler made of a program.

    Attributes:
        text: the optimized program; "" where it does not fit or cannot be written.
        sizes: arguments, temporaries, output, alias and code in bytes; empty where it does not fit.
        needed: bytes that a program which does not fit would need.
        seconds: that the compilation took.
    """

    text: str
    sizes: Mapping[str, int]
    needed: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class CostEstimate:
    """What one program needs on one topology."""

    name: str
    runs: int
    topology: Topology
    mesh: Mapping[str, int]
    memory: Memory
    flops: StepFlops
    collectives: Sequence[Mapping[str, Any]]  # rows of collectives.summarize
    lower_bound: Mapping[str, float]  # by mesh axes: bytes that a device must receive
    seconds: Mapping[str, float]  # compute, memory, interconnect, network: each alone, at its peak
    compile_seconds: float
    largest: Sequence[tuple[str, tuple[int, ...], int]]  # the largest arrays: type, shape, bytes

    @property
    def fits(self) -> bool:
        """Tell whether the program fits into HBM, beside all that the run holds."""
        return self.memory.free >= 0

    @property
    def received(self) -> float:
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
        times = [self.exposed, self.overlapped] if self.overlapped else []
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
            "least": dict(self.lower_bound),
            "seconds": {**self.seconds, "overlapped": self.overlapped, "exposed": self.exposed},
            "tokens_per_second": [self.flops.tokens / seconds for seconds in times],
            "mfu": [self.mfu(seconds) for seconds in times],
            "compile_seconds": self.compile_seconds,
        }


def compile_program(lowered: jax.stages.Lowered) -> CompiledProgram:
    """Compile a program; one that does not fit is a result, not an error.

    The program is read from XLA's dump: asking the executable for its text fails on some
    topologies.

    Raises:
        jax.errors.JaxRuntimeError: the compiler failed for another reason.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            needed = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", str(error))
            if needed is None:
                raise
            scale = 1024 ** ("KMGT".index(needed[2]) + 1)
            seconds = time.monotonic() - began
            return CompiledProgram("", {}, int(float(needed[1]) * scale), seconds)
        files = list(pathlib.Path(folder).glob("*after_optimizations.txt"))
        # the largest: small helpers are dumped beside the program
        text = max((file.read_text() for file in files), key=len, default="")
    analysis = compiled.memory_analysis()
    kinds = ("argument", "output", "alias", "temp", "generated_code")
    sizes = {kind: getattr(analysis, f"{kind}_size_in_bytes") for kind in kinds}
    return CompiledProgram(text, sizes, 0, time.monotonic() - began)


def tree_bytes(tree: Any) -> int:
    """Return the bytes that a tree of shapes with shardings takes on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def memory_of(compiled: CompiledProgram, program: Program, capacity: int) -> Memory:
    """Divide by kind the memory that is taken while a program runs.

    Args:
        compiled: from ``compile_program``.
        program: what was compiled.
        capacity: bytes of a device.
    """
    kinds = {kind: tree_bytes(tree) for kind, tree in program.resident.items()}
    arguments, sizes = tree_bytes(program.arguments), compiled.sizes
    if not sizes:
        temporaries = max(0, compiled.needed - arguments)
        return Memory(kinds | {"temporaries": temporaries}, capacity, complete=False)
    # results that alias no argument need room of their own, those counted as resident apart
    new = sizes["output"] - sizes["alias"] - tree_bytes(program.outputs)
    kinds["temporaries"] = sizes["temp"] + max(0, new)
    # the compiler's layouts may pad the arguments
    kinds["program"] = sizes["generated_code"] + max(0, sizes["argument"] - arguments)
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
    coordinates = np.asarray([devices[index].coords for index in collective.group])
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
        path = "network" if collective.network else "interconnect"
        received = collective.count * collective.traffic
        seconds[path] += received / bandwidth(collective, topology, devices)
    return seconds


def estimate(program: Program, topology: Topology, mesh: jax.sharding.Mesh) -> CostEstimate:
    """Compile a program for a topology and say what it needs.

    Args:
        program: lowered on a mesh over the topology's devices.
        topology: from ``topology.describe_topology``.
        mesh: the run's.
    """
    mesh = program.mesh or mesh
    compiled = compile_program(program.lowered)
    parsed = hlo.parse(compiled.text) if compiled.text else None
    collectives = read_collectives(parsed) if parsed else []
    shapes = sorted(hlo.array_shapes(compiled.text).items(), key=lambda item: -item[1])
    return CostEstimate(
        program.name,
        program.runs,
        topology,
        dict(mesh.shape),
        memory_of(compiled, program, topology.chip.hbm),
        program.flops,
        summarize(collectives, mesh.shape),
        program.lower_bound,
        roofline(parsed, collectives, program.flops, topology, list(mesh.devices.flat)),
        compiled.seconds,
        [(dtype, shape, size) for (dtype, shape), size in shapes[:50]],
    )
