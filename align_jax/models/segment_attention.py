# SPDX-License-Identifier: Apache-2.0
"""Attention that costs what its segments cost: key blocks that no query of a block attends to are
not computed, forwards and backwards, and no [T, T] array is held.

    row       | prompt     | chosen | rejected | prompt | chosen | rejected | padding |
    queries                            ~~~~~~
    keys       ============            ======      (to its own end; the other answer only by chance)

Each block of queries walks over two ranges of key blocks: of the prompts that its tokens share, and
of their own segments up to itself.  The ranges are data, so the shapes do not change with them and
nothing is compiled again.  The softmax is accumulated on the way; the backward pass makes the
weights again from its denominators (Dao et al. 2022, arXiv:2205.14135, algorithms 1 and 4).  The
small blocks stay in a core's cache, and loops of any length are cheap there: it is made for CPUs.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from align_jax.parallel.mesh import ROWS

# what a rematerialization policy calls a kernel's output and softmax denominators
SAVED = "attention"
BLOCK = 64  # queries and keys at once: of 32, 64, 128 and 256 the fastest on two cores
_HIDDEN = -1e30  # a logit that is not seen; the maxima begin above it, so that its weight is 0


class _Fields(NamedTuple):
    """Who attends to whom: [N, T] each; or how each is split over a mesh."""

    segments: Any
    positions: Any
    prefixes: Any


class _Walk(NamedTuple):
    """The key blocks of each block of queries, [N, T / block] each."""

    prompt: jax.Array  # first block of the shared prompts
    prompts: jax.Array  # number of blocks of the shared prompts, before ``own``
    own: jax.Array  # first block of their own segments; one past itself: padding, nothing to do


def attend(
    q: Float[Array, "N T H h"],
    k: Float[Array, "N T K h"],
    v: Float[Array, "N T K v"],
    *,
    segment_ids: Int[Array, "N T"],
    positions: Int[Array, "N T"],
    prefix_ids: Int[Array, "N T"] | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    scale: float = 1.0,
    sinks: Float[Array, "H"] | None = None,
    block: int = BLOCK,
) -> Float[Array, "N T H v"]:
    """Attend by blocks that follow the segments; on a mesh, each device to its own rows and heads.

    Args:
        q, k, v: queries, keys (both already rotated) and values.
        segment_ids, positions, prefix_ids: as in core.schema.Batch: ids from 0 to T, positions that
            count by one within a segment.  What comes out at padding has no meaning.
        window: tokens a query sees, itself included; None = all.
        softcap: logits become softcap * tanh(logits / softcap); 0 = off.
        scale: factor on q k.
        sinks: a further logit for each head, which takes its share of the softmax and adds nothing.
        block: queries, and keys, at once.

    Raises:
        ValueError: heads that the tensor axis does not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {"tensor": 1} if mesh.empty else dict(mesh.shape)
    k, v = divisible(k, v, q.shape[2], sizes["tensor"])
    fields = _Fields(segment_ids, positions, prefix_ids)
    run = functools.partial(_rows, window=window, softcap=softcap, block=block)
    if not mesh.empty and mesh.size > 1:
        over = ROWS if q.shape[0] % math.prod(sizes[axis] for axis in ROWS) == 0 else None
        heads, tokens = PartitionSpec(over, None, "tensor", None), PartitionSpec(over, None)
        each = _Fields(tokens, tokens, None if prefix_ids is None else tokens)
        specs = (heads, heads, heads, None if sinks is None else PartitionSpec("tensor"), each)
        run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return run((q.astype(jnp.float32) * scale).astype(q.dtype), k, v, sinks, fields)


