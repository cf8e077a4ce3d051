# SPDX-License-Identifier: Apache-2.0
"""Weights that make undesirable prompts as frequent as they are among desirable ones.

Thumbs up and thumbs down may come from different questions; a loss that tells the two apart then
learns to tell the questions.  A classifier of prompts knows how much more probable each is among
the desirable ones; its odds weigh the undesirable rows (BCO's underlying distribution matching).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import minimize


def fit_classifier(
    embeddings: Float[np.ndarray, "n D"], labels: Bool[np.ndarray, "n"], *, strength: float = 1.0
) -> Float[np.ndarray, "D+1"]:
    """Fit a logistic regression in which both labels weigh the same.

        min_w,b ½ |w|² + strength Σ_i c_i log(1 + e^(-y_i (w·x_i + b))),  c_i = n / (2 n_label)

    Args:
        embeddings: [n, D].
        labels: [n].
        strength: of the data against the penalty; as scikit-learn's C.

    Returns:
        The weights w and, last, the intercept b.

    Raises:
        ValueError: one label alone.
    """
    x, sign = np.asarray(embeddings, np.float64), np.where(labels, 1.0, -1.0)
    counts = [int((sign == one).sum()) for one in (1.0, -1.0)]
    if not all(counts):
        raise ValueError(
            "expected desirable and undesirable prompts to compare, got "
            f"{counts[0]} and {counts[1]}"
        )
    each = strength * len(x) / (2.0 * np.where(sign > 0, *counts))

    def value(found: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (x @ found[:-1] + found[-1])
        # the gradient of log(1 + e^(-m)) is -σ(-m)
        slope = -each * sign * np.exp(-np.logaddexp(0.0, margin))
        total = 0.5 * found[:-1] @ found[:-1] + each @ np.logaddexp(0.0, -margin)
        return float(total), np.append(found[:-1] + slope @ x, slope.sum())

    options = {"maxiter": 10_000, "maxfun": 20_000, "ftol": 1e-14, "gtol": 1e-9}
    start = np.zeros(x.shape[1] + 1)
    return minimize(value, start, jac=True, method="L-BFGS-B", options=options).x


def density_ratios(
    embeddings: Float[np.ndarray, "n D"] | Sequence[Sequence[float]],
    labels: Bool[np.ndarray, "n"] | Sequence[bool],
    *,
    low: float = 0.5,
    high: float = 10.0,
    strength: float = 1.0,
) -> Float[np.ndarray, "n"]:
    """Compute BCO's weights: the column ``weight`` of labeled rows, for ``density_ratio`` of bco.

        1 of a desirable row;  clip(p / (1 - p), low, high) of an undesirable one

    p is the probability that a prompt is of a desirable row, by ``fit_classifier`` on all rows (TRL
    fits it on 1,024 of each label).

    Args:
        embeddings: [n, D] of the rows' prompts, by any model of texts.
        labels: [n], desirable or not.
        low, high: bounds of the ratio, above 0.
        strength: as ``fit_classifier`` takes it.

    References:
        Jung et al. 2024, arXiv 2404.04656, section 4.2 (underlying distribution matching); TRL
        1.9.0, ``BCOTrainer._get_udm_weight``.

    Raises:
        ValueError: one label alone, other numbers of embeddings than of labels, or bounds that are
            none.

    >>> density_ratios([[0.0], [1.0], [1.0], [0.0]], [True, False, True, False]).round(2).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    x, wanted = np.asarray(embeddings, np.float64), np.asarray(labels, bool)
    if x.ndim != 2 or wanted.shape != x.shape[:1]:
        raise ValueError(
            f"expected embeddings [n, D] and labels [n], got {list(x.shape)}, {list(wanted.shape)}"
        )
    if not 0 < low <= high:
        raise ValueError(f"expected 0 < low <= high, got low = {low:g}, high = {high:g}")
    found = fit_classifier(x, wanted, strength=strength)
    p = 1.0 / (1.0 + np.exp(-(x @ found[:-1] + found[-1])))
    return np.where(wanted, 1.0, np.clip(p / (1.0 - p + 1e-8), low, high))
