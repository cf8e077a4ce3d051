# SPDX-License-Identifier: Apache-2.0
"""Paired objectives with a reference: the DPO family.

Each is a function of a ``Pair``: x_w, x_l are the log-ratios of policy to reference of the chosen
and the rejected response, n_w, n_l their lengths, d = x_w - x_l, σ the logistic function, all [B]
float32, nats and tokens; each returns [B] losses.  ``pairs.paired`` makes objectives of them.  β is
per nat, positive.  A ``margin`` (a column of the data, in units of reward) is taken from β d; a
loss that uses the two log-ratios one by one takes half of it from each side.
"""

from typing import Annotated, Literal

import jax.numpy as jnp
import numpy as np
from jax.nn import log_sigmoid, sigmoid
from jaxtyping import Array, Float

from align_jax.losses.options import Option
from align_jax.losses.pairs import EXP_MAX, Beta, LabelSmoothing, Pair

SQUARE_MAX = 1e18  # the square of more would leave float32


def smoothed_logistic(z: Float[Array, "B"], label_smoothing: float) -> Float[Array, "B"]:
    """Compute -(1-ε) log σ(z) - ε log σ(-z)."""
    return -(1.0 - label_smoothing) * log_sigmoid(z) - label_smoothing * log_sigmoid(-z)


