# SPDX-License-Identifier: Apache-2.0
"""Does a process reward model know the right steps from the wrong ones?  On held-out steps."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool

from align_jax.data.datasets import Examples
from align_jax.evals.policy import EvaluatedPolicy
from align_jax.evals.subsets import by_subset, subsets


def process(
    policy: EvaluatedPolicy, examples: Examples, *, batch_size: int = 16, max_length: int = 1024
) -> dict[str, float]:
    """Compare the sign of each step's score with its label, and where the first error is seen.

    Args:
        policy: a process reward model: one with a score head and a separator.
        examples: of kind "stepwise".
        batch_size: texts at once; rounded up to what the mesh divides.
        max_length: tokens of prompt and answer; of a longer one the steps that end before that many
            tokens from its end are not seen, and it is left out.

    Returns:
        ``accuracy`` of labeled steps, and of the right (``accuracy/true``) and the wrong ones;
        ``first_error`` of answers: whether the first step with a score of 0 or less is the first
        wrong one (none, where none is), of each of the data's subsets too, and of answers with a
        wrong step and without (``first_error/wrong``, ``/right``), whose harmonic mean is
        ``first_error/f1``; ``steps``, ``examples`` and ``too_long``.  NaN where there is none.

    Raises:
        ValueError: every answer is too long.

    References:
        Zheng et al. 2024, arXiv 2412.06559 (ProcessBench), section 3.2.
    """
    assert policy.separator is not None  # the caller has looked
    model = policy.reward_model(batch_size, max_length)
    scores = model.steps(examples.items, policy.separator)
    seen = [i for i, said in enumerate(scores) if len(said)]
    if not seen:
        raise ValueError(f"none of the {len(scores)} answers ends within {max_length} tokens")
    right, true, hit, wrong = [], [], [], []
    for i in seen:
        known = [label for _, label in examples.items[i].steps if label is not None]
        labels = np.array(known, np.float32) >= 0.5
        taken = scores[i] > 0
        right.append(taken == labels)
        true.append(labels)
        hit.append(_first(~labels) == _first(~taken))
        wrong.append(not labels.all())
    steps, labels, found, failed = map(np.concatenate, (right, true, [hit], [wrong]))
    named = subsets(examples)
    out = {
        "examples": float(len(seen)),
        "steps": float(len(steps)),
        "too_long": float(len(scores) - len(seen)),
        **by_subset("accuracy", steps.astype(np.float32), []),
        "accuracy/true": _mean(steps, labels),
        "accuracy/false": _mean(steps, ~labels),
        "first_error/wrong": _mean(found, failed),
        "first_error/right": _mean(found, ~failed),
    }
    low, high = out["first_error/wrong"], out["first_error/right"]
    out["first_error/f1"] = 2 * low * high / (low + high) if low + high > 0 else low + high
    return out | by_subset(
        "first_error", found.astype(np.float32), [named[i] for i in seen if named]
    )


def _first(flags: Bool[np.ndarray, "s"]) -> int:
    """Return the index of the first flag, -1 where there is none."""
    return int(flags.argmax()) if flags.any() else -1


def _mean(hits: Bool[np.ndarray, "n"], of: Bool[np.ndarray, "n"]) -> float:
    """Average over some; NaN of none."""
    return float(hits[of].mean()) if of.any() else float("nan")
