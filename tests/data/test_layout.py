# SPDX-License-Identifier: Apache-2.0
"""Truncation keeps what it promises, packing fits, and rows say of every token what precedes it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align_jax.data.layout import BatchShape, TokenizedGroup, make_batch
from align_jax.data.packing import best_fit
from align_jax.data.truncation import Limits, truncate

# prompt, responses, turn, tail, options -> head, tail, lengths, reason; max_length 20
TRUNCATIONS = [
    (10, (10, 4), 0, 2, {}, (10, 0, (10, 4), "")),  # it fits exactly
    (14, (10, 4), 9, 2, {}, (0, 10, (10, 4), "")),  # the prompt's start goes
    # its end goes, but not the header
    (14, (10, 4), 9, 2, {"policy": "keep_start"}, (8, 2, (10, 4), "")),
    (14, (10, 4), 9, 2, {"policy": "drop"}, (14, 0, (10, 4), "too long")),
    (14, (10, 4), 9, 2, {"bos": True}, (1, 9, (10, 4), "")),  # the first token stays
    # the last turn (12) stays; the response loses its end
    (30, (18, 4), 18, 2, {}, (0, 12, (8, 4), "")),
    (30, (18, 4), 2, 2, {}, (0, 15, (5, 4), "")),  # a last turn of 28 leaves the response a quarter
    (30, (3, 2), 2, 2, {}, (0, 17, (3, 2), "")),
    (6, (18, 2), 0, 2, {}, (6, 0, (14, 2), "")),  # the prompt is one turn
    (10, (4,), 0, 2, {"max_prompt_length": 6}, (0, 6, (4,), "")),
    (10, (40,), 0, 2, {"max_prompt_length": 6}, (0, 6, (14,), "")),
]


def cut(prompt, responses, turn, tail, bos=False, max_length=20, **limits):
    ids = np.full(prompt, 7, np.int32)
    ids[:1] = 1 if bos else 7
    limits = Limits(max_length, bos_id=1, **limits)
    return truncate(ids, responses, limits, last_turn=turn, header=tail)


@pytest.mark.parametrize("prompt, responses, turn, tail, options, expected", TRUNCATIONS)
def test_truncation(prompt, responses, turn, tail, options, expected):
    left = cut(prompt, responses, turn, tail, **options)
    assert (left.head, left.tail, left.lengths, left.reason) == expected


@settings(max_examples=300, deadline=None)
@given(
    prompt=st.integers(0, 60),
    responses=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    turn=st.integers(0, 60),
    tail=st.integers(0, 5),
    bos=st.booleans(),
    max_length=st.integers(2, 50),
    policy=st.sampled_from(("keep_start", "keep_end")),
)
def test_what_truncation_leaves_always_fits(prompt, responses, turn, tail, bos, max_length, policy):
    left = cut(
        prompt, responses, min(turn, prompt), min(tail, prompt), bos, max_length, policy=policy
    )
    if left.reason:
        assert max_length < 12  # only where the header alone leaves no room
        return
    assert left.head >= 0 and left.tail >= 0 and left.head + left.tail <= prompt
    assert left.head + left.tail + max(left.lengths) <= max_length
    assert all(1 <= after <= before for after, before in zip(left.lengths, responses))
    if prompt + max(responses) <= max_length:
        assert left.head + left.tail == prompt and left.lengths == tuple(responses)


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), max_size=60), limit=st.integers(1, 6))
def test_best_fit_places_every_item_once_and_overfills_nothing(lengths, limit):
    rows = best_fit(lengths, 40, limit)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in row) <= 40 and len(row) <= limit for row in rows)
    if limit >= len(lengths):  # best fit decreasing: at most 11/9 of the optimum and one row
        assert len(rows) <= 11 / 9 * -(-sum(lengths) // 40) * 2 + 1


def row_of(layout, prompt, responses, length=24):
    """Write the same group twice into a row: field -> values."""
    group = TokenizedGroup(
        np.array(prompt, np.int32),
        tuple((np.array(ids, np.int32), np.array(mask, bool)) for ids, mask in responses),
    )
    each = len(responses)
    shape = BatchShape(1, length, 8, slots=2 * each, groups=2, responses=each)
    batch = make_batch([[group, group]], shape, layout, pad=0, weight=np.ones(2, np.float32))
    fields = {name: value for name, value in batch._asdict().items() if value is not None}
    by_response = {
        name: fields.pop(name).reshape(-1).tolist() for name in ("lengths", "last_index")
    }
    return {name: value[0].tolist() for name, value in fields.items()} | by_response


def test_a_packed_row():
    field = row_of("packed", [5, 6], [([7, 8], [1, 1]), ([9], [1])])
    assert field["tokens"] == [5, 6, 7, 8, 5, 6, 9] * 2 + [0] * 10
    assert field["segment_ids"] == [1] * 4 + [2] * 3 + [3] * 4 + [4] * 3 + [0] * 10
    assert field["positions"] == [0, 1, 2, 3, 0, 1, 2] * 2 + [0] * 10
    assert field["source_index"] == [0, 0, 1, 2, 0, 4, 5, 0, 7, 8, 9, 0, 11, 12] + [0] * 10
    assert field["loss_index"] == [2, 3, 6, 9, 10, 13, 24, 24]
    assert [field["slot"][t] for t in field["loss_index"][:6]] == [0, 0, 1, 2, 2, 3]
    assert field["lengths"] == [2, 1, 2, 1] and field["last_index"] == [3, 6, 10, 13]
    assert "prefix_ids" not in field


def test_a_shared_prefix_row():
    field = row_of("shared_prefix", [5, 6], [([7, 8], [0, 1]), ([9], [1])])
    assert field["tokens"] == [5, 6, 7, 8, 9] * 2 + [0] * 14
    assert field["segment_ids"] == [1, 1, 2, 2, 3, 4, 4, 5, 5, 6] + [0] * 14
    assert field["prefix_ids"] == [0, 0, 1, 1, 1, 0, 0, 4, 4, 4] + [0] * 14
    assert field["positions"] == [0, 1, 2, 3, 2] * 2 + [0] * 14
    assert field["source_index"] == [0, 0, 1, 2, 1, 0, 5, 6, 7, 6] + [0] * 14
    assert field["loss_index"] == [3, 4, 8, 9, 24, 24, 24, 24]
    assert field["lengths"] == [1, 1, 1, 1] and field["last_index"] == [3, 4, 8, 9]


def test_a_shared_prefix_row_without_a_prompt():
    field = row_of("shared_prefix", [], [([7, 8], [0, 1])])
    assert sum(field["prefix_ids"]) == 0
    assert field["source_index"][:4] == [0, 0, 0, 2]
