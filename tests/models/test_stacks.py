# SPDX-License-Identifier: Apache-2.0
"""Layers of unlike kinds are run in few loops."""

import pytest

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