def square(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Square, cut where float32 would overflow."""
    return jnp.square(jnp.clip(x, -SQUARE_MAX, SQUARE_MAX))


def scaled_difference(pair: Pair, beta: float | Float[Array, ""]) -> Float[Array, "B"]:
    """Compute β (x_w - x_l) - margin."""
    return beta * (pair.chosen - pair.rejected) - pair.margin


def scaled_sides(pair: Pair, beta: float) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Compute β x_w - margin/2 and β x_l + margin/2."""
    return beta * pair.chosen - 0.5 * pair.margin, beta * pair.rejected + 0.5 * pair.margin


def dpo(
    pair: Pair, *, beta: Beta = 0.1, label_smoothing: LabelSmoothing = 0.0
) -> Float[Array, "B"]:
    """Compute the DPO loss, or cDPO's with label smoothing.

        -(1-ε) log σ(β d - margin) - ε log σ(-(β d - margin))

    log 2 where the policy is the reference.  ε is the share of flipped labels.

    References:
        Rafailov et al. 2023, arXiv 2305.18290, equation 7.  Smoothing: Mitchell 2023, "A note on
        DPO with noisy preferences" (cDPO).  Margin: Amini et al. 2024, arXiv 2402.10571 (ODPO), the
        loss with an offset.

    >>> from align_jax.losses.pairs import example_pair
    >>> [round(x, 4) for x in dpo(example_pair(), beta=0.5).tolist()]
    [0.3133, 0.6931]
    """
    return smoothed_logistic(scaled_difference(pair, beta), label_smoothing)


def robust(
    pair: Pair, *, beta: Beta = 0.1, label_smoothing: LabelSmoothing = 0.0
) -> Float[Array, "B"]:
    """Compute robust DPO: an unbiased estimate of the noise-free loss when a share ε of labels is
    flipped.

        [-(1-ε) log σ(β d) + ε log σ(-β d)] / (1 - 2ε)

    References:
        Chowdhury et al. 2024, arXiv 2403.00409, the rDPO loss.

    >>> from align_jax.losses.pairs import example_pair
    >>> [round(x, 4) for x in robust(example_pair(), beta=0.5, label_smoothing=0.1).tolist()]
    [0.1883, 0.6931]
    """
    z = scaled_difference(pair, beta)
    clean, flipped = -(1.0 - label_smoothing) * log_sigmoid(z), -label_smoothing * log_sigmoid(-z)
    return (clean - flipped) / (1.0 - 2.0 * label_smoothing)


def ipo(
    pair: Pair,
    *,
    beta: Beta = 0.1,
    lengths: Annotated[
        Literal["mean", "sum"], Option("of token log-ratios in a response")
    ] = "mean",
) -> Float[Array, "B"]:
    """Compute the IPO loss.

        (x_w / n_w - x_l / n_l - margin/β - 1 / (2 β))²    with ``lengths="mean"`` (TRL, HALOs)
        (x_w - x_l - margin/β - 1 / (2 β))²                with ``lengths="sum"`` (the paper)

    Lengths come from the loss mask; counting log-ratios that are not zero would divide 0 by 0 at
    the first step.

    References:
        Azar et al. 2023, arXiv 2310.12036, equation 17 (β is its τ).

    >>> from align_jax.losses.pairs import example_pair
    >>> [round(x, 4) for x in ipo(example_pair(), beta=0.5).tolist()]
    [0.3403, 1.1736]
    """
    chosen, rejected = pair.chosen, pair.rejected
    if lengths == "mean":
        chosen, rejected = chosen / pair.chosen_length, rejected / pair.rejected_length
    return square(chosen - rejected - pair.margin / beta - 0.5 / beta)


def hinge(pair: Pair, *, beta: Beta = 0.1) -> Float[Array, "B"]:
    """Compute the hinge loss on the normalized margin: max(0, 1 - β d).

    References:
        Liu et al. 2023, arXiv 2309.06657 (RSO), the hinge-norm loss; after SLiC, arXiv 2305.10425.

    >>> from align_jax.losses.pairs import example_pair
    >>> [round(x, 4) for x in hinge(example_pair(), beta=0.1).tolist()]
    [0.8, 1.0]
    """
    return jnp.maximum(1.0 - scaled_difference(pair, beta), 0.0)


def dpo_norm(
    pair: Pair, *, beta: Beta = 0.1, label_smoothing: LabelSmoothing = 0.0
) -> Float[Array, "B"]:
    """Compute length-normalized DPO: -log σ(β (x_w / n_w - x_l / n_l)).

    A log-ratio per token is small: Tülu 3 uses β = 5.

    References:
        Lambert et al. 2024, arXiv 2411.15124 (Tülu 3), length-normalized DPO.

    >>> from align_jax.losses.pairs import example_pair
    >>> [round(x, 4) for x in dpo_norm(example_pair(), beta=5.0).tolist()]
    [0.1174, 0.923]
    """
    d = pair.chosen / pair.chosen_length - pair.rejected / pair.rejected_length
    return smoothed_logistic(beta * d - pair.margin, label_smoothing)


def exo_pair(
    pair: Pair,
    *,
    beta: Beta = 0.1,
    label_smoothing: Annotated[
        float, Option("share of the labels taken to be flipped", above=0, below=0.5)
    ] = 1e-3,
) -> Float[Array, "B"]:
    """Compute EXO's loss for pairs: a reverse KL from the policy's preference to the (smoothed)
    label.

        σ(β d) [log σ(β d) - log(1-ε)] + σ(-β d) [log σ(-β d) - log ε]

    ε is above 0: the label's distribution is the support.

    References:
        Ji et al. 2024, arXiv 2402.00856, equation 16.

    >>> from align_jax.losses.pairs import example_pair
    >>> [round(x, 4) for x in exo_pair(example_pair(), beta=0.5).tolist()]
    [1.2763, 2.7612]
    """
    z = scaled_difference(pair, beta)
    log_kept, log_flipped = np.log1p(-label_smoothing).item(), np.log(label_smoothing).item()
    return sigmoid(z) * (log_sigmoid(z) - log_kept) + sigmoid(-z) * (log_sigmoid(-z) - log_flipped)


def nca_pair(pair: Pair, *, beta: Beta = 0.1) -> Float[Array, "B"]:
    """Compute the pairwise NCA loss, which keeps the chosen's likelihood from falling.

        -log σ(β x_w) - ½ log σ(-β x_w) - ½ log σ(-β x_l)

    References:
        Chen et al. 2024, arXiv 2402.05369, pairwise NCA: K = 2 and hard labels.

    >>> from align_jax.losses.pairs import example_pair
    >>> [round(x, 4) for x in nca_pair(example_pair(), beta=0.5).tolist()]
    [1.1982, 1.4019]
    """
    chosen, rejected = scaled_sides(pair, beta)
    return -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected)


