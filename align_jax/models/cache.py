# SPDX-License-Identifier: Apache-2.0
"""The key-value cache of generation: what each row has seen, slot by slot.

Rows advance on their own: a row's next token goes to its own next free slot, whatever the other rows' lengths.
"""
from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Cache(NamedTuple):
    """Keys and values of the tokens seen; C slots a row."""

    keys: Float[Array, "L N C K h"]
    values: Float[Array, "L N C K h"]
    segment_ids: Int[Array, "N C"]  # 0 = empty
    positions: Int[Array, "N C"]
    length: Int[Array, "N"]  # the next free slot


AXES = Cache(keys=("layers", "rows", None, "kv_heads", "head"), values=("layers", "rows", None, "kv_heads", "head"),
             segment_ids=("rows", None), positions=("rows", None), length=("rows",))


def repeat(cache: Cache, times: int) -> Cache:
    """Return the cache with each row ``times`` times in a row: samples that share one prefill."""
    return Cache(*(jnp.repeat(x, times, axis=1 if x.ndim == 5 else 0) for x in cache))
