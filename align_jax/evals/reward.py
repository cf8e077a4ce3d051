# SPDX-License-Identifier: Apache-2.0
"""Does a reward model prefer what people preferred?  On held-out pairs."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from align_jax.data.datasets import Examples
from align_jax.evals.policy import EvaluatedPolicy
from align_jax.evals.subsets import by_subset, subsets


def reward(
    policy: EvaluatedPolicy, examples: Examples, *, batch_size: int = 16, max_length: int = 1024
) -> dict[str, float]:
    """Compare the scores of chosen with those of rejected responses.

    Args:
        policy: a reward model: one with a score head.
        examples: of kind "pairs".
        batch_size: texts at once; rounded up to what the mesh divides.
        max_length: tokens of prompt and response; longer ones lose the prompt's beginning.

    Returns:
        ``accuracy`` (strictly greater), of each of the data's subsets too; ``ties``, ``margin``
        (units of reward), ``chosen``, ``rejected`` and ``examples``.

    References:
        Lambert et al. 2024, arXiv 2403.13787, section 4.
    """
    model = policy.reward_model(batch_size, max_length)

    def scores(which: int) -> Float[np.ndarray, "n"]:
        return model(
            [dataclasses.replace(one, responses=(one.responses[which],)) for one in examples.items]
        )

    chosen, rejected = scores(0), scores(1)
    right = (chosen > rejected).astype(np.float32)
    return {
        "examples": float(len(right)),
        **by_subset("accuracy", right, subsets(examples)),
        "ties": float((chosen == rejected).mean()),
        "margin": float((chosen - rejected).mean()),
        "chosen": float(chosen.mean()),
        "rejected": float(rejected.mean()),
    }
