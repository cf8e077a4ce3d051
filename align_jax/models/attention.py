# SPDX-License-Identifier: Apache-2.0
"""Attention over rows of segments: one signature, one table of implementations, all equal on the same inputs.

A query attends to the keys at or before its own index that have its segment id, or the one its prefix id names
(a prompt stored once, shared by several responses).  Padding (segment 0) attends to padding alone, so no row of the
mask is empty.  With a window, a key must be fewer than ``window`` positions back.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def mask(segment_ids: Int[Array, "N T"], positions: Int[Array, "N T"], prefix_ids: Int[Array, "N T"] | None = None,
         window: int | None = None) -> Bool[Array, "N T T"]:
    """Return which keys (last axis) each query (middle axis) attends to."""
    length = segment_ids.shape[1]
    index = jnp.arange(length)
    allowed = segment_ids[:, :, None] == segment_ids[:, None, :]
    if prefix_ids is not None:
        allowed |= (prefix_ids[:, :, None] == segment_ids[:, None, :]) & (prefix_ids > 0)[:, :, None]
    allowed &= (index[:, None] >= index[None, :])[None]
    if window is not None:
        # positions, not indices: a response may stand far behind the prompt it continues
        allowed &= positions[:, :, None] - positions[:, None, :] < window
    return allowed


def weighted(q: Float[Array, "N T H h"], k: Float[Array, "N S K h"], v: Float[Array, "N S K h"],
             allowed: Bool[Array, "N T S"], *, scale: float, softcap: float = 0.0) -> Float[Array, "N T H h"]:
    """Return softmax(cap(scale q k)) v with logits, cap and softmax in float32; H a multiple of K."""
    rows, length, heads, width = q.shape
    groups = k.shape[2]
    q = q.reshape(rows, length, groups, heads // groups, width)
    logits = jnp.einsum("NTKgh,NSKh->NKgTS", q, k, preferred_element_type=jnp.float32) * scale
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(allowed[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("NKgTS,NSKh->NTKgh", weights, v).reshape(rows, length, heads, width)


def xla(q: Float[Array, "N T H h"], k: Float[Array, "N T K h"], v: Float[Array, "N T K h"], *,
        segment_ids: Int[Array, "N T"], positions: Int[Array, "N T"], prefix_ids: Int[Array, "N T"] | None = None,
        window: int | None = None, softcap: float = 0.0, scale: float = 1.0) -> Float[Array, "N T H h"]:
    """Attend by plain matrix products; the [N, H, T, T] weights are held.

    Args:
        q, k, v: queries, keys (both already rotated) and values.
        segment_ids, positions, prefix_ids: as in core.schema.Batch.
        window: tokens a query sees, itself included; None = all.
        softcap: logits become softcap * tanh(logits / softcap); 0 = off.
        scale: factor on q k.
    """
    return weighted(q, k, v, mask(segment_ids, positions, prefix_ids, window), scale=scale, softcap=softcap)


ATTENTION: Mapping[str, Callable[..., jax.Array]] = {
    "xla": xla,
}


def choose(name: str) -> Callable[..., jax.Array]:
    """Return the implementation of this name; "auto" is the best one for the default backend.

    Raises:
        KeyError: an unknown name.
    """
    if name == "auto":
        name = "xla"
    if name not in ATTENTION:
        raise KeyError(f"unknown attention {name!r}; known: auto, {', '.join(ATTENTION)}")
    return ATTENTION[name]
