# SPDX-License-Identifier: Apache-2.0
"""Which collectives a compiled program runs: how often, over which mesh axes, with how many bytes.

Between slices XLA reduces hierarchically: within each slice over the interconnect, then a shard
between slices through the hosts, which the text has as sends and receives.

TPU programs hold several copies of an asynchronous collective, in the fusions that start it, carry
it on beside other work and end it; the start alone counts.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from align_jax.planner.hlo import ARRAY, Operation, Program, array_bytes

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        kind: one of ``KINDS``.
        group: the devices of the first group, as positions in the program's device assignment.
        payload: bytes of the whole array on one device: gathered, to be reduced, or sent.
        count: how often one step runs it; loops counted.
        operation: where it comes from in the source (XLA's ``op_name``).
        dtype: of its (first) array.
        network: it runs between slices, over the data-center network.
    """

    kind: str
    group: tuple[int, ...]
    payload: int
    count: int
    operation: str
    dtype: str = ""
    network: bool = False

    @property
    def traffic(self) -> float:
        """Bytes that each chip receives when it runs once, by the bandwidth-optimal ring
        algorithm."""
        share = (len(self.group) - 1) / len(self.group)
        shares = {"all-reduce": 2 * share, "collective-permute": 1.0}
        return shares.get(self.kind, share) * self.payload

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """Name the mesh axes that the group spans.

        Args:
            mesh: axis -> size, in the mesh's order (``jax.sharding.Mesh.shape``).
        """
        sizes = list(mesh.values())
        by_axis = zip(*[_unravel(device, sizes) for device in self.group])
        return tuple(axis for axis, indices in zip(mesh, by_axis) if len(set(indices)) > 1)


def read_collectives(program: Program) -> list[Collective]:
    """List a compiled program's collectives, each with how often one step runs it.

    Args:
        program: from ``hlo.parse``.

    Returns:
        Collectives over more than one device.

    Raises:
        ValueError: a replica group has a form that this reader does not know.
    """
    found = []
    for computation, operations in program.computations.items():
        if not program.counts[computation] or _carries_on(computation, operations):
            continue
        for operation in operations:
            count = program.counts[computation]
            if operation.opcode == "recv" and "xla_megascale_runtime" in operation.rest:
                found.append(_between_slices(computation, operation, count))
            elif operation.opcode.removesuffix("-start") in KINDS:
                found.append(_within_slice(computation, operation, count))
    return [collective for collective in found if len(collective.group) > 1]


def _carries_on(computation: str, operations: Sequence[Operation]) -> bool:
    """Tell whether a fusion goes on with, or ends, a collective that another one has started."""
    return computation.startswith("async_collective_fusion") or any(
        'custom_call_target="AsyncCollectiveDone"' in operation.rest for operation in operations
    )


