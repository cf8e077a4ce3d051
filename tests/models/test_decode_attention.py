# SPDX-License-Identifier: Apache-2.0
"""Attention of a new token to its cache."""

import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.models import decode_attention
from align_jax.models.attention import weighted


@pytest.mark.parametrize("slots", [9, 150])  # less than a block; two, and a part of a third
@pytest.mark.parametrize("softcap, sunk", [(0.0, False), (3.0, True)])
def test_row_by_row_equals_all_rows_at_once(slots, softcap, sunk):
    rng = np.random.default_rng(0)
    q, keys, values = (
        jnp.asarray(rng.normal(size=size), jnp.float32)
        for size in ((3, 1, 4, 8), (2, 3, slots, 2, 8), (2, 3, slots, 2, 6))
    )
    index = np.arange(slots)
    allowed = np.stack([index <= slots // 2, index >= slots - 3, rng.random(slots) < 0.3])
    allowed[2, 5] = True
    sinks = jnp.asarray(rng.normal(size=4), jnp.float32) if sunk else None
    numbers = {"scale": 0.4, "softcap": softcap, "sinks": sinks}
    place, seen = jnp.asarray(1), jnp.asarray(allowed)
    found = decode_attention.attend(q, keys, values, place, seen, **numbers)
    wanted = weighted(q, keys[1], values[1], seen[:, None], **numbers)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
