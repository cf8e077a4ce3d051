# SPDX-License-Identifier: Apache-2.0
"""Attention over rows of segments: one signature, one table of implementations, all equal on the
same inputs.

A query attends to the keys at or before its own index that have its segment id, or the one its
prefix id names (a prompt stored once, shared by several responses).  Padding (segment 0) attends to
padding alone, so no row of the mask is empty.  With a window, a key must be fewer than ``window``
positions back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from align_jax.core.choose import choose
from align_jax.models import segment_attention


def mask(
    segment_ids: Int[Array, "N T"],
    positions: Int[Array, "N T"],
    prefix_ids: Int[Array, "N T"] | None = None,
    window: int | None = None,
) -> Bool[Array, "N T T"]:
    """Return which keys (last axis) each query (middle axis) attends to."""
    index = jnp.arange(segment_ids.shape[1])
    return _allowed((segment_ids, positions, prefix_ids), index, segment_ids, positions, window)


def _allowed(
    queries: tuple[jax.Array, jax.Array, jax.Array | None],
    index: jax.Array,
    segment_ids: jax.Array,
    positions: jax.Array,
    window: int | None,
) -> jax.Array:
    """Return the mask [N, t, T] of some of the rows' queries, which stand at ``index`` [t]."""
    segments, places, prefixes = queries
    allowed = segments[:, :, None] == segment_ids[:, None, :]
    if prefixes is not None:
        allowed |= (prefixes[:, :, None] == segment_ids[:, None, :]) & (prefixes > 0)[:, :, None]
    allowed &= (index[:, None] >= jnp.arange(segment_ids.shape[1])[None, :])[None]
    if window is not None:
        # positions, not indices: a response may stand far behind the prompt it continues
        allowed &= places[:, :, None] - positions[:, None, :] < window
    return allowed


