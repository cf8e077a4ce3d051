# SPDX-License-Identifier: Apache-2.0
"""What a judge of pairs makes of a prompt's completions: how often each is the better one.

    facing        sample i meets what was drawn against it:  p_i, and 1 - p_i of the other
    round robin   each meets each of the others:             the mean of its p

p is 1, ¾, ½, ¼ or 0 by what the judge said in both orders.  Two equal texts are a tie, and are not
asked about.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from align_jax.online.judges import Verdicts

Judge = Callable[[Sequence[str], Sequence[str], Sequence[str]], Verdicts]


class Compared(NamedTuple):
    """What was said of one prompt's completions.

    Attributes:
        wins: how often each of them is better, from 0 to 1.
        pairs: how many met.
        ties, disagreements, silent: how many of these as ``judges.Verdicts`` counts them.
    """

    wins: Float[np.ndarray, "m"]
    pairs: int
    ties: int
    disagreements: int
    silent: int


def meetings(own: int, others: int, *, facing: bool) -> list[tuple[int, int]]:
    """Say which of a prompt's completions meet: own ones first, then the others.

    >>> meetings(2, 2, facing=True), meetings(3, 0, facing=False)
    ([(0, 2), (1, 3)], [(0, 1), (0, 2), (1, 2)])
    """
    if facing:
        return [(i, own + i % others) for i in range(own)]
    return list(itertools.combinations(range(own + others), 2))


def compare(
    judge: Judge,
    prompts: Sequence[str],
    completions: Sequence[Sequence[str]],
    own: int,
    *,
    facing: bool,
) -> list[Compared]:
    """Compare each prompt's completions, all prompts' pairs at once.

    Args:
        judge: of pairs.
        prompts: as text.
        completions: of each, as many of every prompt: its own samples, then what they meet.
        own: how many are its own.
        facing: each of its own meets one of the others; else each meets each.

    Raises:
        ValueError, ConnectionError: as the judge.
    """
    pairs = meetings(own, len(completions[0]) - own, facing=facing)
    met = [(n, *pair) for n in range(len(prompts)) for pair in pairs]
    first, second = ([completions[n][pair[k]] for n, *pair in met] for k in (0, 1))
    asked = [k for k in range(len(met)) if first[k] != second[k]]
    of_asked = judge(
        [prompts[met[k][0]] for k in asked], [first[k] for k in asked], [second[k] for k in asked]
    )
    said = Verdicts(
        np.full(len(met), 0.5, np.float32),
        np.ones(len(met), np.bool_),
        np.zeros(len(met), np.bool_),
        np.zeros(len(met), np.bool_),
    )
    for whole, part in zip(said, of_asked):
        whole[asked] = part
    found = []
    for n in range(len(prompts)):
        own_part = slice(n * len(pairs), (n + 1) * len(pairs))
        one = Verdicts(*(field[own_part] for field in said))
        sums, counts = np.zeros((2, len(completions[n])), np.float32)
        for (i, j), win in zip(pairs, one.wins):
            sums[[i, j]] += (win, 1.0 - win)
            counts[[i, j]] += 1
        counted = (int(field.sum()) for field in one[1:])
        found.append(Compared(sums / np.maximum(counts, 1.0), len(pairs), *counted))
    return found


def describe(several: Sequence[Compared]) -> Float[np.ndarray, "4"]:
    """Return how many pairs there were, ties, disagreements and silent ones, for the metrics."""
    counts = [(one.pairs, one.ties, one.disagreements, one.silent) for one in several]
    return np.array(counts, np.float32).sum(axis=0)
