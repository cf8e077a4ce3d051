# SPDX-License-Identifier: Apache-2.0
"""Does the policy prefer what people preferred?  On held-out pairs."""

from __future__ import annotations

from typing import Any

import numpy as np

from align_jax.data.datasets import Examples
from align_jax.evals.policy import EvaluatedPolicy, response_logps
from align_jax.evals.subsets import by_subset, subsets


def preference(
    policy: EvaluatedPolicy, examples: Examples, *, beta: float = 0.1, **options: Any
) -> dict[str, float]:
    """Compare chosen with rejected responses.

    Args:
        policy: the policy; with a reference, implicit rewards beta · (log π - log π_ref) are
            compared too.
        examples: of kind "pairs".
        beta: units of reward per nat.
        options: of ``policy.response_logps``.

    Returns:
        ``logps/{chosen,rejected,accuracies}`` (sums), ``logps/mean_accuracies`` (per token) and,
        with a reference, ``rewards/{chosen,rejected,margins,accuracies}``; ``examples``;
        accuracies with ``/stderr``, and of each of the data's subsets.  Accuracy counts strictly
        greater.
    """
    found = response_logps(policy, examples, **options)
    named = subsets(examples)
    named = [named[i] for i in found.rows] if named else []
    per_token = found.policy / np.maximum(found.lengths, 1.0)

    def greater(x: np.ndarray) -> np.ndarray:
        return (x[:, 0] > x[:, 1]).astype(np.float32)

    values = {
        "examples": float(len(found.policy)),
        "logps/chosen": float(found.policy[:, 0].mean()),
        "logps/rejected": float(found.policy[:, 1].mean()),
    }
    for name, x in (("logps/accuracies", found.policy), ("logps/mean_accuracies", per_token)):
        values |= by_subset(name, greater(x), named)
    if found.reference is not None:
        rewards = beta * (found.policy - found.reference)
        values |= {
            "rewards/chosen": float(rewards[:, 0].mean()),
            "rewards/rejected": float(rewards[:, 1].mean()),
            "rewards/margins": float((rewards[:, 0] - rewards[:, 1]).mean()),
            **by_subset("rewards/accuracies", greater(rewards), named),
        }
    return values
