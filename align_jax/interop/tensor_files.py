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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes  # registers bfloat16 with numpy, which safetensors' slices need
import numpy as np
from etils import epath
from safetensors import safe_open

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Reader:
    """The tensors of a checkpoint folder, read by slices; nothing is held between reads."""

    def __init__(self, folder: str):
        """Open the folder's index, or its single file.

        Raises:
            FileNotFoundError: neither is there, or a shard of the index is missing.
        """
        self._stack = contextlib.ExitStack()
        handles = [self._stack.enter_context(safe_open(path, "np")) for path in _files(folder)]
        self._where = {name: handle for handle in handles for name in handle.keys()}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    @property
    def names(self) -> set[str]:
        """The tensors' names."""
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return tuple(self._where[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        """Return a tensor's type.

        Raises:
            ValueError: a type that is no weight's (an 8-bit float, say).
        """
        code = self._where[name].get_slice(name).get_dtype()
        if code not in DTYPES:
            raise ValueError(f"tensor {name!r} is of type {code}; readable: {', '.join(DTYPES)}")
        return DTYPES[code]

    def read(self, name: str, index: Sequence[slice] = ()) -> np.ndarray:
        """Read part of a tensor."""
        return self._where[name].get_slice(name)[tuple(index) or ...]


def _files(folder: str) -> list[str]:
    index = os.path.join(folder, INDEX)
    if os.path.exists(index):
        with open(index, encoding="utf-8") as file:
            shards = sorted(set(json.load(file)["weight_map"].values()))
        paths = [os.path.join(folder, shard) for shard in shards]
        missing = [path for path in paths if not os.path.exists(path)]
        if missing:
            raise FileNotFoundError(f"{index} names files that are not there: {', '.join(missing)}")
        return paths
    single = os.path.join(folder, SINGLE)
    if not os.path.exists(single):
        raise FileNotFoundError(
            f"no weights in {folder}: expected {SINGLE} or {INDEX} (safetensors; convert "
            "pytorch_model.bin with transformers' save_pretrained)"
        )
    return [single]


def listed(wrong: Mapping[str, Sequence[str]]) -> str:
    """Say what is wrong with a file's tensors: kind of mistake -> tensors."""
    parts = (
        f"  {len(found)} {what}:\n    " + "\n    ".join(found)
        for what, found in wrong.items()
        if found
    )
    return "\n".join(parts)


def write(
    folder: str,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    make: Callable[[str], np.ndarray],
    shard_bytes: int,
    keep: bool = True,
) -> None:
    """Write a checkpoint: one file, or shards with an index where it is larger than
    ``shard_bytes``.

    Args:
        folder: local or bucket path.
        shapes: name -> shape, in the order in which to write.
        dtype: type of every tensor.
        make: name -> the tensor; called once each, in order; must return ``dtype``.
        shard_bytes: largest size of a file, in bytes (a larger tensor gets a file to itself).
        keep: False makes each tensor and writes none (a process that only takes part in making
            them).
    """
    if not keep:
        for name in shapes:
            make(name)
        return
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards = _shards(sizes, shard_bytes)
    path = epath.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    files = [SINGLE]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, members in zip(files, shards):
        _write_file(path / file, {name: shapes[name] for name in members}, dtype, make)
    if len(shards) > 1:
        where = {name: file for file, members in zip(files, shards) for name in sorted(members)}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (path / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


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
    dtype: np.dtype,
    make: Callable[[str], np.ndarray],
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            tensor = np.ascontiguousarray(make(name))
            if tensor.dtype != dtype or tensor.shape != tuple(shapes[name]):
                raise AssertionError(
                    f"{name}: {tensor.dtype} {tensor.shape}, the header says {dtype} {shapes[name]}"
                )
            for block in _blocks(tensor):
                file.write(block)


def _blocks(tensor: np.ndarray) -> Iterator[bytes]:
    data = tensor.reshape(-1).view(np.uint8)
    for start in range(0, len(data), 1 << 26):
        yield data[start : start + (1 << 26)].tobytes()
