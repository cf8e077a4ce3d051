# SPDX-License-Identifier: Apache-2.0
"""A measure over the data's own subsets: the rows' ``subset`` column, as RewardBench has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from align_jax.data.datasets import Examples
from align_jax.evals.policy import standard_error

COLUMN = "subset"


def subsets(examples: Examples) -> list[str]:
    """Return the subset of each example, "" of one that names none; [] where none does."""
    found: list[Any] = [one.extras.get(COLUMN) for one in examples.items]
    if all(one is None for one in found):
        return []
    return ["" if one is None else str(one) for one in found]


def by_subset(name: str, values: Float[np.ndarray, "n"], named: Sequence[str]) -> dict[str, float]:
    """Return a mean with its standard error, and the same of each subset.

    Args:
        name: of the metric.
        values: one for each example.
        named: the subset of each; [] = the data has none.

    Returns:
        ``name`` and ``name/stderr``; with subsets ``name/SUBSET`` and its ``/stderr`` ("rest" of
        what names none), and ``name/mean_of_subsets``, in which each subset counts once.
    """
    out = {name: float(values.mean()), f"{name}/stderr": standard_error(values)}
    if not named:
        return out
    labels, means = np.asarray(named), []
    for label in sorted(set(named)):
        own, key = values[labels == label], f"{name}/{label or 'rest'}"
        out |= {key: float(own.mean()), f"{key}/stderr": standard_error(own)}
        means.append(own.mean())
    return out | {f"{name}/mean_of_subsets": float(np.mean(means))}