def bco_pair(pair: Pair, *, beta: Beta = 0.1) -> Float[Array, "B"]:
    """Compute binary classifier optimization on pairs: -log σ(β x_w) - log σ(-β x_l), without a
    reward shift.

    References:
        Jung et al. 2024, arXiv 2404.04656, the BCO loss on pairs.

    >>> from align_jax.losses.pairs import example_pair
    >>> [round(x, 4) for x in bco_pair(example_pair(), beta=0.5).tolist()]
    [0.9482, 1.4019]
    """
    chosen, rejected = scaled_sides(pair, beta)
    return -log_sigmoid(chosen) - log_sigmoid(-rejected)


def sppo_hard(pair: Pair, *, beta: Beta = 0.1) -> Float[Array, "B"]:
    """Compute SPPO with hard labels: (x_w - 1/(2β))² + (x_l + 1/(2β))².

    References:
        Wu et al. 2024, arXiv 2405.00675, equation 4.7 with P = 1 for the chosen and 0 for the
        rejected (β is 1/η).

    >>> from align_jax.losses.pairs import example_pair
    >>> [round(x, 4) for x in sppo_hard(example_pair(), beta=0.25).tolist()]
    [2.0, 8.5]
    """
    half = 0.5 * pair.margin / beta
    return square(pair.chosen - half - 0.5 / beta) + square(pair.rejected + half + 0.5 / beta)


def apo_zero(pair: Pair, *, beta: Beta = 0.1) -> Float[Array, "B"]:
    """Compute APO-zero, for chosen responses better than the model's own: 1 - σ(β x_w) + σ(β x_l).

    References:
        D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7.

    >>> from align_jax.losses.pairs import example_pair
    >>> [round(x, 4) for x in apo_zero(example_pair(), beta=0.5).tolist()]
    [0.7551, 1.0]
    """
    chosen, rejected = scaled_sides(pair, beta)
    return sigmoid(-chosen) + sigmoid(rejected)


def apo_down(pair: Pair, *, beta: Beta = 0.1) -> Float[Array, "B"]:
    """Compute APO-down, for chosen responses worse than the model's own: σ(β x_w) + 1 - σ(β (x_w -
    x_l)).

    Both responses are made less likely, the rejected one more so.

    References:
        D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 8.

    >>> from align_jax.losses.pairs import example_pair
    >>> [round(x, 4) for x in apo_down(example_pair(), beta=0.5).tolist()]
    [0.8914, 1.0622]
    """
    return sigmoid(beta * pair.chosen) + sigmoid(-scaled_difference(pair, beta))


def discopop(
    pair: Pair,
    *,
    beta: Beta = 0.1,
    tau: Annotated[
        float, Option("τ: how softly the two parts blend around β d = 0", above=0)
    ] = 0.05,
) -> Float[Array, "B"]:
    """Compute DiscoPOP, the log-ratio modulated loss.

        (1-g) (-log σ(z)) + g e^(-z),    z = β d,  g = σ(z / τ)

    g e^(-z) is computed as one exponential, so that it does not become 0 · ∞; its exponent is cut
    at 80.

    References:
        Lu et al. 2024, arXiv 2406.08414, equation 5.

    >>> from align_jax.losses.pairs import example_pair
    >>> [round(x, 4) for x in discopop(example_pair(), beta=0.5).tolist()]
    [0.3679, 0.8466]
    """
    z = scaled_difference(pair, beta)
    return -sigmoid(-z / tau) * log_sigmoid(z) + jnp.exp(
        jnp.minimum(log_sigmoid(z / tau) - z, EXP_MAX)
    )


