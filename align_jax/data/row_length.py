# SPDX-License-Identifier: Apache-2.0
"""The layout and the row length that cost least, counted from the lengths of the data.

A row of T tokens costs T + a T² of a token's matrix products, where a is what attention of one
query to one key costs beside them; 0 where the kernel computes no other segments, so that a group's
attention costs the same in any row.  Long rows waste little room and much attention, short ones the
other way round.  Of each number of rows that a step may have there is one length at which they
hold ``batch_size`` groups on average, or somewhat more, of which packing then puts less into a row;
the cheapest of these is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from align_jax.data.layout import packed_rows

TRIED = 6  # numbers of rows
EXACT, NEAR = 0.01, 0.1  # of batch_size: how far from it a step may be; farther is no choice


class Rows(NamedTuple):
    """The rows of a step.

    Attributes:
        layout: a key of ``data.layout.LAYOUTS``.
        length: T.
        mean: groups that a row has room for, on average.
        cost: of a group, in tokens' matrix products.
    """

    layout: str
    length: int
    mean: float
    cost: float


def cost(length: float | int, attention_cost: float) -> float:
    """Return what a row costs, in tokens' matrix products.

    >>> cost(1000, 0.001)
    2000.0
    """
    return length + attention_cost * length**2


def solve(
    layout: str,
    lengths: Int[np.ndarray, "G"],
    mean_at: Callable[[int], float],
    *,
    batch_size: int,
    row_multiple: int,
    attention_cost: float,
) -> Rows | None:
    """Find the packed rows that cost least and hold ``batch_size`` groups in a step.

    Args:
        layout: of the rows.
        lengths: tokens of each group in one row.
        mean_at: row length -> groups that such a row holds on average.
        batch_size: groups in a step.
        row_multiple: rows of a step come in multiples of this.
        attention_cost: see ``cost``.

    Returns:
        The rows; None where no number of rows holds nearly so many groups.
    """
    longest, average, found = int(lengths.max()), float(lengths.mean()), []
    # so few rows that they are long enough for the longest group, and no fewer than the data fill
    most = int(batch_size * average / (0.9 * longest)) // row_multiple
    least = -(-batch_size // (row_multiple * len(lengths)))
    counts = range(least, min(most, batch_size // row_multiple) + 1)
    tried = [count * row_multiple for count in counts[:: max(1, -(-len(counts) // TRIED))]]
    for count in [*tried, *([batch_size] if batch_size % row_multiple == 0 else [])]:
        length, mean = _length_for(batch_size / count, longest, average, mean_at)
        wanted = batch_size / packed_rows(batch_size, mean, row_multiple)
        off = max(0.0, 1 - mean / wanted)
        if off <= NEAR:
            paid = cost(length, attention_cost) / min(mean, wanted)
            one = Rows(layout, length, mean, paid)
            found.append((off > EXACT, one.cost, one))
    return min(found)[-1] if found else None


def _length_for(
    wanted: float, longest: int, average: float, mean_at: Callable[[int], float]
) -> tuple[int, float]:
    """Return the least row length found, at least ``longest``, whose mean is the one wanted or
    more; where there is none the one nearest to it."""

    def even(length: float | int) -> int:  # in steps of a hundredth or less
        unit = max(8, 2 ** int(np.log2(max(length, 128) / 128)))
        return -(-int(np.ceil(length)) // unit) * unit

    low, high = even(longest), even(max(longest, 2 * wanted * average))
    tried = {low: mean_at(low), high: mean_at(high)}
    while tried[low] < wanted < tried[high]:
        middle = even((low + high) / 2)
        if middle in tried:
            break
        tried[middle] = mean_at(middle)
        low, high = (middle, high) if tried[middle] < wanted else (low, middle)
    enough = [one for one in tried.items() if one[1] >= wanted]
    return min(enough) if enough else max(tried.items(), key=lambda one: one[1])
