# SPDX-License-Identifier: Apache-2.0
"""Data sets as a whole: what is held out."""

import collections

import pytest

from align_jax.core.schema import Example
from align_jax.data import datasets


def examples(prompts=12, each=3):
    """Prompts with several responses each, from two sources."""
    items = tuple(
        Example(f"prompt {number % prompts}", (f"response {number}",))
        for number in range(prompts * each)
    )
    return datasets.Examples("completions", items, (10, len(items)), (0.5, 0.5), "digest", {})


@pytest.mark.parametrize("fraction, most, held", [(0.25, 0, 9), (0.3, 0, 12), (0.5, 5, 6)])
def test_a_held_out_prompt_is_held_out_with_all_its_examples(fraction, most, held):
    whole = examples()
    train, held_out = datasets.hold_out(whole, fraction, most=most, seed=1)
    counts = collections.Counter(example.prompt for example in held_out.items)
    assert set(counts.values()) == {3} and len(held_out) == held
    assert not counts.keys() & {example.prompt for example in train.items}
    assert sorted([*train.items, *held_out.items], key=whole.items.index) == list(whole.items)


def test_each_part_knows_where_its_sources_end():
    whole = examples()
    for part in datasets.hold_out(whole, 0.25, most=0, seed=1):
        first = sum(example in part.items for example in whole.items[:10])
        assert part.ends == (first, len(part)) and part.digest != whole.digest
