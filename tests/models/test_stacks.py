# SPDX-License-Identifier: Apache-2.0
"""Layers of unlike kinds are run in few loops, and what is compiled does not grow with them."""

import jax
import jax.numpy as jnp
import pytest

from align_jax.interop.hf import config_of
from align_jax.models.model import build
from align_jax.models.stacks import stacks


@pytest.mark.parametrize(
    "kinds, expected",
    [
        ("eeee", [("layers", "e", 4)]),
        ("dddeeeee", [("layers0", "d", 3), ("layers3", "e", 5)]),
        ("deeeeeee", [("layers0", "d", 1), ("layers1", "e", 7)]),
        ("dededed", [("layers0", "de", 3), ("layers6", "d", 1)]),
        ("lllflllflllf", [("layers", "lllf", 3)]),
        ("eedee", [("layers0", "e", 2), ("layers2", "d", 1), ("layers3", "e", 2)]),
    ],
)
def test_layers_are_parted_into_few_stacks(kinds, expected):
    found = stacks(kinds)
    assert [(stack.name, "".join(stack.kinds), stack.count) for stack in found] == expected
    held = [n for stack in found for place in range(len(stack.kinds)) for n in stack.layers(place)]
    assert sorted(held) == list(range(len(kinds)))
    assert all(
        kinds[n] == s.kinds[i] for s in found for i in range(len(s.kinds)) for n in s.layers(i)
    )


FIELDS = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    global_head_dim=16,
    hidden_size_per_layer_input=0,
)


def test_depth_costs_no_program():
    """What is compiled of a pattern of unlike layers has the same length at any depth."""

    def length(turns):
        types = ["sliding_attention", "full_attention"] * turns
        fields = FIELDS | {"layer_types": types, "num_hidden_layers": len(types)}
        model = build(config_of("gemma4_text", fields))
        row = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        return len(jax.jit(model.hidden).lower(model.shapes(), row, row, row).as_text())

    assert length(24) < 1.01 * length(2)
