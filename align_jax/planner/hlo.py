# SPDX-License-Identifier: Apache-2.0
"""Read a compiled program's text: its computations, how often one step runs each, and the memory
traffic.

The text names each operation once, but a scanned layer runs it L times: a computation's count is
the sum over its callers of their counts, times the trip count where it is a loop's body.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_BITS = {"pred": 8, "bf16": 16, "c64": 64, "f8e4m3fn": 8, "f8e5m2": 8}
_BITS |= {f"f{bits}": bits for bits in (16, 32, 64)}
_BITS |= {f"{sign}{bits}": bits for sign in "su" for bits in (4, 8, 16, 32, 64)}
# bf16[2,3]{1,0:T(8,128)S(1)}: type, sizes, and the layout with its memory space
ARRAY = re.compile(rf"\b({'|'.join(_BITS)})\[([\d,]*)\](\{{[^}}]*\}})?")
# ENTRY %main.42 (p: f32[4]) -> f32[8] {
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# ROOT %add.1 = f32[4]{0} add(%a, %b), metadata={...}
_OPERATION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_CALLED_LIST = re.compile(r"\b(?:called_computations|branch_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r"known_trip_count\W+n\W+(\d+)")
# Names for what others produce, control flow whose computations are counted themselves, and halves
# of an asynchronous operation whose other half is counted.
_NO_TRAFFIC = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all "
    "partition-id replica-id iota opt-barrier async-start async-update async-done copy-done".split()
)
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # -> which operand is written into the first


class Operation(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        """The operands' names."""
        # up to the parenthesis that closes the list: attributes behind it name computations
        depth, end = 1, 0
        while depth and end < len(self.rest):
            depth += (self.rest[end] == "(") - (self.rest[end] == ")")
            end += 1
        return re.findall(r"%([\w.\-]+)", self.rest[:end])

    def calls(self) -> Iterator[tuple[str, str]]:
        """Yield (role, computation) for every computation that it names."""
        for role, name in _CALLED.findall(self.rest):
            yield role, name
        for names in _CALLED_LIST.findall(self.rest):
            for name in names.split(","):
                yield "branch", name.strip().lstrip("%")


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled module.

    Attributes:
        computations: name -> its operations.
        counts: name -> how often one run of the program runs it (branches of a conditional count as
            run).
    """

    computations: Mapping[str, list[Operation]]
    counts: Mapping[str, int]


def array_bytes(text: str) -> int:
    """Sum the bytes of the arrays that a shape's text names.

    >>> array_bytes("(bf16[2,3]{1,0}, f32[])")
    16
    """
    return sum(_size(dtype, dims) for dtype, dims, _ in ARRAY.findall(text))


def array_shapes(text: str) -> dict[tuple[str, tuple[int, ...]], int]:
    """Return every array type of a program's text and its bytes on one device."""
    return {
        (dtype, tuple(int(size) for size in dims.split(",")) if dims else ()): _size(dtype, dims)
        for dtype, dims in {found[:2] for found in ARRAY.findall(text)}
    }


def parse(text: str) -> Program:
    """Parse a module.

    Args:
        text: the optimized HLO module (``compiled.as_text()``, or XLA's dump
            ``*after_optimizations.txt``).

    Raises:
        ValueError: the text has no ENTRY computation.
    """
    computations: dict[str, list[Operation]] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = None if line.startswith(" ") else _HEADER.match(line)
        if header:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        # until the next header: a kernel's settings may hold lines of braces
        elif current is not None:
            operation = _OPERATION.match(re.sub(r"/\*.*?\*/", "", line))
            if operation:
                current.append(Operation(*operation.groups()))
    if not entry:
        raise ValueError("not the text of an HLO module: it has no ENTRY computation")
    return Program(computations, _counts(computations, entry))


def memory_traffic(program: Program) -> float:
    """Return the bytes that one step moves between HBM and the cores of one chip, as the program's
    text has them.

    Each operation reads its operands and writes its result once; what stays in the cores' own
    memory (``S(1)``) is left out, and of an array that is only sliced, or updated in place, the
    slice counts.  Kernels written by hand count their operands once, however often their blocks are
    read again.
    """
    # The operations inside a fusion, or a reduction's scalar function, move nothing themselves.
    fused = set()
    for operations in program.computations.values():
        for operation in operations:
            if operation.opcode != "call" and not operation.opcode.startswith("async"):
                fused |= {n for role, n in operation.calls() if role in ("calls", "to_apply")}
    total = 0.0
    for name, operations in program.computations.items():
        if name in fused or not program.counts.get(name):
            continue
        shapes = {operation.name: operation.shape for operation in operations}
        total += program.counts[name] * sum(
            _traffic(operation, shapes, program)
            for operation in operations
            if operation.opcode not in _NO_TRAFFIC
        )
    return total


def _size(dtype: str, dims: str) -> int:
    return (math.prod(map(int, dims.split(","))) if dims else 1) * _BITS[dtype] // 8


def _hbm_bytes(shape: str) -> int:
    return sum(
        _size(dtype, dims) for dtype, dims, layout in ARRAY.findall(shape) if "S(1)" not in layout
    )


