# SPDX-License-Identifier: Apache-2.0
"""How surprised is the policy by held-out responses?"""

from __future__ import annotations

from typing import Any

import numpy as np

from align_jax.data.datasets import Examples
from align_jax.evals.subject import Subject, sequences


def perplexity(subject: Subject, examples: Examples, **options: Any) -> dict[str, float]:
    """Measure exp of the mean negative log-likelihood of the responses' tokens.

    Args:
        subject: the policy.
        examples: of kind "completions" (prompts are conditioned on, not scored).
        options: of ``subject.sequences``.

    Returns:
        ``nll`` (nats a token), ``perplexity``, ``tokens``, ``examples``; with a reference also
        ``reference_nll``.
    """
    found = sequences(subject, examples, **options)
    tokens = float(found.lengths.sum())
    nll = -float(found.logps.sum(dtype=np.float64)) / max(tokens, 1.0)
    values = {
        "examples": float(len(found.logps)),
        "tokens": tokens,
        "nll": nll,
        "perplexity": float(np.exp(nll)),
    }
    if found.reference is not None:
        values["reference_nll"] = -float(found.reference.sum(dtype=np.float64)) / max(tokens, 1.0)
    return values
