# SPDX-License-Identifier: Apache-2.0
"""Does the policy favor what people liked over what they did not?  On held-out answers alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from align_jax.data.datasets import Examples
from align_jax.evals.policy import EvaluatedPolicy, response_logps


def feedback(
    policy: EvaluatedPolicy, examples: Examples, *, beta: float = 0.1, **options: Any
) -> dict[str, float]:
    """Compare the implicit rewards r = beta · (log π - log π_ref) of desirable and undesirable
    answers, which may be answers to different prompts.

    Args:
        policy: the policy, with a reference.
        examples: of kind "unpaired".
        beta: units of reward per nat.
        options: of ``policy.response_logps``.

    Returns:
        ``rewards/{chosen,rejected,margins}`` (means of the desirable, of the undesirable, their
        difference), ``rewards/auc`` with ``/stderr``, ``logps/{chosen,rejected}`` (sums), and
        ``examples`` and ``desirable``, which are counts.

    Raises:
        ValueError: there is no reference, or only one label.
    """
    if policy.reference is None:
        raise ValueError("feedback is measured by log-ratios, and so needs a reference")
    found = response_logps(policy, examples, **options)
    assert found.reference is not None
    label = np.array([bool(examples.items[row].label) for row in found.rows])
    if label.all() or not label.any():
        only = "desirable" if label.any() else "undesirable"
        raise ValueError(f"all {len(label)} answers are {only}: nothing is there to compare with")
    logps, reward = found.policy[:, 0], beta * (found.policy - found.reference)[:, 0]
    chosen, rejected = float(reward[label].mean()), float(reward[~label].mean())
    area, error = auc(reward[label], reward[~label])
    return {
        "examples": float(len(label)),
        "desirable": float(label.sum()),
        "logps/chosen": float(logps[label].mean()),
        "logps/rejected": float(logps[~label].mean()),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/auc": area,
        "rewards/auc/stderr": error,
    }


def auc(above: Float[np.ndarray, "m"], below: Float[np.ndarray, "n"]) -> tuple[float, float]:
    """Return P(x > y) + P(x = y) / 2 for x of ``above`` and y of ``below``, and its standard error,
    which is NaN where one of them is a single number.

    References:
        DeLong, DeLong and Clarke-Pearson 1988, Biometrics 44(3), equations 3 to 6.

    >>> auc(np.array([1.0, 2.0]), np.array([0.0, 1.0]))
    (0.875, 0.176...)
    """

    def passed(x: Float[np.ndarray, "m"], y: Float[np.ndarray, "n"]) -> Float[np.ndarray, "m"]:
        ordered = np.sort(y)
        below, upto = np.searchsorted(ordered, x, "left"), np.searchsorted(ordered, x, "right")
        return (below + upto) / (2.0 * len(y))

    wins, losses = passed(above, below), passed(below, above)
    if min(len(wins), len(losses)) < 2:
        return float(wins.mean()), float("nan")
    variance = wins.var(ddof=1) / len(wins) + losses.var(ddof=1) / len(losses)
    return float(wins.mean()), float(np.sqrt(variance))
