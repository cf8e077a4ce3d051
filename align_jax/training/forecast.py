# SPDX-License-Identifier: Apache-2.0
"""What a step will need on chips that need not be there: memory from the compiler, time from a roofline.

    lowered step ─ the real compiler ─┬─ memory by kind, used and free
                                      ├─ collectives: kind, mesh axes, bytes ─┐
    shapes ─ operations (flops.py) ───┼─ traffic with HBM ────────────────────┼─ seconds: overlapped ... exposed
    table of chips ───────────────────┴───────────────────────────────────────┘

The time is a bound and not a measurement: every unit at its peak.  ``overlapped`` hides all communication behind
computation, ``exposed`` hides none.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import math
import pathlib
import re
import tempfile
import time
from typing import Any

import jax
import numpy as np

from align_jax.core.schema import Batch
from align_jax.parallel import hlo
from align_jax.parallel.chips import GIB, Topology
from align_jax.parallel.collectives import Collective, read_collectives, summarise
from align_jax.training.flops import StepFlops

DIE_TO_DIE = 6.0  # TPU7x: between the two devices of a chip, in links (its data sheet)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of HBM on one device.

    Attributes:
        parameters, optimizer, reference, batch: arguments of the step.
        temporaries: activations, gradients, gathered weights: the compiler's peak.
        program: the code, and what the compiler's layouts add to the arguments.
        capacity: what a program may use.
        complete: false where the program does not fit: the compiler then says the total alone.
    """

    parameters: int
    optimizer: int
    reference: int
    batch: int
    temporaries: int
    program: int
    capacity: int
    complete: bool = True

    @property
    def kinds(self) -> dict[str, int]:
        """Bytes by kind."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[:6]}

    @property
    def used(self) -> int:
        """All of them."""
        return sum(self.kinds.values())

    @property
    def free(self) -> int:
        """What is left; negative where the step does not fit."""
        return self.capacity - self.used


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a step.

    Attributes:
        text: the optimised program; "" where it does not fit or cannot be written.
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
    """The forecast of one step on one topology."""

    topology: Topology
    mesh: Mapping[str, int]
    memory: Memory
    flops: StepFlops
    collectives: Sequence[Mapping[str, Any]]  # rows of collectives.summarise
    seconds: Mapping[str, float]  # compute, memory, interconnect, network: each alone, at its peak
    compile_seconds: float
    largest: Sequence[tuple[str, tuple[int, ...], int]]  # the largest arrays: type, shape, bytes

    @property
    def fits(self) -> bool:
        """Tell whether the step fits into HBM."""
        return self.memory.free >= 0

    @property
    def overlapped(self) -> float:
        """Seconds of a step whose communication hides behind computation."""
        return max(self.seconds.values())

    @property
    def exposed(self) -> float:
        """Seconds of a step that waits for all communication."""
        communication = self.seconds["interconnect"] + self.seconds["network"]
        return max(self.seconds["compute"], self.seconds["memory"]) + communication

    def mfu(self, seconds: float) -> float:
        """Return the model's operations a second over the chips' peak."""
        return self.flops.model / (seconds * len(self.topology.devices) * self.topology.chip.flops)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, for JSON."""
        return {
            "topology": self.topology.name, "chips": self.topology.chips, "mesh": dict(self.mesh), "fits": self.fits,
            "hbm": {**self.memory.kinds, "used": self.memory.used, "free": self.memory.free,
                    "capacity": self.memory.capacity},
            "flops": {**dataclasses.asdict(self.flops), "model": self.flops.model, "hardware": self.flops.hardware},
            "collectives": [{**row, "dtypes": dict(row["dtypes"])} for row in self.collectives],
            "seconds": {**self.seconds, "overlapped": self.overlapped, "exposed": self.exposed},
            "tokens_per_second": [self.flops.tokens / self.exposed, self.flops.tokens / self.overlapped]
            if self.overlapped else [],
            "mfu": [self.mfu(self.exposed), self.mfu(self.overlapped)] if self.overlapped else [],
            "compile_seconds": self.compile_seconds}


def compile_step(lowered: jax.stages.Lowered) -> Compiled:
    """Compile a step; a step that does not fit is a result, not an error.

    The program is read from XLA's dump: asking the executable for its text fails on some topologies.

    Raises:
        jax.errors.JaxRuntimeError: the compiler failed for another reason.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            needed = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", str(error))
            if needed is None:
                raise
            scale = 1024 ** ("KMGT".index(needed[2]) + 1)
            return Compiled("", {}, int(float(needed[1]) * scale), time.monotonic() - began)
        stats = compiled.memory_analysis()
        files = sorted(pathlib.Path(folder).glob("*after_optimizations.txt"), key=lambda file: -file.stat().st_size)
        text = files[0].read_text() if files else ""
    sizes = {name: getattr(stats, f"{name}_size_in_bytes")
             for name in ("argument", "output", "alias", "temp", "generated_code")}
    return Compiled(text, sizes, 0, time.monotonic() - began)


def tree_bytes(tree: Any) -> int:
    """Return the bytes that a tree of shapes with shardings takes on one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
               for leaf in jax.tree.leaves(tree))


