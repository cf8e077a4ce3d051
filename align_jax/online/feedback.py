# SPDX-License-Identifier: Apache-2.0
"""From scored samples to feedback records: binary, pairwise, scalar.

The records carry HALOs' field names, so they train there and here (`align_jax.data.formats` reads
them back).  A sample is ``{prompt, output, prompt_id, sample_id, reward, ...}``.  Everything is a
function of the samples and the seed: the order of the samples in the file changes nothing.

References:
    HALOs, github.com/ContextualAI/HALOs, ``train/label.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Sample = Mapping[str, Any]

PAIRINGS = ("max", "random", "min")
ROUND_STRIDE = 10**9  # prompt_id of round r starts at r times this, so rounds can be concatenated


def round_id(prompt_id: int, round_number: int) -> int:
    """Return an id that is unique over the rounds of sampling and labeling.

    Raises:
        ValueError: an id that is not an integer from 0 below 10^9, or a negative round.
    """
    if not isinstance(prompt_id, int) or not 0 <= prompt_id < ROUND_STRIDE or round_number < 0:
        raise ValueError(
            f"expected an integer prompt_id from 0 below {ROUND_STRIDE} and a round "
            "from 0; "
            f"got prompt_id {prompt_id!r}, round {round_number}"
        )
    return round_number * ROUND_STRIDE + prompt_id


def resolve_threshold(threshold: float | int | str, rewards: Sequence[float]) -> float:
    """Return the number that a threshold means: itself, or the rewards' mean or median.

    Raises:
        ValueError: neither a number nor "mean" nor "median".
    """
    if threshold == "mean":
        return float(np.mean(rewards))
    if threshold == "median":
        return float(np.median(rewards))
    try:
        return float(threshold)
    except ValueError:
        raise ValueError(
            f"threshold must be a number, 'mean' or 'median'; got {threshold!r}"
        ) from None


def _answer(sample: Sample) -> Any:
    """Give the output the form of the prompt: messages where that has turns, else text."""
    output = sample["output"]
    if isinstance(output, str) and not isinstance(sample["prompt"], str):
        return [{"role": "assistant", "content": output}]
    return output


def _ordered(samples: Iterable[Sample]) -> list[Sample]:
    samples = sorted(samples, key=lambda one: (one["prompt_id"], one["sample_id"]))
    for before, after in itertools.pairwise(samples):
        if (before["prompt_id"], before["sample_id"]) == (after["prompt_id"], after["sample_id"]):
            raise ValueError(
                f"two samples have prompt_id {after['prompt_id']} and sample_id "
                f"{after['sample_id']}; "
                "label one round's samples at a time"
            )
    return samples


def scalar(samples: Iterable[Sample], round_number: int = 0) -> list[dict[str, Any]]:
    """Return each sample with its reward as ``scalar_feedback``.

    Raises:
        ValueError: two samples with the same ids.
    """
    return [
        {
            **one,
            "prompt_id": round_id(one["prompt_id"], round_number),
            "output": _answer(one),
            "type": "scalar_feedback",
        }
        for one in _ordered(samples)
    ]


def binary(
    samples: Iterable[Sample], threshold: float | str = 0.0, round_number: int = 0
) -> list[dict[str, Any]]:
    """Return each sample labeled desirable (1) where its reward is at least the threshold, as
    ``binary_feedback``.

    Args:
        samples: with rewards.
        threshold: a number, or "mean" or "median" of all the samples' rewards.
        round_number: which round of sampling this is.

    Raises:
        ValueError: two samples with the same ids, or an unknown threshold.
    """
    samples = _ordered(samples)
    border = resolve_threshold(threshold, [one["reward"] for one in samples]) if samples else 0.0
    return [
        {
            "prompt_id": round_id(one["prompt_id"], round_number),
            "sample_id": one["sample_id"],
            "prompt": one["prompt"],
            "output": _answer(one),
            "label": int(one["reward"] >= border),
            "reward": one["reward"],
            "type": "binary_feedback",
        }
        for one in samples
    ]


def _pairs(
    rewards: Sequence[float], pairing: str, threshold: float, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Choose index pairs whose rewards differ by more than the threshold."""
    order = np.argsort(-np.asarray(rewards), kind="stable").tolist()
    if pairing == "random":
        chosen = rng.permutation(len(rewards)).tolist()
        candidates = list(zip(chosen[::2], chosen[1::2]))
    elif pairing == "max":
        candidates = [(order[0], order[-1])]
    else:
        candidates = list(itertools.combinations(order, 2))
    gaps = {pair: abs(rewards[pair[0]] - rewards[pair[1]]) for pair in candidates}
    kept = [pair for pair in candidates if gaps[pair] > threshold]
    if pairing == "min" and kept:
        least = min(gaps[pair] for pair in kept)
        kept = [pair for pair in kept if gaps[pair] <= least + 1e-12]
    return kept


def pairwise(
    samples: Iterable[Sample],
    pairing: str = "random",
    threshold: float = 0.0,
    seed: int = 0,
    round_number: int = 0,
) -> list[dict[str, Any]]:
    """Pair each prompt's samples, as ``pairwise_feedback``; label 1 says that A is better.

    Args:
        samples: with rewards.
        pairing: "max": the best with the worst; "random": a random matching; "min": all pairs of
            the least difference above the threshold.
        threshold: pairs must differ by more than this; equal rewards never make a pair.
        seed: of the matching and of which sample is A; a prompt's pairs depend on it and the
            prompt's id alone.
        round_number: which round of sampling this is.

    Raises:
        ValueError: an unknown pairing, a negative threshold, or two samples with the same ids.
    """
    if pairing not in PAIRINGS or threshold < 0:
        raise ValueError(
            f"expected a pairing of {PAIRINGS} and a threshold from 0; got {pairing!r}, {threshold}"
        )
    feedback = []
    for prompt_id, group in itertools.groupby(_ordered(samples), key=lambda one: one["prompt_id"]):
        group, new_id = list(group), round_id(prompt_id, round_number)
        if len(group) < 2:
            continue
        rng = np.random.default_rng((seed, new_id))
        for pair in _pairs([one["reward"] for one in group], pairing, threshold, rng):
            a, b = (group[i] for i in (pair if rng.random() < 0.5 else pair[::-1]))
            feedback.append(
                {
                    "prompt_id": new_id,
                    "prompt": a["prompt"],
                    "output_A": _answer(a),
                    "output_B": _answer(b),
                    "label": int(a["reward"] > b["reward"]),
                    "reward_A": a["reward"],
                    "reward_B": b["reward"],
                    "reward_difference": abs(a["reward"] - b["reward"]),
                    "type": "pairwise_feedback",
                }
            )
    return feedback