def weighted(
    q: Float[Array, "N T H h"],
    k: Float[Array, "N S K h"],
    v: Float[Array, "N S K v"],
    allowed: Bool[Array, "N T S"],
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: Float[Array, "H"] | None = None,
) -> Float[Array, "N T H v"]:
    """Return softmax(cap(scale q k)) v with logits, cap and softmax in float32; H a multiple of
    K, and the widths of keys and values may differ.

    A head's sink is one more logit, of a key whose value is zero.
    """
    rows, length, heads, head_dim = q.shape
    groups = k.shape[2]
    q = q.reshape(rows, length, groups, heads // groups, head_dim)
    logits = jnp.einsum("NTKgh,NSKh->NKgTS", q, k, preferred_element_type=jnp.float32) * scale
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(allowed[:, None, None], logits, jnp.finfo(jnp.float32).min)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(1, groups, -1, 1, 1)
        sink = jnp.broadcast_to(sink, (*logits.shape[:-1], 1))
        logits = jnp.concatenate([logits, sink], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)[..., : k.shape[1]].astype(v.dtype)
    return jnp.einsum("NKgTS,NSKh->NTKgh", weights, v).reshape(rows, length, heads, -1)


def xla(
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
) -> Float[Array, "N T H v"]:
    """Attend by plain matrix products; the [N, H, T, T] weights are held.

    Args:
        q, k, v: queries, keys (both already rotated) and values.
        segment_ids, positions, prefix_ids: as in core.schema.Batch.
        window: tokens a query sees, itself included; None = all.
        softcap: logits become softcap * tanh(logits / softcap); 0 = off.
        scale: factor on q k.
        sinks: a further logit for each head, which takes its share of the softmax and adds nothing.
    """
    allowed = mask(segment_ids, positions, prefix_ids, window)
    return weighted(q, k, v, allowed, scale=scale, softcap=softcap, sinks=sinks)


def blocks(
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
    block: int = 256,
) -> Float[Array, "N T H v"]:
    """Attend as ``xla`` does, ``block`` queries at a time: [N, H, block, T] weights are held,
    recomputed backwards."""
    rows, length, heads, _ = q.shape
    if length <= block:
        allowed = mask(segment_ids, positions, prefix_ids, window)
        return weighted(q, k, v, allowed, scale=scale, softcap=softcap, sinks=sinks)
    extra = -length % block

    def split(x: jax.Array) -> jax.Array:  # [N, T, ...] -> [T / block, N, block, ...]
        x = jnp.pad(x, ((0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, -1, block, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def attend(args: tuple) -> jax.Array:
        q, segments, places, prefixes, index = args
        allowed = _allowed((segments, places, prefixes), index, segment_ids, positions, window)
        return weighted(q, k, v, allowed, scale=scale, softcap=softcap, sinks=sinks)

    queries = (
        split(q),
        split(segment_ids),
        split(positions),
        None if prefix_ids is None else split(prefix_ids),
        jnp.arange(length + extra).reshape(-1, block),
    )
    out = jax.lax.map(attend, queries)  # [T / block, N, block, H, h]
    return jnp.moveaxis(out, 0, 1).reshape(rows, length + extra, heads, -1)[:, :length]


def segments(
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
) -> Float[Array, "N T H v"]:
    """Attend by blocks that follow the segments; short rows, and rows that are split over a mesh's
    sequence axis, by plain products."""
    mesh = jax.sharding.get_abstract_mesh()
    split = not mesh.empty and mesh.shape["sequence"] > 1
    short = q.shape[1] <= 2 * segment_attention.BLOCK
    return (xla if split or short else segment_attention.attend)(
        q,
        k,
        v,
        segment_ids=segment_ids,
        positions=positions,
        prefix_ids=prefix_ids,
        window=window,
        softcap=softcap,
        scale=scale,
        sinks=sinks,
    )


def splash(
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
) -> Float[Array, "N T H v"]:
    """Attend by the TPU's splash kernels; what they lack, a window over shared prefixes, goes by
    blocks."""
    if window is not None and prefix_ids is not None:
        return blocks(
            q,
            k,
            v,
            segment_ids=segment_ids,
            positions=positions,
            prefix_ids=prefix_ids,
            window=window,
            softcap=softcap,
            scale=scale,
            sinks=sinks,
        )
    from align_jax.models import splash_attention  # here, because importing Pallas takes long

    return splash_attention.splash(
        q,
        k,
        v,
        segment_ids=segment_ids,
        prefix_ids=prefix_ids,
        window=window,
        softcap=softcap,
        scale=scale,
        sinks=sinks,
    )


def cudnn(
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
) -> Float[Array, "N T H v"]:
    """Attend by cuDNN's fused kernels (Ampere or newer; h at most 128, on Hopper 256).

    Their mask is an [N, 1, T, T] array; the weights are never held.  What they lack, float32, soft
    caps, sinks and values of another width than keys, goes by blocks.
    """
    plain = not softcap and sinks is None and q.shape[-1] == v.shape[-1]
    if not plain or q.dtype == jnp.float32:
        return blocks(
            q,
            k,
            v,
            segment_ids=segment_ids,
            positions=positions,
            prefix_ids=prefix_ids,
            window=window,
            softcap=softcap,
            scale=scale,
            sinks=sinks,
        )
    allowed = mask(segment_ids, positions, prefix_ids, window)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=allowed, scale=scale, implementation="cudnn")


ATTENTION: Mapping[str, Callable[..., jax.Array]] = {
    "xla": xla,
    "blocks": blocks,
    "segments": segments,
    "splash": splash,
    "cudnn": cudnn,
}
FASTEST: Mapping[str, str] = {"cpu": "segments", "gpu": "cudnn", "tpu": "splash"}  # by backend


def named(name: str) -> str:
    """Return the implementation's name; for "auto" that of the default backend's fastest."""
    return FASTEST.get(jax.default_backend(), "blocks") if name == "auto" else name


def implementation(name: str) -> Callable[..., jax.Array]:
    """Return the implementation of this name; "auto" is the best one for the default backend.

    Raises:
        ValueError: an unknown name.
    """
    return choose(ATTENTION, named(name), "attention")