def summarize(collectives: Sequence[Collective], mesh: Mapping[str, int]) -> list[dict[str, Any]]:
    """Sum the collectives by kind and mesh axes.

    Returns:
        Rows ``{"kind", "axes", "count", "bytes", "dtypes"}``, the most bytes first; ``bytes`` is
        what one chip receives in a step.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for collective in collectives:
        axes = "+".join(collective.axes(mesh))
        key = (collective.kind, axes)
        if key not in rows:
            rows[key] = {"kind": collective.kind, "axes": axes, "count": 0, "bytes": 0.0}
            rows[key]["dtypes"] = collections.Counter()
        row = rows[key]
        row["count"] += collective.count
        row["bytes"] += collective.count * collective.traffic
        row["dtypes"][collective.dtype] += collective.count
    return sorted(rows.values(), key=lambda row: -row["bytes"])


def _within_slice(computation: str, operation: Operation, count: int) -> Collective:
    kind = operation.opcode.removesuffix("-start")
    arrays = ARRAY.findall(operation.shape)
    sizes = [array_bytes(f"{dtype}[{dims}]") for dtype, dims, _ in arrays]
    group, payload = _group(operation.rest), sum(sizes)
    if operation.opcode.endswith("-start") and operation.shape.startswith("("):
        # The shape lists operands and results: of a gather and a permute the largest is the whole,
        # of the others both halves are equal.
        payload = max(sizes) if kind in ("all-gather", "collective-permute") else payload // 2
    if kind == "all-reduce" and "all-reduce-scatter" in computation:
        kind = "reduce-scatter"  # how the TPU compiler writes one: an all-reduce and a slice, fused
    elif kind == "reduce-scatter":
        payload *= len(group)  # the text has the result's shape; the whole is what goes in
    name = re.search(r'op_name="([^"]*)"', operation.rest)
    dtype = arrays[0][0] if arrays else ""
    return Collective(kind, group, payload, count, name[1] if name else "", dtype)


def _between_slices(computation: str, operation: Operation, count: int) -> Collective:
    """Read a collective between slices: the program hands the host an array and says what is to be
    done."""
    kind = re.search(r'_xla_host_transfer_rendezvous="([a-z\-]+)', operation.rest)
    target = re.search(r'_xla_megascale_target="\{([\d,:]+)\}x\{([\d,:]+)\}', operation.rest)
    dtype = ARRAY.search(operation.shape)
    if not kind or not target or not dtype:
        raise ValueError(
            "a transfer between slices in a form that this reader does not know: "
            f"{operation.rest[:300]!r}"
        )
    slices, devices = (_span(part) for part in target.groups())
    return Collective(
        kind[1].rstrip("-"),
        tuple(index * devices for index in range(slices)),  # the first device of each slice
        array_bytes(operation.shape.split("u32[]")[0]),  # what follows is the transfer's handle
        count,
        f"between slices in {computation}",
        dtype[1],
        network=True,
    )


def _span(text: str) -> int:
    """Return how many numbers ``1,2`` or ``0:3`` (both ends included) names."""
    return sum(int(part.split(":")[-1]) - int(part.split(":")[0]) + 1 for part in text.split(","))


def _group(attributes: str) -> tuple[int, ...]:
    """Return the first replica group, in whichever of XLA's spellings.

    XLA's operation semantics explains them:

        source_target_pairs={{0,1},{1,0}}                        pairs
        replica_groups={{0,2},{1,3}}                             lists
        replica_groups=[2,4]<=[4,2]T(1,0)                        2 groups of 4, cut from the devices
                                                                 reshaped to [4,2] and transposed
        replica_groups=mesh['a'=4,'b'=2] {'a'}                   over named axes of a mesh
        replica_groups=mesh['a'=2,'b'=2], device_ids=(...) {'b'} the same, its devices in this order
    """
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
    if pairs:
        return (int(pairs[1]), int(pairs[2])) if pairs[1] != pairs[2] else (int(pairs[1]),)
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return tuple(int(device) for device in listed[1].split(","))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if iota:
        return tuple(_device_at(index, iota[3]) for index in range(int(iota[2])))
    named = re.search(
        r"replica_groups=@?mesh\w*\[([^\]]*)\](?:, device_ids=\((.*?\)?)\))?\s*\{([^}]*)\}",
        attributes,
    )
    if named:
        return tuple(_device_at(index, named[2]) for index in _named_group(named[1], named[3]))
    if "replica_groups={}" in attributes:
        raise ValueError("replica_groups={} (all devices): compile for a mesh, not for replicas")
    raise ValueError(
        f"replica groups in a form that this reader does not know: {attributes[:300]!r}"
    )


def _named_group(mesh: str, axes: str) -> tuple[int, ...]:
    """Return the positions of the group that holds the first device: all steps along the axes.

    Args:
        mesh: ``'a'=4,'b'=2``, row-major.
        axes: ``'b'``, or a factor of an axis, ``'a':(2)2``: of a = 2 x 2 the second.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", mesh)}
    strides, stride = {}, 1
    for name in reversed(sizes):
        strides[name], stride = stride, stride * sizes[name]
    members = [0]
    for name, before, part in re.findall(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?", axes):
        size = int(part) if part else sizes[name]
        # the factors behind this one are passed over in each step
        step = strides[name] * (sizes[name] // (int(before) * size) if part else 1)
        members = [member + step * i for member in members for i in range(size)]
    return tuple(members)


def _unravel(index: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the index along each axis of a row-major index."""
    indices = []
    for size in reversed(sizes):
        index, remainder = divmod(index, size)
        indices.append(remainder)
    return tuple(reversed(indices))


def _device_at(index: int, order: str | None) -> int:
    """Return the device at an index of a list of devices.

    Args:
        index: in the list.
        order: the list: ``0,2,1,3``; or ``[2,4]T(1,0)``, all devices in a row, reshaped to [2,4]
            and transposed; None: the devices in a row.
    """
    if not order:
        return index
    match = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order)
    if not match:
        return int(order.split(",")[index])
    sizes = [int(size) for size in match[1].split(",")]
    axes = [int(axis) for axis in match[2].split(",")] if match[2] else list(range(len(sizes)))
    # Back through the transposition: the index along transposed axis i is that along axes[i].
    original = dict(zip(axes, _unravel(index, [sizes[axis] for axis in axes])))
    flat = 0
    for axis, size in enumerate(sizes):
        flat = flat * size + original[axis]
    return flat
