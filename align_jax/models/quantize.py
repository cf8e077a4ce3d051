# SPDX-License-Identifier: Apache-2.0
"""The frozen base in 8 or 4 bits, turned back into numbers where it is used (QLoRA).

A quantized kernel stands in the tree where the kernel stood; ``astype`` makes the kernel, so a
layer that casts its parameters runs from either.  Only the linear maps inside the layers are
quantized (``Role.quantized``), which are most of a large model.

    int8    8.01 bits a weight: codes int8; one scale for each output: largest magnitude / 127
    nf4     4.13 bits a weight: codes of 4 bits, two a byte, in blocks of 64 along one axis; each
            block's largest magnitude in 8 bits, as a part of its output's largest ("double
            quantization")

Codes have as many axes as the kernel and are split over the mesh as it is.  Blocks never straddle
two devices, so nothing is communicated to quantize or to use them.

Why not qwix (0.1.8): its arrays are NNX data, which JAX 0.12 with today's Flax cannot import, its
table lookup is a gather, which TPUs do slowly, and its scales are not quantized.

References:
    Dettmers et al. 2023, QLoRA (arXiv 2305.14314), sections 3 and appendix E (the 16 values of
    NF4); Dettmers et al. 2022, LLM.int8() (arXiv 2208.07339).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from align_jax.core.choose import nearest
from align_jax.core.tree import flatten, unflatten
from align_jax.models.roles import Role, role_of

METHODS = ("int8", "nf4")
BLOCK = 64  # weights of one NF4 scale
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("codes", "scales"),
    meta_fields=("method", "axes", "dtype"),
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A kernel in few bits.

    Attributes:
        codes: int8 as the kernel; nf4: uint8, the blocked axis half as long.
        scales: float32, the contracted axes of length 1; nf4: before it uint8, the blocked axis
            1/64 as long.
        method: a name of ``METHODS``.
        axes: the axes that share a float32 scale, nf4's blocked one first.  From the end: they hold
            in a layer too.
        dtype: type of the kernel that was quantized.
    """

    codes: Any
    scales: tuple[Any, ...]
    method: str
    axes: tuple[int, ...]
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's shape."""
        shape = list(self.codes.shape)
        if self.method == "nf4":
            shape[self.axes[0]] *= 2
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """The kernel's number of axes."""
        return len(self.codes.shape)

    @property
    def size(self) -> int:
        """The kernel's number of weights."""
        return self.codes.size * (2 if self.method == "nf4" else 1)

    @property
    def sharding(self) -> Any:
        """The codes' sharding, which is the kernel's."""
        return self.codes.sharding

    def astype(self, dtype: Any) -> jax.Array:
        """Return the kernel that the codes stand for."""
        if self.method == "int8":
            return (self.codes.astype(jnp.float32) * self.scales[0]).astype(dtype)
        axis, low = self.ndim + self.axes[0], jnp.uint8(15)
        codes = _split(self.codes, axis, BLOCK // 2)  # [..., blocks, 32, ...]
        # [..., blocks, 2, 32, ...]
        codes = jnp.stack([codes & low, codes >> jnp.uint8(4)], axis=axis + 1)
        tops = self.scales[0].astype(jnp.float32) * (self.scales[1] / 255)
        values = _value(codes) * jnp.expand_dims(tops, (axis + 1, axis + 2))
        return values.reshape(self.shape).astype(dtype)


def _split(x: jax.Array, axis: int, size: int) -> jax.Array:
    return x.reshape(*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])


def _value(codes: jax.Array) -> jax.Array:
    """Look NF4 codes up by selecting bit after bit: a gather from a table is slow on TPUs."""
    values: list[Any] = [jnp.float32(value) for value in NF4]
    for bit in range(4):
        on = (codes >> jnp.uint8(bit)) & jnp.uint8(1) == jnp.uint8(1)
        values = [jnp.where(on, high, low) for low, high in zip(values[::2], values[1::2])]
    return values[0]


def quantize(kernel: jax.Array, like: Quantized) -> Quantized:
    """Quantize a kernel.

    Args:
        kernel: any float type, [layers, ...].
        like: its entry of ``quantized_shapes``.

    Returns:
        Codes and scales; of weights drawn from a normal distribution the relative root-mean-square
        error is about 0.01 in int8 (of a width of 4,096) and 0.09 in nf4.
    """
    x = kernel.astype(jnp.float32)
    tops = jnp.maximum(
        jnp.max(jnp.abs(x), axis=like.axes, keepdims=True), jnp.finfo(jnp.float32).tiny
    )
    if like.method == "int8":
        scales = tops / 127
        return dataclasses.replace(
            like, codes=jnp.round(x / scales).astype(jnp.int8), scales=(scales,)
        )
    axis = x.ndim + like.axes[0]
    blocks = _split(x, axis, BLOCK)  # [..., blocks, 64, ...]
    # up, so that no weight is cut off
    coarse = jnp.ceil(jnp.max(jnp.abs(blocks), axis=axis + 1) / (tops / 255))
    coarse = jnp.clip(coarse, 1, 255)
    blocks = blocks / jnp.expand_dims(coarse * (tops / 255), axis + 1)
    codes = jnp.zeros(blocks.shape, jnp.uint8)
    for lower, upper in zip(NF4, NF4[1:]):
        codes += (blocks > (lower + upper) / 2).astype(jnp.uint8)
    low, high = jnp.split(codes, 2, axis=axis + 1)
    packed = (low | (high << jnp.uint8(4))).reshape(like.codes.shape)
    return dataclasses.replace(like, codes=packed, scales=(coarse.astype(jnp.uint8), tops))


