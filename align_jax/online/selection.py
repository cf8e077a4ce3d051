# SPDX-License-Identifier: Apache-2.0
"""From a rollout's scores to the groups that an objective trains on.

    rollout      all n samples of a prompt are one group                                   R = n
    pairs        the best and the worst sample of a prompt, chosen first                   R = 2
    unpaired     every sample by itself, desirable if its score reaches a threshold        R = 1
    ranked       all n samples, best first                                                 R = n
    completions  the best sample of a prompt                                               R = 1

The number of groups is fixed by (prompts, samples); a group that says nothing (two equal scores)
gets weight 0.  What the samples meet (``rollout.against``) stands behind them, the data's answer
with an infinite score.  A row of ``SELECTIONS`` is a function of this process's scores [Q, n], of
the scores of all processes, and of the rollout's options, of which it names those that it reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from align_jax.core.fields import number_in
from align_jax.core.options import RolloutOptions

PAIRINGS = ("best_worst", "random")


class Groups(NamedTuple):
    """G groups of R samples each."""

    prompts: Int[np.ndarray, "G"]  # number of the prompt in the rollout
    samples: Int[np.ndarray, "G R"]  # numbers of its samples
    weight: Float[np.ndarray, "G"]
    label: Bool[np.ndarray, "G"] | None = None


def resolve_threshold(threshold: float | str, rewards: Sequence[float]) -> float:
    """Return the number that a threshold means: itself, or the rewards' mean or median.

    Raises:
        ValueError: neither a number nor "mean" nor "median".
    """
    if threshold == "mean":
        return float(np.mean(rewards))
    if threshold == "median":
        return float(np.median(rewards))
    number = number_in(str(threshold))
    if number is None:
        raise ValueError(
            f"threshold must be a finite number, 'mean' or 'median'; got {threshold!r:.60}"
        )
    return number


def _one_per_prompt(samples: Int[np.ndarray, "G R"], counts: Bool[np.ndarray, "G"]) -> Groups:
    return Groups(np.arange(len(samples)), samples, counts.astype(np.float32))


def all_samples(
    scores: Float[np.ndarray, "Q n"], all_scores: Float[np.ndarray, "m"], options: RolloutOptions
) -> Groups:
    """Make one group of each prompt's samples."""
    prompts, n = scores.shape
    return _one_per_prompt(np.tile(np.arange(n), (prompts, 1)), np.ones(prompts, bool))


def pairs(
    scores: Float[np.ndarray, "Q n"], all_scores: Float[np.ndarray, "m"], options: RolloutOptions
) -> Groups:
    """Make one pair of each prompt's samples, the better one first.

    The pair is the best and the worst sample, or of ``pairing`` = "random" the first two, which are
    as good as any two.  Pairs whose scores differ by no more than ``min_difference`` get weight 0.

    Raises:
        ValueError: an unknown pairing, or one sample a prompt.
    """
    if options.pairing not in PAIRINGS or scores.shape[1] < 2:
        raise ValueError(
            f"pairs need a pairing of {PAIRINGS} and 2 responses a prompt; got "
            f"{options.pairing!r}, {scores.shape[1]}"
        )
    candidates = scores if options.pairing == "best_worst" else scores[:, :2]
    order = np.argsort(-candidates, axis=1, kind="stable")
    samples = order[:, [0, -1]]
    found = np.take_along_axis(scores, samples, axis=1)
    return _one_per_prompt(samples, found[:, 0] - found[:, 1] > options.min_difference)


def unpaired(
    scores: Float[np.ndarray, "Q n"], all_scores: Float[np.ndarray, "m"], options: RolloutOptions
) -> Groups:
    """Label each sample: desirable where its score is at least the threshold.

    The ``threshold`` is a number, the "mean" or "median" of the scores of all processes, or
    "prompt": the mean of the prompt's own samples.
    """
    prompts, n = scores.shape
    if options.against == "data":
        border = np.float32(np.inf)
    elif options.threshold == "prompt":
        border = scores.mean(axis=1, keepdims=True)
    else:
        border = np.float32(resolve_threshold(options.threshold, all_scores.tolist()))
    return Groups(
        np.repeat(np.arange(prompts), n),
        np.tile(np.arange(n), prompts)[:, None],
        np.ones(prompts * n, np.float32),
        (scores >= border).reshape(-1),
    )


def ranked(
    scores: Float[np.ndarray, "Q n"], all_scores: Float[np.ndarray, "m"], options: RolloutOptions
) -> Groups:
    """Make a ranking of each prompt's samples, best first; weight 0 where all are equal."""
    order = np.argsort(-scores, axis=1, kind="stable")
    return _one_per_prompt(order, np.ptp(scores, axis=1) > 0)


def best(
    scores: Float[np.ndarray, "Q n"], all_scores: Float[np.ndarray, "m"], options: RolloutOptions
) -> Groups:
    """Take each prompt's best sample: rejection sampling, or best of n."""
    return _one_per_prompt(scores.argmax(axis=1)[:, None], np.ones(len(scores), bool))


@dataclasses.dataclass(frozen=True)
class Selection:
    """A row of the table.

    Attributes:
        fn: (scores, scores of all processes, options) -> groups.
        reads: the keys of ``config.rollout`` that only selections of this kind read.
    """

    fn: Callable[..., Groups]
    reads: tuple[str, ...] = ()


SELECTIONS: Mapping[str, Selection] = {
    "rollout": Selection(all_samples),
    "pairs": Selection(pairs, reads=("pairing", "min_difference")),
    "unpaired": Selection(unpaired, reads=("threshold",)),
    "ranked": Selection(ranked),
    "completions": Selection(best),
}


def check_unread(kind: str, options: RolloutOptions) -> None:
    """Refuse options of other selections than this kind's, and a pairing where there is one pair.

    Raises:
        ValueError: one that is not at its default.
    """
    default = RolloutOptions()
    lone = kind == "pairs" and options.responses_per_prompt == 2
    if lone and options.pairing != default.pairing:
        raise ValueError(
            f"config.rollout.pairing = {options.pairing!r} has no effect on 2 responses of a "
            "prompt, which are its pair: give more (config.rollout.responses_per_prompt), or leave "
            f"it at {default.pairing!r}"
        )
    for other, row in SELECTIONS.items():
        for key in row.reads:
            value = getattr(options, key)
            if key not in SELECTIONS[kind].reads and value != getattr(default, key):
                raise ValueError(
                    f"config.rollout.{key} = {value!r} is of objectives on {other}; this one "
                    f"learns from {kind}, which does not read it"
                )


def group_count(kind: str, options: RolloutOptions, responses: int) -> tuple[int, int]:
    """Return how many groups a rollout of ``options.prompts`` gives, and R.

    Args:
        kind: a key of ``SELECTIONS``.
        options: the rollout's.
        responses: to each prompt.

    >>> options = RolloutOptions(prompts=8)
    >>> group_count("pairs", options, 4), group_count("unpaired", options, 4)
    ((8, 2), (32, 1))
    """
    scores = np.zeros((options.prompts, responses), np.float32)
    return SELECTIONS[kind].fn(scores, np.zeros(1, np.float32), options).samples.shape