def dpo_sigmoid(pair: Pair, *, beta: Beta = 0.1) -> Float[Array, "B"]:
    """Compute the sigmoid loss, bounded and so robust to wrong labels: -σ(β d).

    References:
        The noise-aware loss of Liang et al. 2024, arXiv 2404.04102 (ROPO), up to a constant.

    >>> from align_jax.losses.pairs import example_pair
    >>> [round(x, 4) for x in dpo_sigmoid(example_pair(), beta=0.5).tolist()]
    [-0.7311, -0.5]
    """
    return -sigmoid(scaled_difference(pair, beta))


def dpop(
    pair: Pair,
    *,
    beta: Beta = 0.1,
    lam: Annotated[
        float, Option("λ: weight of the chosen response's fall below the reference", low=0)
    ] = 50.0,
) -> Float[Array, "B"]:
    """Compute DPO-positive, which forbids the chosen response to become less likely than under the
    reference.

        -log σ(β (d - λ max(0, R_w - P_w)))

    References:
        Pal et al. 2024, arXiv 2402.13228 (Smaug), the DPOP loss; λ = 50 is the paper's.

    >>> from align_jax.losses.pairs import make_pair
    >>> pair = make_pair([[-10.0, -12.0], [-10.0, -12.0]], [[-11.0, -11.0], [-9.9, -9.0]])
    >>> [round(x, 4) for x in dpop(pair, beta=0.5).tolist()]
    [0.3133, 1.3501]
    """
    penalty = lam * jnp.maximum(pair.reference_chosen - pair.policy_chosen, 0.0)
    return -log_sigmoid(scaled_difference(pair, beta) - beta * penalty)


def dpo_shift(
    pair: Pair,
    *,
    beta: Beta = 0.1,
    shift: Annotated[
        float, Option("f(λ): what the rejected log-ratio counts; 1 = dpo", above=0, high=1)
    ] = 0.95,
) -> Float[Array, "B"]:
    """Compute DPO-Shift, which trades margin for the chosen response's probability.

        -log σ(β x_w - f(λ) β x_l - margin)

    References:
        Yang et al. 2025, arXiv 2502.07599, the DPO-Shift loss with a fixed f(λ).

    >>> from align_jax.losses.pairs import example_pair
    >>> [round(x, 4) for x in dpo_shift(example_pair(), beta=0.5, shift=0.5).tolist()]
    [0.3869, 0.6326]
    """
    return -log_sigmoid(beta * pair.chosen - shift * beta * pair.rejected - pair.margin)


def rpo(
    pair: Pair,
    *,
    beta: Beta = 0.1,
    eta: Annotated[float, Option("η: scale of the data's margins", above=0)] = 1.0,
    form: Annotated[
        Literal["backward_kl", "forward_kl", "square"],
        Option("distance of the implicit reward's gap from the data's"),
    ] = "backward_kl",
) -> Float[Array, "B"]:
    """Compute reward-aware preference optimization: the implicit rewards' gap is to be the data's,
    not only positive.

        z = β d,    g = η margin
        backward_kl: σ(g) log(σ(g) / σ(z)) + σ(-g) log(σ(-g) / σ(-z))
        forward_kl:  σ(z) log(σ(z) / σ(g)) + σ(-z) log(σ(-z) / σ(-g))
        square:      (z - g)²

    The margin is a target here, not an offset; a pair without one (0) is drawn to indifference.

    References:
        Sun et al. 2025, arXiv 2502.00203, section 2; NVIDIA 2024, arXiv 2406.11704, section 3.3.2.

    >>> from align_jax.losses.pairs import example_pair
    >>> [round(x, 4) for x in rpo(example_pair(margin=1.0), beta=0.5).tolist()]
    [0.0, 0.1109]
    """
    z, g = beta * (pair.chosen - pair.rejected), eta * pair.margin
    if form == "square":
        return square(z - g)
    p, q = (z, g) if form == "forward_kl" else (g, z)
    return sigmoid(p) * (log_sigmoid(p) - log_sigmoid(q)) + sigmoid(-p) * (
        log_sigmoid(-p) - log_sigmoid(-q)
    )