def _traffic(operation: Operation, shapes: Mapping[str, str], program: Program) -> int:
    operands = operation.operands
    read = [_hbm_bytes(shapes.get(name, "")) for name in operands]
    written = _hbm_bytes(operation.shape)
    if operation.opcode == "dynamic-slice":
        return 2 * written  # the slice is read and written, whatever it is a slice of
    if operation.opcode in _IN_PLACE:
        return 2 * read[_IN_PLACE[operation.opcode]] if len(read) > 1 else written
    body = _body(operation, program.computations)
    if operation.opcode != "fusion" or not body:
        return sum(read) + written
    for position, size in _sliced(body, program.computations).items():
        if position < len(read):
            read[position] = min(read[position], size)
    return sum(read) + max(0, written - _not_written(body))


def _body(
    operation: Operation, computations: Mapping[str, list[Operation]]
) -> list[Operation] | None:
    return next(
        (computations.get(name) for role, name in operation.calls() if role == "calls"), None
    )


def _sliced(body: list[Operation], computations: Mapping[str, list[Operation]]) -> dict[int, int]:
    """Find a fusion's parameters of which only slices are read, or which are written over.

    A scanned layer's weights are such: the fusion takes the stacked array of all layers, and
    slices it.  A fusion within it may be what slices.

    Returns:
        The parameter's number -> bytes of these slices.
    """
    uses: dict[str, list[Operation]] = collections.defaultdict(list)
    for operation in body:
        for name in operation.operands:
            uses[name].append(operation)

    def slice_bytes(use: Operation, name: str) -> int | None:
        if use.opcode == "dynamic-slice":
            return array_bytes(use.shape)
        position = use.operands.index(name)
        if use.opcode in _IN_PLACE and position == 0:
            return 0
        inner = _body(use, computations) if use.opcode == "fusion" else None
        return _sliced(inner, computations).get(position) if inner else None

    found = {}
    for operation in body:
        sizes = [slice_bytes(use, operation.name) for use in uses[operation.name]]
        number = re.match(r"(\d+)", operation.rest)
        if operation.opcode == "parameter" and number and sizes and None not in sizes:
            found[int(number[1])] = sum(size or 0 for size in sizes)
    return found


def _not_written(body: list[Operation]) -> int:
    """Count the bytes of a fusion's results that stay as they were: updates in place write only a
    part."""
    named = {operation.name: operation for operation in body}
    total = 0
    for operation in body:
        position = _IN_PLACE.get(operation.opcode)
        if position is not None and len(operation.operands) > position:
            part = named.get(operation.operands[position])
            total += array_bytes(operation.shape) - (array_bytes(part.shape) if part else 0)
    return total


def _counts(computations: Mapping[str, list[Operation]], entry: str) -> dict[str, int]:
    """Count how often one run of the program runs each computation."""
    callers: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
    for computation, operations in computations.items():
        for operation in operations:
            if operation.opcode in ("async-update", "async-done"):
                continue  # they name the computation that their async-start has run
            trips = _trips(operation, computations) if operation.opcode == "while" else 1
            for role, called in operation.calls():
                callers[called].append((computation, trips if role == "body" else 1))
    counts = {entry: 1}

    def count(name: str) -> int:
        if name not in counts:
            counts[name] = sum(count(caller) * times for caller, times in callers[name])
        return counts[name]

    for computation in computations:
        count(computation)
    return counts


def _trips(loop: Operation, computations: Mapping[str, list[Operation]]) -> int:
    """Read how often a loop's body runs; 1 where the data decides.

    The compiler says it of most loops.  Of the others the condition compares a counter, an element
    of the loop's tuple, with a constant, and the body adds a constant to it.
    """
    known = _TRIPS.search(loop.rest)
    if known:
        return int(known[1])
    called = {
        role: {operation.name: operation for operation in computations.get(name, ())}
        for role, name in loop.calls()
    }
    condition = called.get("condition", {})
    compare = next((one for one in condition.values() if one.opcode == "compare"), None)
    if compare is None or "direction=LT" not in compare.rest:
        return 1
    counter, limit = (condition.get(name) for name in compare.operands[:2])
    index = re.search(r"index=(\d+)", counter.rest if counter else "")
    if index is None or limit is None or limit.opcode != "constant":
        return 1
    return -(-_constant(limit) // _increment(called.get("body", {}), int(index[1])))


def _increment(body: Mapping[str, Operation], index: int) -> int:
    """Return by how much a loop's body raises its counter (an unrolled loop's by more than one)."""
    result = next((one for one in reversed(list(body.values())) if one.opcode == "tuple"), None)
    names = result.operands if result else []
    update = body.get(names[index]) if index < len(names) else None
    if update is None or update.opcode != "add":
        return 1
    operands = [body[name] for name in update.operands if name in body]
    return next((_constant(one) for one in operands if one.opcode == "constant"), 1)


def _constant(operation: Operation) -> int:
    number = re.match(r"(\d+)\)", operation.rest)
    return max(1, int(number[1])) if number else 1
