# SPDX-License-Identifier: Apache-2.0
"""The key-value cache of generation: what each row has seen, slot by slot.

Rows advance on their own: a row's next token goes to its own next free slot, whatever the other
rows' lengths.  Where every layer has a window, the slots are a ring: token t of a row stands in
slot t % C, over the token that no window reaches any more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Cache(NamedTuple):
    """Keys and values of the tokens seen; C slots a row.

    Of latent attention K is 1: the latents stand for keys, the key that heads share for values.
    """

    keys: Float[Array, "L N C K h"]
    values: Float[Array, "L N C K v"]
    segment_ids: Int[Array, "N C"]  # 0 = empty
    positions: Int[Array, "N C"]
    length: Int[Array, "N"]  # tokens seen


# logical axes, in the order of the fields
AXES: tuple[tuple[str | None, ...], ...] = (
    ("layers", "rows", None, "kv_heads", "head"),
    ("layers", "rows", None, "kv_heads", "head"),
    ("rows", None),
    ("rows", None),
    ("rows",),
)


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


def repeat(cache: Any, times: int) -> Any:
    """Return a cache (or a tree of them) with each row ``times`` times in a row: samples that share
    one prefill."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=1 if x.ndim == 5 else 0), cache)