def memory_of(compiled: Compiled, state: Any, frozen: Any, batch: Batch, capacity: int) -> Memory:
    """Divide a step's memory by kind.

    Args:
        compiled: from ``compile_step``.
        state, frozen, batch: the step's arguments, shapes with shardings.
        capacity: bytes of a device.
    """
    moving = state.get("reference", {})
    own = {"parameters": tree_bytes(state["params"]), "reference": tree_bytes(frozen) + tree_bytes(moving),
           "batch": tree_bytes(batch)}
    own["optimizer"] = tree_bytes(state) - own["parameters"] - tree_bytes(moving)
    arguments = sum(own.values())
    if not compiled.stats:
        return Memory(**own, temporaries=max(0, compiled.needed - arguments), program=0, capacity=capacity,
                      complete=False)
    stats = compiled.stats
    padding = max(0, stats["argument"] - arguments)
    return Memory(**own, temporaries=stats["temp"] + max(0, stats["output"] - stats["alias"]),
                  program=stats["generated_code"] + padding, capacity=capacity)


def bandwidth(collective: Collective, topology: Topology, devices: Sequence[Any]) -> float:
    """Return the bytes/s that each of a collective's devices receives.

    Within a slice a ring uses both directions of each torus axis that the group spans (one on an axis that does not
    close); between slices each device has its share of the data-centre network.

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
        links = 2.0  # to a neighbour, and the program sends to both sides
    if not spanned:
        links = DIE_TO_DIE
    return links * topology.chip.link


def roofline(program: hlo.Program | None, collectives: Sequence[Collective], flops: StepFlops, topology: Topology,
             devices: Sequence[Any]) -> dict[str, float]:
    """Return the seconds that computation, memory, interconnect and network take, each alone and at its peak."""
    chip = topology.chip
    seconds = {"compute": flops.hardware / (len(topology.devices) * chip.flops), "memory": 0.0, "interconnect": 0.0,
               "network": 0.0}
    if program is not None:
        seconds["memory"] = hlo.memory_traffic(program) / chip.hbm_bandwidth
    for collective in collectives:
        way = "network" if collective.network else "interconnect"
        seconds[way] += collective.count * collective.traffic / bandwidth(collective, topology, devices)
    return seconds


def forecast(lowered: jax.stages.Lowered, *, state: Any, frozen: Any, batch: Batch, flops: StepFlops,
             topology: Topology, mesh: jax.sharding.Mesh) -> Forecast:
    """Compile a lowered step for a topology and say what it needs.

    Args:
        lowered: from ``placement.lower_train_step`` on a mesh over the topology's devices.
        state, frozen, batch: its arguments, shapes with shardings.
        flops: from ``flops.step_flops``.
        topology: from ``chips.describe_topology``.
        mesh: the mesh.
    """
    compiled = compile_step(lowered)
    memory = memory_of(compiled, state, frozen, batch, topology.chip.hbm)
    program = hlo.parse(compiled.text) if compiled.text else None
    collectives = read_collectives(program) if program else []
    shapes = sorted(hlo.array_shapes(compiled.text).items(), key=lambda item: -item[1])
    return Forecast(
        topology, dict(mesh.shape), memory, flops, summarise(collectives, mesh.shape),
        roofline(program, collectives, flops, topology, list(mesh.devices.flat)), compiled.seconds,
        [(dtype, shape, size) for (dtype, shape), size in shapes[:50]])


def advice(found: Forecast, *, microbatches: int, remat: str, rows_a_device: float | int, adapter: bool) -> list[str]:
    """Say what to change in a config whose step does not fit, the cheapest first.

    Args:
        found: the forecast.
        microbatches, remat: of the config.
        rows_a_device: rows of a microbatch on one device.
        adapter: whether only an adapter is trained.
    """
    memory, short = found.memory, -found.memory.free / GIB
    lines = [f"needs {memory.used / GIB:.2f} GiB of {memory.capacity / GIB:.2f} GiB: {short:.2f} GiB too much"]
    static = memory.parameters + memory.optimizer + memory.reference
    if memory.temporaries > memory.capacity - static and static < memory.capacity:
        if rows_a_device >= 2:
            lines.append(f"config.microbatches={microbatches * 2}: half the activations at a time")
        if remat != "full":
            lines.append("config.model.remat=full: keep each layer's input only")
        if rows_a_device < 2:
            lines.append("config.mesh.sequence or config.mesh.tensor doubled: split a row's activations")
    if memory.reference > 0.2 * memory.capacity:
        lines.append("config.reference.mode=cached: no reference weights beside the policy")
    if memory.optimizer + memory.parameters > 0.5 * memory.capacity and not adapter:
        lines.append("config.optimizer.moment_dtype=bfloat16: two bytes less a parameter")
        lines.append("config.model.lora.rank=16: train an adapter; base and reference are one copy")
    if static > 0.8 * memory.capacity:
        least = math.ceil(found.topology.chips * memory.used / memory.capacity)
        lines.append(f"a larger slice: at least {least} chips, with mesh.fsdp=-1")
    return lines
