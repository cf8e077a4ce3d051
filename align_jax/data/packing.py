# SPDX-License-Identifier: Apache-2.0
"""Packing: which groups share a row."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

FILLER = -1  # stands for no group


def best_fit(
    lengths: Sequence[int],
    capacity: int,
    max_items: int,
    *,
    loads: Sequence[int] | None = None,
    max_load: int = 0,
) -> list[list[int]]:
    """Pack items into bins: the longest first, each into the fullest bin that still has room.

    Args:
        lengths: tokens of each item, at most ``capacity``.
        capacity: tokens in a bin.
        max_items: the most items in a bin.
        loads: a second measure of each item (its loss tokens); None: there is none.
        max_load: the most of it in a bin of several items.

    Returns:
        Bins of item numbers.

    >>> best_fit([5, 4, 3, 2, 2], capacity=8, max_items=3)
    [[0, 2], [1, 3, 4]]
    >>> best_fit([5, 4, 3, 2, 2], capacity=8, max_items=3, loads=[4, 2, 3, 1, 1], max_load=5)
    [[0, 3], [1, 2], [4]]
    """
    bins: list[list[int]] = []
    loaded: list[int] = []
    # (tokens left, bin) of the bins that still take items, ascending: the first with enough is the
    # fullest, found by bisection
    room: list[tuple[int, int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load = 0 if loads is None else loads[item]
        at = bisect.bisect_left(room, (lengths[item], -1))
        while at < len(room) and loads is not None and loaded[room[at][1]] + load > max_load:
            at += 1
        if at < len(room):
            left, chosen = room.pop(at)
            bins[chosen].append(item)
            loaded[chosen] += load
        else:
            left, chosen = capacity, len(bins)
            bins.append([item])
            loaded.append(load)
        left -= lengths[item]
        if left and len(bins[chosen]) < max_items:
            bisect.insort(room, (left, chosen))
    return bins


def mean_groups(lengths: Sequence[int], loss_tokens: Sequence[int], row_length: int) -> float:
    """Return how many groups a packed row holds on average, as many as fit of such groups."""
    load = _max_load(lengths, loss_tokens, row_length)
    packed = best_fit(lengths, row_length, len(lengths), loads=loss_tokens, max_load=load)
    return len(lengths) / len(packed)


def _max_load(lengths: Sequence[int], loss_tokens: Sequence[int], row_length: int) -> int:
    """Return the most loss tokens that a row of several groups may hold; see ``make_bins``."""
    return max(max(loss_tokens), int(1.2 * sum(loss_tokens) * row_length / sum(lengths)))


def make_bins(
    groups: Sequence[int],
    lengths: Sequence[int],
    loss_tokens: Sequence[int],
    row_length: int,
    group_slots: int,
) -> Int[np.ndarray, "bins slots"]:
    """Pack groups into rows, evening out the loss tokens.

    The head's budget P is the most loss tokens in any row, so rows may hold a fifth more than the
    average (or the one group that has the most): on real pairs that halves P and costs 1 to 4 %
    more rows.

    Args:
        groups: their numbers.
        lengths: tokens of each.
        loss_tokens: of each.
        row_length: T.
        group_slots: the most groups in a row.

    Returns:
        Group numbers, FILLER in slots left over.
    """
    if group_slots == 1:
        return np.asarray(groups, np.int64)[:, None]
    load = _max_load(lengths, loss_tokens, row_length)
    packed = best_fit(lengths, row_length, group_slots, loads=loss_tokens, max_load=load)
    bins = np.full((len(packed), group_slots), FILLER, np.int64)
    # in the order of the data, as far as packing leaves it, for those who do not shuffle
    for number, items in enumerate(sorted(map(sorted, packed))):
        bins[number, : len(items)] = [groups[item] for item in items]
    return bins
