# SPDX-License-Identifier: Apache-2.0
"""Attention of one new token a row to its cache.

On a CPU the rows go one after the other, each over the blocks of slots that hold something it
attends to: what is read stays in a core's cache, and empty slots cost nothing.  All rows at once
copy and transpose a layer's whole cache for each token, which takes three times as long there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from align_jax.models.attention import weighted

BLOCK = 64  # slots at once: of 32, 64 and 128 the fastest
_HIDDEN = -1e30  # a logit that is not seen; the maxima begin above it, so that its weight is 0


def attend(
    q: Float[Array, "N 1 H h"],
    keys: Float[Array, "L N C K h"],
    values: Float[Array, "L N C K v"],
    place: Int[Array, ""],
    allowed: Bool[Array, "N C"],
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: Float[Array, "H"] | None = None,
) -> Float[Array, "N 1 H v"]:
    """Attend to a layer's slots as ``attention.weighted`` does.

    Args:
        q: queries, already rotated.
        keys, values: of all layers that attend.
        place: of this layer among them.
        allowed: which slots each row's token attends to.
        scale, softcap, sinks: as ``attention.weighted`` takes them.
    """

    def whole() -> jax.Array:
        k, v = (x[place].astype(q.dtype) for x in (keys, values))
        mask = allowed[:, None]
        return weighted(q, k, v, mask, scale=scale, softcap=softcap, sinks=sinks)

    def by_rows() -> jax.Array:
        return _by_rows(q, keys, values, place, allowed, sinks, scale, softcap)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        return whole()
    return jax.lax.platform_dependent(cpu=by_rows, default=whole)


def _by_rows(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    place: jax.Array,
    allowed: jax.Array,
    sinks: jax.Array | None,
    scale: float,
    softcap: float,
) -> jax.Array:
    """Attend row by row; the softmax is accumulated over the blocks."""
    slots, groups, width = keys.shape[2], keys.shape[3], values.shape[-1]
    block = min(BLOCK, slots)
    queries = q[:, 0].reshape(q.shape[0], groups, -1, q.shape[-1])  # [N, K, g, h]

    def cut(x: jax.Array, row: jax.Array, start: jax.Array) -> jax.Array:
        sizes = (1, 1, block, *x.shape[3:])
        return jax.lax.dynamic_slice(x, (place, row, start, 0, 0), sizes)[0, 0].astype(q.dtype)

    def attend(row: jax.Array) -> jax.Array:
        mine = queries[row]
        seen = jnp.pad(allowed[row], (0, -slots % block)).reshape(-1, block).any(-1)
        first, end = jnp.argmax(seen), len(seen) - jnp.argmax(seen[::-1])

        def add(number: jax.Array, carry: tuple) -> tuple:
            top, total, out = carry
            start = jnp.minimum(number * block, slots - block)  # the last one may reach back
            new = start + jnp.arange(block) >= number * block
            own = jax.lax.dynamic_slice(allowed, (row, start), (1, block))[0] & new
            k, v = cut(keys, row, start), cut(values, row, start)
            logits = jnp.einsum("Kgh,SKh->KgS", mine, k, preferred_element_type=jnp.float32) * scale
            if softcap:
                logits = softcap * jnp.tanh(logits / softcap)
            logits = jnp.where(own[None, None], logits, _HIDDEN)
            higher = jnp.maximum(top, logits.max(-1))
            weights, shrunk = jnp.exp(logits - higher[..., None]), jnp.exp(top - higher)
            more = jnp.einsum(
                "KgS,SKv->Kgv", weights.astype(q.dtype), v, preferred_element_type=jnp.float32
            )
            return higher, total * shrunk + weights.sum(-1), out * shrunk[..., None] + more

        zeros = jnp.zeros(mine.shape[:2], jnp.float32)
        top, total = zeros + _HIDDEN / 2, zeros
        if sinks is not None:  # a key seen before all others, whose value is zero
            top, total = sinks.astype(jnp.float32).reshape(zeros.shape), zeros + 1
        begin = top, total, jnp.zeros((*zeros.shape, width), jnp.float32)
        _, total, out = jax.lax.fori_loop(first, end, add, begin)
        return (out / jnp.maximum(total, 1e-37)[..., None]).astype(q.dtype)

    out = jax.lax.map(attend, jnp.arange(q.shape[0]))  # [N, K, g, v]
    return out.reshape(q.shape[0], 1, -1, width)
