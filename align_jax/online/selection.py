# SPDX-License-Identifier: Apache-2.0
"""From a rollout's scores to the groups that an objective trains on.

    rollout      all n samples of a prompt are one group                                     R = n
    pairs        the best and the worst sample of a prompt, chosen first                     R = 2
    unpaired     every sample by itself, desirable if its score reaches a threshold          R = 1
    ranked       all n samples, best first                                                   R = n
    completions  the best sample of a prompt                                                 R = 1

The number of groups is fixed by (prompts, samples); a group that says nothing (two equal scores)
gets weight 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from align_jax.online.feedback import resolve_threshold

PAIRINGS = ("best_worst", "random")


class Groups(NamedTuple):
    """G groups of R samples each."""

    prompts: Int[np.ndarray, "G"]  # number of the prompt in the rollout
    samples: Int[np.ndarray, "G R"]  # numbers of its samples
    weight: Float[np.ndarray, "G"]
    label: Bool[np.ndarray, "G"] | None = None


def _first(prompts: int, samples: Int[np.ndarray, "G R"], weight: Float[np.ndarray, "G"]) -> Groups:
    return Groups(np.arange(prompts), samples, weight)


def whole(scores: Float[np.ndarray, "Q n"], everyones: Float[np.ndarray, "m"]) -> Groups:
    """Make one group of each prompt's samples."""
    prompts, n = scores.shape
    return _first(prompts, np.tile(np.arange(n), (prompts, 1)), np.ones(prompts, np.float32))


def pairs(
    scores: Float[np.ndarray, "Q n"],
    everyones: Float[np.ndarray, "m"],
    *,
    pairing: str = "best_worst",
    min_difference: float = 0.0,
) -> Groups:
    """Make one pair of each prompt's samples, the better one first.

    Args:
        scores: of the samples.
        everyones: not used.
        pairing: "best_worst", or "random": the first two samples, which are as good as any two.
        min_difference: pairs whose scores differ by no more than this get weight 0, units of
            reward.

    Raises:
        ValueError: an unknown pairing, or one sample a prompt.
    """
    if pairing not in PAIRINGS or scores.shape[1] < 2:
        raise ValueError(
            f"pairs need a pairing of {PAIRINGS} and 2 responses a prompt; got "
            f"{pairing!r}, "
            f"{scores.shape[1]}"
        )
    order = np.argsort(
        -(scores if pairing == "best_worst" else scores[:, :2]), axis=1, kind="stable"
    )
    samples = order[:, [0, -1]]
    found = np.take_along_axis(scores, samples, axis=1)
    return _first(
        len(scores), samples, (found[:, 0] - found[:, 1] > min_difference).astype(np.float32)
    )


def unpaired(
    scores: Float[np.ndarray, "Q n"],
    everyones: Float[np.ndarray, "m"],
    *,
    threshold: float | int | str = "mean",
) -> Groups:
    """Label each sample: desirable where its score is at least the threshold.

    Args:
        scores: of the samples.
        everyones: the scores of all processes' samples.
        threshold: a number; "mean" or "median" of everyone's scores; or "prompt": the mean of the
            prompt's own samples.
    """
    prompts, n = scores.shape
    if threshold == "prompt":
        border = scores.mean(axis=1, keepdims=True)
    else:
        border = np.float32(resolve_threshold(threshold, everyones.tolist()))
    return Groups(
        np.repeat(np.arange(prompts), n),
        np.tile(np.arange(n), prompts)[:, None],
        np.ones(prompts * n, np.float32),
        (scores >= border).reshape(-1),
    )


def ranked(scores: Float[np.ndarray, "Q n"], everyones: Float[np.ndarray, "m"]) -> Groups:
    """Make a ranking of each prompt's samples, best first; weight 0 where all are equal."""
    order = np.argsort(-scores, axis=1, kind="stable")
    return _first(len(scores), order, (np.ptp(scores, axis=1) > 0).astype(np.float32))


def best(scores: Float[np.ndarray, "Q n"], everyones: Float[np.ndarray, "m"]) -> Groups:
    """Take each prompt's best sample: rejection sampling, or best of n."""
    return _first(len(scores), scores.argmax(axis=1)[:, None], np.ones(len(scores), np.float32))


SELECTIONS: Mapping[str, Callable[..., Groups]] = {
    "rollout": whole,
    "pairs": pairs,
    "unpaired": unpaired,
    "ranked": ranked,
    "completions": best,
}


def group_count(kind: str, prompts: int, samples: int) -> tuple[int, int]:
    """Return how many groups a rollout gives, and R.

    >>> group_count("pairs", 8, 4), group_count("unpaired", 8, 4), group_count("rollout", 8, 4)
    ((8, 2), (32, 1), (8, 4))
    """
    found = SELECTIONS[kind](np.zeros((prompts, samples), np.float32), np.zeros(1, np.float32))
    return found.samples.shape
