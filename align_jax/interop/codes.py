# SPDX-License-Identifier: Apache-2.0
"""Weights that a checkpoint stores as codes and scales, read as the bfloat16 that they stand for.

    fp8      X, X_scale_inv       a byte a weight; blocks of rows and columns share a float32 scale
    mxfp4    X_blocks, X_scales   4 bits a weight; 32 in a row share a power of two; transposed

References:
    DeepSeek-AI 2024 (arXiv 2412.19437), section 3.3; OCP Microscaling Formats 1.0, sections 5.3.3
    (E2M1) and 5.4.1 (E8M0).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# the 16 numbers of E2M1
VALUES = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
GROUP = 32  # weights of one MXFP4 scale


class Fp8:
    """A matrix of fp8 codes.

    Args:
        codes: the matrix, as a file's map.
        scales: what its blocks are multiplied by.
        block: rows and columns of a block.
    """

    def __init__(self, codes: np.ndarray, scales: np.ndarray, block: Sequence[int]):
        self._codes, self._scales, self._block = codes, scales.astype(np.float32), block
        self.shape = tuple(codes.shape)

    def read(self, index: Sequence[slice]) -> np.ndarray:
        """Read part of the matrix."""
        scales, whole = self._scales, _filled(index, self.shape)
        for axis, (one, block) in enumerate(zip(whole, self._block)):
            scales = scales.take(np.arange(one.start, one.stop) // block, axis=axis)
        return (self._codes[tuple(whole)].astype(np.float32) * scales).astype(BFLOAT16)


class Mxfp4:
    """Matrices [E, in, out], stored as codes [E, out, in / 32, 16], two a byte, and scales
    [E, out, in / 32].

    Args:
        blocks, scales: slices of a file.
    """

    def __init__(self, blocks: Any, scales: Any):
        self._blocks, self._scales = blocks, scales
        experts, outputs, groups, _ = blocks.get_shape()
        self.shape = (experts, groups * GROUP, outputs)

    def read(self, index: Sequence[slice]) -> np.ndarray:
        """Read part of the matrices."""
        experts, inputs, outputs = _filled(index, self.shape)
        groups = slice(inputs.start // GROUP, -(-inputs.stop // GROUP))
        codes = self._blocks[experts, outputs, groups]
        powers = self._scales[experts, outputs, groups].astype(np.int32) - 127
        numbers = VALUES[np.stack([codes & 15, codes >> 4], axis=-1)]  # [E, out, groups, 16, 2]
        numbers = np.ldexp(numbers, powers[..., None, None]).reshape(*codes.shape[:2], -1)
        first = inputs.start - groups.start * GROUP
        wanted = numbers[..., first : first + inputs.stop - inputs.start]
        return wanted.swapaxes(1, 2).astype(BFLOAT16)


def take(
    config: Mapping[str, Any], where: MutableMapping[str, Any], files: Mapping[str, str]
) -> dict[str, Fp8 | Mxfp4]:
    """Take what is stored as codes out of a checkpoint's tensors, its scales too.

    Args:
        config: the checkpoint's ``quantization_config``, which ``models.hf_fields`` has checked.
        where: tensor -> the open file that holds it; what is returned and its parts are taken out.
        files: tensor -> that file's path.
    """
    out: dict[str, Fp8 | Mxfp4] = {}
    if config["quant_method"] == "mxfp4":
        for blocks in [name for name in where if name.endswith("_blocks")]:
            name = blocks.removesuffix("_blocks")
            if f"{name}_scales" in where:
                parts = (where.pop(part).get_slice(part) for part in (blocks, f"{name}_scales"))
                out[name] = Mxfp4(*parts)
        return out
    for name in [name for name in where if f"{name}_scale_inv" in where]:
        if where[name].get_slice(name).get_dtype() == "F8_E4M3":
            scales = where.pop(f"{name}_scale_inv").get_slice(f"{name}_scale_inv")[...]
            out[name] = Fp8(_fp8(files[name], name), scales, config["weight_block_size"])
            del where[name]
    return out


def _fp8(path: str, name: str) -> np.ndarray:
    """Map a tensor of fp8 codes, which safetensors has no numpy type for."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
    start = 8 + length + entry["data_offsets"][0]
    codes = np.memmap(path, np.uint8, "r", start, tuple(entry["shape"]))
    return codes.view(ml_dtypes.float8_e4m3fn)


def _filled(index: Sequence[slice], shape: Sequence[int]) -> list[slice]:
    """Return the part with its bounds written out, along every axis."""
    whole = [*index, *(slice(None) for _ in shape[len(index) :])]
    return [slice(*one.indices(size)[:2]) for one, size in zip(whole, shape)]