def quantized_shapes(
    shapes: Mapping[str, Any], method: str, roles: Mapping[str, Any]
) -> dict[str, Any]:
    """Say what a base looks like in few bits.

    Args:
        shapes: the base's tree of shapes and types, with shardings where it has any.
        method: a name of ``METHODS``.
        roles: the model's tree of roles.

    Returns:
        The tree with a ``Quantized`` of shapes, types and shardings for each linear map of the
        layers.

    Raises:
        ValueError: an unknown method; kernels without an axis that blocks divide on each device.
    """
    if method not in METHODS:
        raise ValueError(f"quantization = {method!r} is unknown{nearest(method, METHODS)}")
    wrong: list[str] = []
    out, known = flatten(shapes), flatten(roles)
    for path, leaf in out.items():
        role = role_of(known, path)
        if role.quantized:
            out[path] = _abstract(leaf, method, role, path, wrong)
    if wrong:
        raise ValueError(
            f"nf4 needs an axis of which every device holds a multiple of {BLOCK} (use int8, or "
            "split the model less):\n  " + "\n  ".join(wrong)
        )
    return unflatten(out)


def _abstract(kernel: Any, method: str, role: Role, path: str, wrong: list[str]) -> Any:
    ndim, leading = kernel.ndim, role.leading
    axes = tuple(axis - ndim for axis in range(leading, leading + role.inputs))
    codes = _resized(kernel, {}, jnp.int8)
    scales: tuple[jax.ShapeDtypeStruct, ...] = ()
    if method == "nf4":
        held = kernel.shape
        if kernel.sharding is not None:
            held = kernel.sharding.shard_shape(kernel.shape)
        divided = (axis - ndim for axis in range(leading, ndim) if held[axis] % BLOCK == 0)
        block = next(divided, None)
        if block is None:
            wrong.append(f"{path} {kernel.shape}, on a device {held}")
            return kernel
        axes = (block, *(axis for axis in axes if axis != block))
        codes = _resized(kernel, {block: kernel.shape[block] // 2}, jnp.uint8)
        scales = (_resized(kernel, {block: kernel.shape[block] // BLOCK}, jnp.uint8),)
    tops = _resized(kernel, dict.fromkeys(axes, 1), jnp.float32)
    return Quantized(codes, (*scales, tops), method, axes, kernel.dtype)


def _resized(kernel: Any, changes: Mapping[int, int], dtype: Any) -> jax.ShapeDtypeStruct:
    """Return the kernel's shape with some axes (from the end) of other lengths; one of length 1 is
    not split."""
    shape, sharding = list(kernel.shape), kernel.sharding
    for axis, size in changes.items():
        shape[axis] = size
    if isinstance(sharding, NamedSharding):
        entries = list(sharding.spec) + [None] * (len(shape) - len(sharding.spec))
        for axis, size in changes.items():
            entries[axis] = None if size == 1 else entries[axis]
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*entries))
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def product(
    x: jax.Array,
    kernel: Quantized,
    count: int,
    result: jnp.dtype | None = None,
    narrow: jnp.dtype | None = None,
) -> jax.Array:
    """Contract the last ``count`` axes of x with the first of a quantized kernel; the kernel gets
    no gradient.  ``result`` and ``narrow`` are types, as ``layers.contract`` has them.

    What is kept for the backward pass is the codes: without this, every layer's kernel would be
    kept at full size.
    """
    return jnp.tensordot(x, kernel.astype(x.dtype), axes=count, preferred_element_type=result)


def _forward(
    x: jax.Array, kernel: Quantized, count: int, result: jnp.dtype | None, narrow: jnp.dtype | None
) -> tuple[jax.Array, Quantized]:
    return product(x, kernel, count, result, narrow), kernel


def _backward(
    count: int, result: jnp.dtype | None, narrow: jnp.dtype | None, kernel: Quantized, dy: jax.Array
) -> tuple[jax.Array, None]:
    outputs = range(count, kernel.ndim)
    over = (tuple(range(dy.ndim - len(outputs), dy.ndim)), tuple(outputs))
    dy = dy.astype(narrow or dy.dtype)
    return jnp.tensordot(dy, kernel.astype(dy.dtype), axes=over), None


product.defvjp(_forward, _backward)
