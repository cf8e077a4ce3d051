# SPDX-License-Identifier: Apache-2.0
"""Paired objectives with a reference: the DPO family.

Each is a function of a ``Pair``: x_w, x_l are the log-ratios of policy to reference of the chosen and the rejected
response, n_w, n_l their lengths, d = x_w - x_l, σ the logistic function.  ``pairs.paired`` makes table rows of them.
A ``margin`` (a column of the data, in units of reward) is taken from the scaled difference; a loss that uses the two
log-ratios one by one takes half of it from each side.
"""
from __future__ import annotations

from jax.nn import log_sigmoid
from jaxtyping import Array, Float

from align_jax.losses.pairs import Pair


def _check_smoothing(label_smoothing: float, name: str, low: float = 0.0, high: float = 0.5) -> None:
    if not low <= label_smoothing < high:
        raise ValueError(f"{name}: label_smoothing must be in [{low}, {high}), got {label_smoothing}")


def dpo(pair: Pair, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Float[Array, "B"]:
    """Compute the DPO loss, or cDPO's with label smoothing.

        -(1-ε) log σ(β d - margin) - ε log σ(-(β d - margin))

    Args:
        pair: the pairs.
        beta: β, per nat, positive.
        label_smoothing: ε in [0, 0.5), the share of flipped labels.

    Returns:
        [B] losses; log 2 where the policy is the reference.

    References:
        Rafailov et al. 2023, arXiv 2305.18290, equation 7.  Smoothing: Mitchell 2023, "A note on DPO with noisy
        preferences" (cDPO), equation 3.  Margin: Amini et al. 2024, arXiv 2402.10571 (ODPO), equation 8.

    >>> from align_jax.losses.pairs import make_pair
    >>> print(dpo(make_pair([[-10.0, -12.0], [-8.0, -7.0]], [[-11.0, -11.0], [-8.0, -7.0]]), beta=0.5).round(4))
    [0.3133 0.6931]
    """
    _check_smoothing(label_smoothing, "dpo")
    z = beta * (pair.chosen - pair.rejected) - pair.margin
    return -(1.0 - label_smoothing) * log_sigmoid(z) - label_smoothing * log_sigmoid(-z)
