# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: safetensors read slice by slice and written tensor by tensor, in one file or in
shards.

Writing goes through a header made beforehand and one tensor at a time, so that neither direction
ever holds a model.

References:
    The safetensors format: 8 bytes of header length, a JSON header, the tensors' bytes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes  # registers bfloat16 with numpy, which safetensors' slices need
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from align_jax.core.files import SAFETENSORS, json_kind, looks_like, read_json, signature
from align_jax.interop import codes

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
CHUNK_NUMBERS = 1 << 24  # what is counted or compared of a tensor at once
MOST = 10  # tensors of a kind that a message names
NO_FLOATS = f"of a type that is no weight's ({', '.join(DTYPES)}; quantized ones are not read)"
CODES = {dtype: code for code, dtype in DTYPES.items()}
# of either kind of checkpoint, variants (model.fp16) and Mistral's own too; what an export does not
# write of them is of an older one
WEIGHTS = (
    r"(model|adapter_model|pytorch_model|consolidated)(\.\w+)?(-\d+-of-\d+)?"
    r"\.(safetensors|bin|pth)(\.index(\.\w+)?\.json)?"
)


class Reader:
    """The tensors of a checkpoint folder, read by slices; nothing is held between reads."""

    def __init__(
        self, folder: str, single: str = SINGLE, quantization: Mapping[str, Any] | None = None
    ):
        """Open the folder's index, or its single file.

        Args:
            folder: where they lie.
            single: the file's name; the index's is that with ``.index.json``.
            quantization: the ``quantization_config`` of a checkpoint that has codes for weights;
                of them bfloat16 is said.  Their parts are no tensors of their own.

        Raises:
            FileNotFoundError: neither is there, or a shard of the index is missing.
            ValueError: a file is damaged; both are there; a tensor is not in the file that the
                index says, or in several that differ; scales that do not fit their codes.
        """
        self._stack = contextlib.ExitStack()
        self._folder = folder
        self._unusable: dict[str, np.dtype] = {}  # tensors not finite -> in which type they are not
        index, where = _indexed(folder, single)
        paths = sorted(set(where.values())) or [os.path.join(folder, single)]
        opened = {path: self._stack.enter_context(_open(path)) for path in paths}
        holders: dict[str, list[str]] = {}
        for path, handle in opened.items():
            for name in handle.keys():
                holders.setdefault(name, []).append(path)
        lost = [
            f"{name} (in {os.path.basename(path)})"
            for name, path in where.items()
            if path not in holders.get(name, ())
        ]
        # of which transformers reads the last, whatever the index says
        twice = [name for name, paths in holders.items() if not _alike(name, paths)]
        if lost or twice:
            wrong = {
                "in the index, not in its file": lost,
                "in several files, with other numbers": twice,
            }
            raise ValueError(f"{index} and its files disagree:\n{listed(wrong)}")
        self._where = {name: opened[where.get(name, paths[0])] for name, paths in holders.items()}
        files = {name: where.get(name, paths[0]) for name in holders}
        self._coded = codes.take(quantization, self._where, files) if quantization else {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    @property
    def names(self) -> set[str]:
        """The tensors' names."""
        return self._where.keys() | self._coded.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        if name in self._coded:
            return self._coded[name].shape
        return tuple(self._where[name].get_slice(name).get_shape())

    def code(self, name: str) -> str:
        """Return a tensor's type as the file names it; ``DTYPES`` has those of weights."""
        if name in self._coded:
            return "BF16"
        return self._where[name].get_slice(name).get_dtype()

    def dtype(self, name: str) -> np.dtype:
        """Return the type of a tensor of weights."""
        return DTYPES[self.code(name)]

    def read(
        self, name: str, index: Sequence[slice] = (), dtype: np.dtype | None = None
    ) -> np.ndarray:
        """Read part of a tensor of weights; ``check_finite`` tells of what is no number in it.

        Args:
            name: the tensor's.
            index: which part; () = all.
            dtype: what it is to be used as; None: as stored.
        """
        part = self._part(name, index)
        if name in self._coded and dtype is None:
            part = part.astype(self.dtype(name))
        if not is_finite(part):
            self._unusable[name] = self.dtype(name)
        elif dtype is not None and _largest(dtype) < _largest(part.dtype):
            with np.errstate(over="ignore"):
                part = part.astype(dtype)
            if not is_finite(part):
                self._unusable.setdefault(name, dtype)
        return part

    def check_finite(self) -> None:
        """Refuse what was read if any of it was not finite.

        Raises:
            ValueError: naming the tensors, and how many of their numbers.
        """
        bad = sorted(self._unusable)
        if bad:
            counted = [self._count(name) for name in bad[:MOST]] + bad[MOST:]
            raise ValueError(
                f"{self._folder}: weights that are no numbers:\n{listed({'not finite': counted})}"
            )

    def equal(self, one: str, other: str) -> bool:
        """Tell whether two tensors hold the same."""
        if (self.shape(one), self.code(one)) != (self.shape(other), self.code(other)):
            return False
        pairs = zip(self._blocks(one), self._blocks(other))
        return all(a.tobytes() == b.tobytes() for a, b in pairs)

    def _part(self, name: str, index: Sequence[slice]) -> np.ndarray:
        """Read part of a tensor, its numbers made from codes and scales where it has these."""
        if name in self._coded:
            return self._coded[name].read(index)
        return self._where[name].get_slice(name)[tuple(index) or ...]

    def _blocks(self, name: str) -> Iterator[np.ndarray]:
        """Read a tensor some rows at a time."""
        shape = self.shape(name)
        if not shape:
            yield self._part(name, ())
            return
        rows = max(1, CHUNK_NUMBERS // max(math.prod(shape[1:]), 1))
        for start in range(0, shape[0], rows):
            yield self._part(name, (slice(start, min(start + rows, shape[0])),))

    def _count(self, name: str) -> str:
        """Say how many of a tensor's numbers are not finite."""
        size, dtype, count = math.prod(self.shape(name)), self._unusable[name], 0
        with np.errstate(over="ignore"):
            for block in self._blocks(name):
                count += int(np.sum(~np.isfinite(block.astype(dtype))))
        why = "NaN or infinite" if dtype == self.dtype(name) else f"beyond {dtype}'s range"
        return f"{name}: {count} of {size} {why}"


def is_finite(array: np.ndarray) -> bool:
    """Tell whether no number of a float array is NaN or infinite; fast, and without a copy.

    Their bits are compared as integers: with a sign, the largest are those of infinity and of the
    NaN with no sign; without, those of their negatives.
    """
    signed, unsigned = f"i{array.dtype.itemsize}", f"u{array.dtype.itemsize}"
    infinity, negative = np.asarray([np.inf, -np.inf], array.dtype)[:, None]
    return bool(
        array.view(signed).max(initial=0) < infinity.view(signed)[0]
        and array.view(unsigned).max(initial=0) < negative.view(unsigned)[0]
    )


def _alike(name: str, paths: Sequence[str]) -> bool:
    """Tell whether all of these files hold the same under a tensor's name."""
    if len(paths) == 1:
        return True
    first, *others = (codes.mapped(path, name) for path in paths)
    return all(one.dtype == first.dtype and np.array_equal(one, first) for one in others)


def _largest(dtype: np.dtype) -> float:
    return float(ml_dtypes.finfo(dtype).max)


def _open(path: str) -> Any:
    """Open a safetensors file.

    Raises:
        ValueError: it is none, or not a whole one.
    """
    try:
        return safe_open(path, "np")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a whole safetensors file: {_fault(path, error)}") from error


def _fault(path: str, error: Exception) -> str:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(512)
        header = int.from_bytes(start[:8], "little")
        kind = signature(start)
        if kind and kind != SAFETENSORS:
            return f"it is {kind}"
        if size < 8 or header > size - 8:
            return (
                f"its first 8 bytes tell of a header of {header:,} bytes, and it has {size:,} in "
                f"all; it is {looks_like(path)}"
            )
        file.seek(8)
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
            ends = [
                entry["data_offsets"][1]
                for name, entry in json.loads(file.read(header)).items()
                if name != "__metadata__"
            ]
            if max(ends, default=0) != size - 8 - header:
                return (
                    f"its header tells of {max(ends, default=0):,} bytes of tensors, and it has "
                    f"{size - 8 - header:,} (a copy that was broken off?)"
                )
    return str(error)


def _indexed(folder: str, single: str) -> tuple[str, dict[str, str]]:
    """Read the index, if there is one: its path, and tensor -> path of the file that holds it."""
    path, index = os.path.join(folder, single), os.path.join(folder, f"{single}.index.json")
    if not os.path.exists(index):
        if not os.path.exists(path):
            raise FileNotFoundError(
                f"no weights in {folder}: expected {single} or {single}.index.json{others(folder)}"
            )
        if single == SINGLE and (shards := _shards_in(folder)):
            raise ValueError(
                f"{folder} holds both {single} and {shards[0]}, without an index, of which some "
                "programs read the first and some all: take away what is not meant"
            )
        return index, {}
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(map(_is_name, where.values())):
        raise ValueError(
            f"{index}: weight_map: expected an object from tensors' names to names of files beside "
            f"it, got {json_kind(where)}"
        )
    if os.path.exists(path) and single not in where.values():
        raise ValueError(
            f"{folder} holds both {single} and {single}.index.json, which names other files: "
            "take away the one that is not meant"
        )
    paths = {name: os.path.join(folder, file) for name, file in where.items()}
    missing = sorted({path for path in paths.values() if not os.path.exists(path)})
    if missing:
        raise FileNotFoundError(
            f"{index} names {len(missing)} files that are not there: {', '.join(missing[:10])}"
        )
    return index, paths


def _is_name(file: Any) -> bool:
    return isinstance(file, str) and file not in ("", ".", "..") and os.path.basename(file) == file


def _shards_in(folder: str) -> list[str]:
    return sorted(
        name for name in os.listdir(folder) if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)
    )


def others(folder: str) -> str:
    """Say what else may hold weights in a folder that lacks safetensors."""
    ends = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ckpt", ".safetensors")
    there = sorted(name for name in os.listdir(folder) if name.endswith(ends))
    if os.path.isdir(snapshots := os.path.join(folder, "snapshots")):
        return f"; Hugging Face's cache has a model's files in a folder of {snapshots}"
    if not there:
        return ""
    if shards := _shards_in(folder):
        return f"; {shards[0]} is there, and no {INDEX}: fetch that too"
    return (
        f"; {', '.join(there[:3])} beside it is not read: convert with transformers' "
        "from_pretrained and save_pretrained"
    )


def listed(wrong: Mapping[str, Sequence[str]]) -> str:
    """Say what is wrong with a file's tensors: kind of mistake -> tensors, of which the first are
    named."""
    parts = []
    for what, found in wrong.items():
        if not found:
            continue
        lines = [f"  {len(found)} {what}:", *(f"    {one}" for one in found[:MOST])]
        if len(found) > MOST:
            prefix = os.path.commonprefix(found)
            alike = f" (all begin {prefix!r})" if prefix else ""
            lines.append(f"    and {len(found) - MOST} more{alike}")
        parts.append("\n".join(lines))
    return "\n".join(parts)


def write(
    folder: str,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype],
    make: Callable[[str], np.ndarray],
    shard_bytes: int,
    keep: bool = True,
) -> None:
    """Write a checkpoint: one file, or shards with an index where it is larger than
    ``shard_bytes``.

    Args:
        folder: local or bucket path.
        shapes: name -> shape, in the order in which to write.
        dtypes: name -> type.
        make: name -> the tensor; called once each, in order; must return its type.
        shard_bytes: largest size of a file, in bytes (a larger tensor gets a file to itself).
        keep: False makes each tensor and writes none (a process that only takes part in making
            them).

    Raises:
        ValueError: other tensors lie in the folder, by a name of the user's own.
    """
    path = epath.Path(folder)
    for file in path.glob("*.safetensors"):
        if not re.fullmatch(WEIGHTS, file.name):
            raise ValueError(
                f"{folder} holds {file.name}, which servers read together with what is written "
                "(vLLM and SGLang: every *.safetensors): take it away, or give another folder"
            )
    if not keep:
        for name in shapes:
            make(name)
        return
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    shards = _shards(sizes, shard_bytes)
    path.mkdir(parents=True, exist_ok=True)
    files = [SINGLE]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, members in zip(files, shards):
        _write_file(path / file, {name: shapes[name] for name in members}, dtypes, make)
    remove_older(folder, {*files, *([INDEX] if len(shards) > 1 else [])})
    if len(shards) > 1:
        where = {name: file for file, members in zip(files, shards) for name in sorted(members)}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (path / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def remove_older(folder: str, written: Collection[str]) -> None:
    """Take away what a checkpoint or an adapter that lay here before has left, which a program
    would read together with this one, or in its place.

    Args:
        folder: local or bucket path.
        written: the files that belong to what was just written.
    """
    for file in epath.Path(folder).iterdir():
        stale = re.fullmatch(WEIGHTS, file.name) or file.name == "adapter_config.json"
        if stale and file.name not in written:
            file.unlink()


def _shards(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_file(
    path: epath.Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype],
    make: Callable[[str], np.ndarray],
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtypes[name].itemsize
        code = CODES[dtypes[name]]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            tensor = np.ascontiguousarray(make(name))
            if tensor.dtype != dtypes[name] or tensor.shape != tuple(shapes[name]):
                raise AssertionError(
                    f"{name}: {tensor.dtype} {tensor.shape}, the header says {dtypes[name]} "
                    f"{shapes[name]}"
                )
            for block in _blocks(tensor):
                file.write(block)


def _blocks(tensor: np.ndarray) -> Iterator[bytes]:
    data = tensor.reshape(-1).view(np.uint8)
    for start in range(0, len(data), 1 << 26):
        yield data[start : start + (1 << 26)].tobytes()