def _rows(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    fields: _Fields,
    *,
    window: int | None,
    softcap: float,
    block: int,
) -> jax.Array:
    """Attend on one device, to whole blocks: [N, T, H, h] -> [N, T, H, h]."""
    rows, length, heads, width = q.shape
    groups, extra = k.shape[2], -length % block

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 2)) if extra else x

    q, k, v = padded(q), padded(k), padded(v)
    fields = jax.tree.map(padded, fields)
    q = q.reshape(rows, length + extra, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    walk = _walk(fields, window, block)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(groups, -1)
    out = _attend(
        q, k.swapaxes(1, 2), v.swapaxes(1, 2), sinks, fields, walk, (window, softcap, block)
    )  # [N, K, H / K, T, h]
    out = out.transpose(0, 3, 1, 2, 4).reshape(rows, length + extra, heads, -1)
    return out[:, :length]


def _walk(fields: _Fields, window: int | None, block: int) -> _Walk:
    """Find the key blocks that each block of queries attends to."""
    rows, length = fields.segments.shape
    index = jnp.arange(length, dtype=jnp.int32)
    ids, row = fields.segments, jnp.arange(rows)[:, None]
    everywhere = jnp.broadcast_to(index, ids.shape)
    none = jnp.full((rows, length + 1), length, jnp.int32)
    first = none.at[row, ids].min(everywhere)  # [N, id]
    last = jnp.full_like(none, -1).at[row, ids].max(everywhere)

    def reach(ids: jax.Array) -> jax.Array:
        """Return the first key of the segment that a query sees."""
        begin = jnp.take_along_axis(first, ids, axis=1)
        if window is None:
            return begin
        at = jnp.take_along_axis(fields.positions, jnp.minimum(begin, length - 1), axis=1)
        return begin + jnp.maximum(0, fields.positions - window + 1 - at)

    def by_block(x: jax.Array) -> jax.Array:
        return x.reshape(rows, -1, block)

    real = ids > 0
    behind = jnp.arange(length // block, dtype=jnp.int32)[None] + 1
    own = by_block(jnp.where(real, reach(ids), index[None])).min(-1) // block
    own = jnp.where(by_block(real).any(-1), own, behind)
    if fields.prefixes is None:
        return _Walk(jnp.zeros_like(own), jnp.zeros_like(own), own)
    shared = fields.prefixes > 0
    prompt = by_block(jnp.where(shared, reach(fields.prefixes), length)).min(-1) // block
    ends = jnp.where(shared, jnp.take_along_axis(last, fields.prefixes, axis=1), -1)
    end = jnp.minimum(by_block(ends).max(-1) // block + 1, own)
    return _Walk(prompt, jnp.maximum(end - prompt, 0), own)


def _steps(walk: _Walk, row: jax.Array, at: jax.Array) -> tuple[jax.Array, Any]:
    """Return how many key blocks this block of queries takes, and which comes at each step."""
    prompt, prompts, own = (x[row, at] for x in walk)

    def which(step: jax.Array) -> jax.Array:
        return jnp.where(step < prompts, prompt + step, own + step - prompts)

    return prompts + at + 1 - own, which


def _logits(
    q: jax.Array,
    k: jax.Array,
    fields: _Fields,
    where: tuple[jax.Array, jax.Array, jax.Array],
    numbers: tuple[int | None, float, int],
) -> tuple[jax.Array, jax.Array]:
    """Return a block's logits [K, g, t, s] in float32, and by what their cap scales a gradient."""
    window, softcap, block = numbers
    row, queries, keys = where
    index = jnp.arange(block, dtype=jnp.int32)
    segments = _cut(fields.segments, row, keys, block)[None]
    allowed = _cut(fields.segments, row, queries, block)[:, None] == segments
    if fields.prefixes is not None:
        prefixes = _cut(fields.prefixes, row, queries, block)[:, None]
        allowed |= (prefixes == segments) & (prefixes > 0)
    allowed &= (queries + index)[:, None] >= (keys + index)[None]
    if window is not None:
        places = _cut(fields.positions, row, queries, block)[:, None]
        allowed &= places - _cut(fields.positions, row, keys, block)[None] < window
    logits = jnp.einsum("Kgth,Ksh->Kgts", q, k, preferred_element_type=jnp.float32)
    slope = jnp.ones((), jnp.float32)
    if softcap:
        capped = jnp.tanh(logits / softcap)
        logits, slope = softcap * capped, 1 - capped**2
    return jnp.where(allowed[None, None], logits, _HIDDEN), slope


def _cut(x: jax.Array, row: jax.Array, start: jax.Array, block: int, axis: int = 1) -> jax.Array:
    """Return one row's block of ``axis``."""
    begin: list[Any] = [0] * x.ndim
    begin[0], begin[axis] = row, start
    sizes = list(x.shape)
    sizes[0], sizes[axis] = 1, block
    return jax.lax.dynamic_slice(x, begin, sizes)[0]


def _put(x: jax.Array, value: jax.Array, row: jax.Array, start: jax.Array, axis: int) -> jax.Array:
    """Write one row's block of ``axis``."""
    begin: list[Any] = [0] * x.ndim
    begin[0], begin[axis] = row, start
    return jax.lax.dynamic_update_slice(x, value[None].astype(x.dtype), begin)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    fields: _Fields,
    walk: _Walk,
    numbers: tuple[int | None, float, int],
) -> jax.Array:
    """Attend: q [N, K, g, T, h] with k and v [N, K, T, h], sinks [K, g] -> [N, K, g, T, h]."""
    return _forward(q, k, v, sinks, fields, walk, numbers)[0]


def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    fields: _Fields,
    walk: _Walk,
    numbers: tuple[int | None, float, int],
) -> tuple[jax.Array, tuple]:
    block, groups = numbers[2], q.shape[1:3]
    count = q.shape[3] // block

    def queries(number: jax.Array, carry: tuple) -> tuple:
        row, at = number // count, number % count
        mine = _cut(q, row, at * block, block, 3)
        steps, which = _steps(walk, row, at)

        def keys(step: jax.Array, carry: tuple) -> tuple:
            top, total, out = carry
            start = which(step) * block
            logits, _ = _logits(
                mine, _cut(k, row, start, block, 2), fields, (row, at * block, start), numbers
            )
            higher = jnp.maximum(top, logits.max(-1))
            weights, shrunk = jnp.exp(logits - higher[..., None]), jnp.exp(top - higher)
            values = _cut(v, row, start, block, 2)
            more = jnp.einsum(
                "Kgts,Ksh->Kgth",
                weights.astype(v.dtype),
                values,
                preferred_element_type=jnp.float32,
            )
            return higher, total * shrunk + weights.sum(-1), out * shrunk[..., None] + more

        zeros = jnp.zeros((*groups, block), jnp.float32)
        top, total = zeros + _HIDDEN / 2, zeros
        if sinks is not None:  # a key seen before all others, whose value is zero
            top, total = zeros + sinks[..., None], zeros + 1
        begin = top, total, jnp.zeros((*groups, block, v.shape[-1]), jnp.float32)
        top, total, out = jax.lax.fori_loop(0, steps, keys, begin)
        total = jnp.maximum(total, 1e-37)  # of padding, which attends to nothing
        outs, sums = carry
        return (
            _put(outs, out / total[..., None], row, at * block, 3),
            _put(sums, top + jnp.log(total), row, at * block, 3),
        )

    shape = q.shape[:-1]
    begin = jnp.zeros((*shape, v.shape[-1]), v.dtype), jnp.zeros(shape, jnp.float32)
    out, log_sum = jax.lax.fori_loop(0, q.shape[0] * count, queries, begin)
    out, log_sum = (checkpoint_name(x, SAVED) for x in (out, log_sum))
    return out, (q, k, v, sinks, fields, walk, out, log_sum)


def _backward(numbers: tuple[int | None, float, int], saved: tuple, d_out: jax.Array) -> tuple:
    q, k, v, sinks, fields, walk, out, log_sum = saved
    block = numbers[2]
    count = q.shape[3] // block
    # sum over keys of weight times its gradient, which the softmax takes away from each
    means = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1)  # [N, K, g, T]
    exact = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def queries(number: jax.Array, carry: tuple) -> tuple:
        row, at = number // count, number % count
        mine, d_mine, total, mean = (
            _cut(x, row, at * block, block, 3) for x in (q, d_out, log_sum, means)
        )
        steps, which = _steps(walk, row, at)

        def keys(step: jax.Array, carry: tuple) -> tuple:
            dq, dk, dv = carry
            start = which(step) * block
            key, value = (_cut(x, row, start, block, 2) for x in (k, v))
            logits, slope = _logits(mine, key, fields, (row, at * block, start), numbers)
            weights = jnp.exp(logits - total[..., None])
            d_weights = exact("Kgth,Ksh->Kgts", d_mine, value)
            d_logits = (weights * (d_weights - mean[..., None]) * slope).astype(q.dtype)
            more_k = exact("Kgts,Kgth->Ksh", d_logits, mine)
            more_v = exact("Kgts,Kgth->Ksh", weights.astype(v.dtype), d_mine)
            return (
                dq + exact("Kgts,Ksh->Kgth", d_logits, key),
                _put(dk, _cut(dk, row, start, block, 2) + more_k, row, start, 2),
                _put(dv, _cut(dv, row, start, block, 2) + more_v, row, start, 2),
            )

        dq, dk, dv = carry
        zeros = jnp.zeros(mine.shape, jnp.float32)
        d_query, dk, dv = jax.lax.fori_loop(0, steps, keys, (zeros, dk, dv))
        return _put(dq, d_query, row, at * block, 3), dk, dv

    zeros = jnp.zeros(k.shape, jnp.float32)
    begin = jnp.zeros_like(q), zeros, jnp.zeros(v.shape, jnp.float32)
    dq, dk, dv = jax.lax.fori_loop(0, q.shape[0] * count, queries, begin)
    d_sinks = None
    if sinks is not None:  # a sink's weight times what the softmax takes away from it
        d_sinks = -jnp.sum(jnp.exp(sinks[None, :, :, None] - log_sum) * means, axis=(0, 3))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), d_sinks, None, None


_attend.defvjp(_forward, _backward)


def divisible(k: jax.Array, v: jax.Array, heads: int, tensor: int) -> tuple[jax.Array, jax.Array]:
    """Return keys and values whose heads the tensor axis divides: repeated where there are fewer.

    Args:
        k, v: keys and values, [N, T, K, h].
        heads: H.
        tensor: devices of the tensor axis.

    Raises:
        ValueError: query heads, or key-value heads, that cannot be split.
    """
    groups = k.shape[2]
    if heads % tensor:
        raise ValueError(f"{heads} query heads cannot be split over mesh.tensor={tensor}")
    # fewer key-value heads than devices: each device gets a copy of the ones it needs
    if groups % tensor:
        if tensor % groups:
            raise ValueError(
                f"{groups} key-value heads cannot be split over, nor copied to, "
                f"mesh.tensor={tensor}"
            )
        k, v = (jnp.repeat(x, tensor // groups, axis=2) for x in (k, v))
    return k, v
