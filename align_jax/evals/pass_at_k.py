# SPDX-License-Identifier: Apache-2.0
"""Does any of k answers pass?  On prompts whose answers a reward can check."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from align_jax.core.options import RolloutOptions
from align_jax.data.datasets import Examples
from align_jax.evals.generation import ONE_SAMPLE, Keep, record, sample
from align_jax.evals.policy import EvaluatedPolicy
from align_jax.evals.subsets import by_subset, subsets
from align_jax.online.rewards import WeightedRewards


def unbiased(passed: Int[np.ndarray, "n"], samples: int, k: int) -> Float[np.ndarray, "n"]:
    """Estimate each prompt's probability that any of k answers passes.

        1 - C(n - c, k) / C(n, k) = 1 - prod_{i = n-c+1..n} (1 - k / i)

    Args:
        passed: c, of the n samples.
        samples: n, at least k.
        k: answers.

    References:
        Chen et al. 2021, arXiv 2107.03374, equation 1.

    >>> unbiased(np.array([0, 1, 2]), 2, 1).tolist()
    [0.0, 0.5, 1.0]
    """
    failed = samples - passed
    none = [
        0.0 if c < k else float(np.prod(1.0 - k / np.arange(c + 1, samples + 1))) for c in failed
    ]
    return np.float32(1.0) - np.asarray(none, np.float32)


def pass_at_k(
    policy: EvaluatedPolicy,
    examples: Examples,
    rewards: WeightedRewards,
    options: RolloutOptions = ONE_SAMPLE,
    *,
    pass_score: float = 1.0,
    keep: Keep | None = None,
    **more: Any,
) -> dict[str, float]:
    """Measure the share of prompts of which one of k answers passes, for k = 1, 2, 4, ... up to
    all.

    Args:
        policy: the policy.
        examples: of kind "prompts".
        rewards: what checks an answer.
        options: how samples are drawn; ``responses_per_prompt`` is n.
        pass_score: an answer passes from this reward on.
        keep: is given each sample with its reward.
        more: further options of ``generation.sample``.

    Returns:
        ``pass@k`` with ``/stderr`` over prompts, of each of the data's subsets too, and
        ``prompts``.
    """
    found = sample(policy, examples, rewards, options, **more)
    for one in found:
        for index, value in enumerate(one.rewards):
            if keep is not None:
                keep({**record(one, index), "reward": float(value)})
    n = options.responses_per_prompt
    passed = np.asarray([(one.rewards >= pass_score).sum() for one in found])
    counts = sorted({n, *(2**i for i in range(n.bit_length()) if 2**i <= n)})
    out, named = {"prompts": float(len(found))}, subsets(examples)
    for k in counts:
        out |= by_subset(f"pass@{k}", unbiased(passed, n, k), named)
    return out
