# SPDX-License-Identifier: Apache-2.0
"""One parameter out of a checkpoint's tensors, in its sharding; the host never holds a whole one.

parameter ─ a layer at a time ─► what this process's devices hold ─ a chunk at a time ─► tensor
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from align_jax.interop.tensor_files import Reader
from align_jax.models.config import ModelConfig
from align_jax.models.tensor_map import AxisMap, TensorMap, parse

CHUNK_BYTES = 1 << 26  # what is read of a tensor at once


def read_parameter(
    reader: Reader,
    entry: TensorMap,
    config: ModelConfig,
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Sharding,
) -> jax.Array:
    """Read a parameter, all its layers, straight into its sharding.

    Args:
        reader: the checkpoint.
        entry: which of its tensors hold the parameter.
        config: what the checkpoint is.
        shape: the parameter's; its vocabulary may have more rows, which are zero.
        dtype: the parameter's.
        sharding: where it is to lie.
    """
    source = _Source(reader, entry, parse(entry, config), dtype)
    if not entry.stacked:
        return source.read(0, shape, sharding)
    whole = _zeros(shape, jnp.dtype(dtype), sharding)()
    update = _update(sharding)
    for place, layer in enumerate(entry.numbers(config)):
        block = source.read(layer, (1, *shape[1:]), sharding)
        # one layer at a time: waiting here is what bounds the host's memory
        whole = jax.block_until_ready(update(whole, block, place))
    return whole


@functools.lru_cache
def _zeros(shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding) -> Callable[[], jax.Array]:
    return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding)


@functools.lru_cache
def _update(sharding: Sharding) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    update = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
    return jax.jit(update, donate_argnums=0, out_shardings=sharding)


class _Source:
    """The tensors of one parameter.

    Args:
        reader, entry: as ``read_parameter`` takes them.
        axes: ``entry.axes`` with sizes.
        dtype: of what is read.
    """

    def __init__(self, reader: Reader, entry: TensorMap, axes: AxisMap, dtype: np.dtype):
        self._reader, self._entry, self._axes, self._dtype = reader, entry, axes, dtype

    def read(self, layer: int, shape: tuple[int, ...], sharding: Sharding) -> jax.Array:
        """Make one layer of the parameter from what this process's devices hold of it."""
        found: dict[tuple, np.ndarray] = {}  # devices that hold the same part share one copy

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # sharded arrays are asked for by their parts
            key = tuple(one.indices(size)[:2] for one, size in zip(index, shape))
            if key not in found:
                found[key] = self._part(layer, [slice(*bounds) for bounds in key])
            return found[key]

        return jax.make_array_from_callback(shape, sharding, part)

    def _part(self, layer: int, index: Sequence[slice]) -> np.ndarray:
        entry, axes = self._entry, self._axes
        inner = index[entry.stacked :]
        experts = range(inner[0].start, inner[0].stop) if entry.by_expert else (0,)
        inner = inner[entry.by_expert :]
        out = np.zeros((len(experts), *(one.stop - one.start for one in inner)), self._dtype)
        # rows that pad the vocabulary stand in no tensor and stay zero
        wanted = [
            slice(min(one.start, size), min(one.stop, size))
            for one, size in zip(inner, axes.our_shape)
        ]
        for row, expert in zip(out, experts):
            name = entry.name.format(layer=layer, expert=expert)
            for chunk in _chunks(wanted, axes, row.nbytes):
                inside = tuple(
                    slice(one.start - whole.start, one.stop - whole.start)
                    for one, whole in zip(chunk, inner)
                )
                row[inside] = self._chunk(name, chunk)
        whole = out if entry.by_expert else out[0]
        return whole[None] if entry.stacked else whole

    def _chunk(self, name: str, index: Sequence[slice]) -> np.ndarray:
        rows, *rest = self._axes.bounds(index)
        start = self._entry.span[0] if self._entry.span else 0
        bounds = (slice(rows.start + start, rows.stop + start), *rest)
        return self._axes.to_ours(self._reader.read(name, bounds, self._dtype), index)


def _chunks(wanted: list[slice], axes: AxisMap, size: int) -> Iterator[list[slice]]:
    """Cut a part of ours, of so many bytes, along the tensor's first axis, so that what is read at
    once stays small."""
    letter = axes.theirs[0][0]
    if letter not in axes.ours:
        yield wanted
        return
    axis = axes.ours.index(letter)
    start, stop = wanted[axis].start, wanted[axis].stop
    step = max(1, (stop - start) * CHUNK_BYTES // max(size, 1))
    for begin in range(start, stop, step):
        yield [*wanted[:axis], slice(begin, min(begin + step, stop)), *wanted[axis + 1 :]]
