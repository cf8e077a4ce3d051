# SPDX-License-Identifier: Apache-2.0
"""How surprised is the policy by held-out responses?"""

from __future__ import annotations

from typing import Any

import numpy as np

from align_jax.data.datasets import Examples
from align_jax.evals.policy import EvaluatedPolicy, response_logps


def perplexity(policy: EvaluatedPolicy, examples: Examples, **options: Any) -> dict[str, float]:
    """Measure exp of the mean negative log-likelihood of the responses' tokens.

    Args:
        policy: the policy.
        examples: of kind "completions" (prompts are conditioned on, not scored).
        options: of ``policy.response_logps``.

    Returns:
        ``nll`` (nats a token), ``perplexity``, ``tokens``, ``examples``; with a reference also
        ``reference_nll``.
    """
    found = response_logps(policy, examples, **options)
    tokens = float(found.lengths.sum())
    nll = -float(found.policy.sum(dtype=np.float64)) / max(tokens, 1.0)
    values = {
        "examples": float(len(found.policy)),
        "tokens": tokens,
        "nll": nll,
        "perplexity": float(np.exp(nll)),
    }
    if found.reference is not None:
        values["reference_nll"] = -float(found.reference.sum(dtype=np.float64)) / max(tokens, 1.0)
    return values
