# SPDX-License-Identifier: Apache-2.0
"""Packing: which groups share a row."""

from __future__ import annotations

import bisect
import heapq
import math
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
    """Pack items into bins: the longest first, each into the fullest bin that still has room, of
    equally full ones into the least loaded.

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
    # of the bins that still take items, by the tokens left in them: the least loaded first
    room: dict[int, list[tuple[int, int]]] = {}
    places: list[int] = []  # its keys, sorted: few, for nearly all bins are full
    for item in np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist():
        load = 0 if loads is None else loads[item]
        at = bisect.bisect_left(places, lengths[item])
        while at < len(places) and room[places[at]][0][0] > max_load - load:
            at += 1
        if at == len(places):
            left, held, chosen = capacity, 0, len(bins)
            bins.append([])
        else:
            left = places[at]
            held, chosen = heapq.heappop(room[left])
            if not room[left]:
                del room[left], places[at]
        bins[chosen].append(item)
        left -= lengths[item]
        if left and len(bins[chosen]) < max_items:
            if left not in room:
                room[left] = []
                bisect.insort(places, left)
            heapq.heappush(room[left], (held + load, chosen))
    return bins


def group_slots(mean_groups: float) -> int:
    """Return how many groups a packed row has room for: one, or twice the average.

    Rows of short groups hold more than the average; empty slots cost next to nothing.
    """
    return 1 if mean_groups == 1 else math.ceil(2 * mean_groups)


def mean_groups(
    sources: Sequence[tuple[Sequence[int], Sequence[int]]],
    weights: Sequence[float],
    row_length: int,
) -> float:
    """Return how many groups a packed row holds on average.

    As many as fit into its length, and into the ``group_slots`` of that average.

    Args:
        sources: of the data, whose groups share no row: each group's tokens and loss tokens.
        weights: of the sources, by which groups are drawn from them.
        row_length: T.
    """
    slots = sum(len(lengths) for lengths, _ in sources)
    while True:
        counts = []
        for lengths, loss in sources:
            load = _max_load(lengths, loss, row_length)
            counts.append(len(best_fit(lengths, row_length, slots, loads=loss, max_load=load)))
        mean = mixed([len(lengths) for lengths, _ in sources], counts, weights)
        if group_slots(mean) >= slots:
            return mean
        slots = group_slots(mean)


def mixed(groups: Sequence[int], rows: Sequence[int], weights: Sequence[float]) -> float:
    """Return how many groups a row has on average where sources are mixed by the groups' weights.

    >>> mixed([8, 8], [2, 4], [1.0, 1.0])
    2.6666666666666665
    """
    means = [count / number for count, number in zip(groups, rows, strict=True)]
    return sum(weights) / sum(weight / mean for weight, mean in zip(weights, means, strict=True))


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


def divide(bins: Int[np.ndarray, "bins slots"], count: int) -> Int[np.ndarray, "more slots"]:
    """Divide the bins of most groups in two, until there are ``count`` or one group in each."""
    heap = [(-int((bin != FILLER).sum()), number) for number, bin in enumerate(bins)]
    heapq.heapify(heap)
    found = list(bins)
    while len(found) < count and heap[0][0] < -1:
        size, number = heapq.heappop(heap)
        new = np.full_like(found[number], FILLER)
        kept, moved = -(size // 2), -size // 2
        new[:moved], found[number][kept:] = found[number][kept:-size], FILLER
        heapq.heappush(heap, (-kept, number))
        heapq.heappush(heap, (-moved, len(found)))
        found.append(new)
    return np.stack(found)


def equal_bins(
    groups: Int[np.ndarray, "G"], lengths: Int[np.ndarray, "G"], count: int
) -> Int[np.ndarray, "bins count"]:
    """Pack groups into rows of exactly ``count``, as even as can be; the last ones, which are too
    few for a row, are left out.

    Args:
        groups: their numbers.
        lengths: tokens of each.
        count: of groups in a row.

    Returns:
        Group numbers.

    >>> equal_bins(np.arange(5), np.array([10, 6, 5, 1, 9]), count=2)
    array([[0, 3],
           [1, 2]])
    """
    rows = len(groups) // count
    sizes = lengths[: rows * count]
    order = np.argsort(-sizes, kind="stable").reshape(count, rows)
    bins, loads = np.zeros((rows, count), np.int64), np.zeros(rows, np.int64)
    for turn, items in enumerate(order):  # the longest of each turn into the emptiest row
        emptiest = np.argsort(loads, kind="stable")
        bins[emptiest, turn] = items
        loads[emptiest] += sizes[items]
    bins = np.sort(bins, axis=1)
    return groups[bins[np.argsort(bins[:, 0])]]
