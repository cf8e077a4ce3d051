# SPDX-License-Identifier: Apache-2.0
"""The cache of generation: each row's keys and values, slot by slot, and its layers' states.

Rows advance on their own: a row's next token goes to its own next free slot, whatever the other
rows' lengths.  Where every layer has a window, the slots are a ring: token t of a row stands in
slot t % C, over the token that no window reaches any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Held(NamedTuple):
    """What the layers keep of the tokens seen: C slots a row of those that attend, a state and the
    last inputs of their convolution of those that follow the delta rule.

    Of latent attention K is 1: the latents stand for keys, the key that heads share for values.
    Over whole rows, ``last`` has the keys and values of the last layer of each shape, which later
    layers reuse; no cache holds them.
    """

    keys: Float[Array, "L N C K h"] | None = None
    values: Float[Array, "L N C K v"] | None = None
    states: Float[Array, "l N g r n o"] | None = None
    inputs: Float[Array, "l N s g m"] | None = None
    wide_keys: Float[Array, "i N C k w"] | None = None
    wide_values: Float[Array, "i N C k w"] | None = None
    last: dict[str, tuple[jax.Array, jax.Array]] | None = None


class Cache(NamedTuple):
    """What was seen, and of which tokens."""

    held: Held
    segment_ids: Int[Array, "N C"]  # 0 = empty
    positions: Int[Array, "N C"]
    length: Int[Array, "N"]  # tokens seen


# logical axes of each field
AXES: Mapping[str, tuple[str | None, ...]] = {
    "keys": ("layers", "rows", None, "kv_heads", "head"),
    "values": ("layers", "rows", None, "kv_heads", "head"),
    "wide_keys": ("layers", "rows", None, "kv_heads", "head"),
    "wide_values": ("layers", "rows", None, "kv_heads", "head"),
    "states": ("layers", "rows", "heads", None, None, None),
    "inputs": ("layers", "rows", None, "heads", None),
    "segment_ids": ("rows", None),
    "positions": ("rows", None),
    "length": ("rows",),
}


def axes(cache: Cache) -> Any:
    """Return a cache's logical axes, parallel to it."""
    held = (None if x is None else AXES[name] for name, x in cache.held._asdict().items())
    return Cache._make([Held._make(held), *(AXES[name] for name in Cache._fields[1:])])


def slots(windows: tuple[int, ...], length: int) -> int:
    """Return how many slots rows of up to ``length`` tokens need, given the layers' windows (0 =
    none)."""
    return min(length, max(windows)) if all(windows) else length


def is_ring(windows: tuple[int, ...], slots: int) -> bool:
    """Tell whether a cache of so many slots may be written round and round."""
    return all(windows) and slots >= max(windows)


def held(ends: Int[Array, "N"], slots: int) -> Int[Array, "N C"]:
    """Return which of a row's tokens [0, end) each slot holds when the row was written round and
    round; -1 = none."""
    slot = jnp.arange(slots, dtype=jnp.int32)[None]
    return jnp.maximum(slot + slots * ((ends[:, None] - 1 - slot) // slots), -1)


def taken(x: jax.Array, tokens: Int[Array, "N C"]) -> jax.Array:
    """Return x [N, T, ...] at these tokens, zero where there is none."""
    index = jnp.expand_dims(tokens, tuple(range(2, x.ndim)))
    return jnp.where(index >= 0, jnp.take_along_axis(x, jnp.maximum(index, 0), axis=1), 0)


def rewound(cache: Cache, length: Int[Array, "N"]) -> Cache:
    """Return a cache in which each row has seen its first ``length`` tokens alone."""
    index = jnp.arange(cache.segment_ids.shape[1])[None]
    segment_ids = jnp.where(index < length[:, None], cache.segment_ids, 0)
    return cache._replace(segment_ids=segment_ids, length=length)


def rewinds(cache: Any, length: int) -> bool:
    """Tell whether a cache (or a tree of them) keeps ``length`` tokens each for itself, so that it
    can be ``rewound``: it is no ring, and holds no state of all that was seen."""
    return all(x.shape[2] == length for x in jax.tree.leaves(cache) if x.ndim > 2)


def repeat(cache: Any, times: int) -> Any:
    """Return a cache (or a tree of them) with each row ``times`` times in a row: samples that share
    one prefill."""
    return _by_rows(cache, lambda x, axis: jnp.repeat(x, times, axis=axis))


def take(cache: Any, rows: Int[Array, "n"]) -> Any:
    """Return a cache (or a tree of them) of these rows alone."""
    return _by_rows(cache, lambda x, axis: jnp.take(x, rows, axis=axis))


def _by_rows(cache: Any, change: Callable[[jax.Array, int], jax.Array]) -> Any:
    """Change each array of a cache (or of a tree of them) along its axis of rows."""

    def one(cache: Cache) -> Any:
        return jax.tree.map(lambda x, names: change(x, names.index("rows")), cache, axes(cache))

    return jax.tree.map(one, cache, is_leaf=lambda x: isinstance(x, Cache))
