# SPDX-License-Identifier: Apache-2.0
"""Weights that a checkpoint stores as codes and scales, read as the numbers that they stand for.

    fp8      X, X_scale_inv       a byte a weight; blocks, rows or the whole share a scale
             (or X_scale, compressed-tensors')
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
FP8 = "F8_E4M3"
# safetensors' names of the types that codes and scales have
TYPES: Mapping[str, np.dtype] = {
    FP8: np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "BF16": BFLOAT16,
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
SCALES = {"fp8": "_scale_inv", "compressed-tensors": "_scale"}  # both are multiplied with
ACTIVATIONS = ("activation_scale", "input_scale")  # of products in fp8, which are not computed
# the 16 numbers of E2M1
VALUES = np.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
GROUP = 32  # weights of one MXFP4 scale


class Fp8:
    """A matrix of fp8 codes, or several.

    Args:
        codes: as a file's map.
        scales: what its blocks are multiplied by: one number, or of each axis one for all, one for
            each block, or one for each row.
        block: rows and columns of a block; (): as the scales divide them.

    Raises:
        ValueError: scales that do not fit.
    """

    def __init__(self, codes: np.ndarray, scales: np.ndarray, block: Sequence[int] = ()):
        self.shape = tuple(codes.shape)
        if scales.size == 1:
            scales = scales.reshape((1,) * codes.ndim)
        steps = (0,) * (codes.ndim - len(block)) + tuple(block)
        fits = scales.ndim == codes.ndim
        self._steps = [_step(*one) for one in zip(self.shape, scales.shape, steps)] if fits else [0]
        if not all(self._steps):
            of = f" in blocks of {list(block)}" if block else ""
            raise ValueError(f"expected scales that fit {self.shape}{of}, got {scales.shape}")
        self._codes, self._scales = codes, scales.astype(np.float32)

    def read(self, index: Sequence[slice]) -> np.ndarray:
        """Read part of it, in float32."""
        scales, whole = self._scales, _filled(index, self.shape)
        for axis, (one, step) in enumerate(zip(whole, self._steps)):
            scales = scales.take(np.arange(one.start, one.stop) // step, axis=axis)
        return self._codes[tuple(whole)].astype(np.float32) * scales


def _step(size: int, scales: int, block: int) -> int:
    """Return how many of an axis share a scale; 0 where so many scales do not fit it."""
    if scales in (1, size):
        return size // scales
    if block:
        return block if scales == -(-size // block) else 0
    return 0 if size % scales else size // scales


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

    Raises:
        ValueError: scales that do not fit their codes, with the file and the tensor.
    """
    out: dict[str, Fp8 | Mxfp4] = {}
    if config["quant_method"] == "mxfp4":
        for blocks in [name for name in where if name.endswith("_blocks")]:
            name = blocks.removesuffix("_blocks")
            if f"{name}_scales" in where:
                parts = (where.pop(part).get_slice(part) for part in (blocks, f"{name}_scales"))
                out[name] = Mxfp4(*parts)
        return out
    block = config.get("weight_block_size") or ()
    for name in [name for name in where if where[name].get_slice(name).get_dtype() == FP8]:
        of = f"{name}{SCALES[config['quant_method']]}"
        if of not in where:
            continue
        try:
            out[name] = Fp8(mapped(files[name], name), mapped(files[of], of), block)
        except ValueError as error:
            raise ValueError(f"{files[of]}: {of}: {error}") from error
        for part in (name, of, *(name.removesuffix("weight") + end for end in ACTIVATIONS)):
            where.pop(part, None)
    return out


def mapped(path: str, name: str) -> np.ndarray:
    """Map a tensor, also of the types that safetensors has no numpy type for; bytes where there is
    none at all."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
    start, stop = entry["data_offsets"]
    if start == stop:
        return np.empty(0, np.uint8)
    found = np.memmap(path, np.uint8, "r", 8 + length + start, (stop - start,))
    if entry["dtype"] not in TYPES:
        return found
    return found.view(TYPES[entry["dtype"]]).reshape(entry["shape"])


def _filled(index: Sequence[slice], shape: Sequence[int]) -> list[slice]:
    """Return the part with its bounds written out, along every axis."""
    whole = [*index, *(slice(None) for _ in shape[len(index) :])]
    return [slice(*one.indices(size)[:2]) for one, size in zip(whole, shape)]
