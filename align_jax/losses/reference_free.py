# SPDX-License-Identifier: Apache-2.0
"""Paired objectives without a reference.

Each is a function of a ``Pair`` made without a reference: P_w, P_l are the log-probabilities of the
chosen and the rejected response, p̄ = P / n those per token; [B] float32, nats and tokens; each
returns [B] losses.
"""

from typing import Annotated, Literal

import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Float

from align_jax.losses.options import Option
from align_jax.losses.pairs import EXP_MAX, Beta, LabelSmoothing, Pair
from align_jax.losses.preference import smoothed_logistic, square

CERTAIN = -1e-6  # the odds of a response of mean log-probability 0 would be infinite

GammaBetaRatio = Annotated[
    float, Option("γ/β: target margin of the log-probability per token", unit="nats a token", low=0)
]


def _means(pair: Pair) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    return pair.policy_chosen / pair.chosen_length, pair.policy_rejected / pair.rejected_length


def simpo(
    pair: Pair,
    *,
    beta: Beta = 2.0,
    gamma_beta_ratio: GammaBetaRatio = 0.5,
    label_smoothing: LabelSmoothing = 0.0,
) -> Float[Array, "B"]:
    """Compute the SimPO loss.

        -log σ(β (p̄_w - p̄_l - γ/β) - margin)

    References:
        Meng et al. 2024, arXiv 2405.14734, equation 6.

    >>> from align_jax.losses.pairs import example_pair
    >>> [round(x, 4) for x in simpo(example_pair(), beta=2.0).tolist()]
    [2.1269, 0.4144]
    """
    chosen, rejected = _means(pair)
    return smoothed_logistic(
        beta * (chosen - rejected - gamma_beta_ratio) - pair.margin, label_smoothing
    )


def alphapo(
    pair: Pair,
    *,
    beta: Beta = 2.0,
    gamma_beta_ratio: GammaBetaRatio = 0.5,
    alpha: Annotated[float, Option("α: shape of the reward; 0 = simpo's")] = 0.25,
    label_smoothing: LabelSmoothing = 0.0,
) -> Float[Array, "B"]:
    """Compute AlphaPO: SimPO on a reward of another shape.

        -log σ(β (r_w - r_l - γ/β) - margin),    r = (1 - e^(-α p̄)) / α

    α = 0 is SimPO.  The exponent is cut at 80.

    References:
        Gupta et al. 2025, arXiv 2501.03884, the AlphaPO loss.

    >>> from align_jax.losses.pairs import example_pair
    >>> [round(x, 4) for x in alphapo(example_pair(), alpha=0.25).tolist()]
    [2.8178, 0.071]
    """
    if alpha == 0:
        return simpo(
            pair, beta=beta, gamma_beta_ratio=gamma_beta_ratio, label_smoothing=label_smoothing
        )
    chosen, rejected = (
        -jnp.expm1(jnp.minimum(-alpha * mean, EXP_MAX)) / alpha for mean in _means(pair)
    )
    return smoothed_logistic(
        beta * (chosen - rejected - gamma_beta_ratio) - pair.margin, label_smoothing
    )


def orpo(
    pair: Pair, *, lam: Annotated[float, Option("λ: weight of the odds-ratio term", low=0)] = 0.1
) -> Float[Array, "B"]:
    """Compute ORPO's odds-ratio term; its NLL of the chosen response is the term that ``sft_coef``
    adds.

        -λ log σ(log odds_w - log odds_l - margin),    log odds = p̄ - log(1 - e^p̄)

    p̄ above -1e-6 is cut there in the logarithm, where the odds would become infinite.

    References:
        Hong et al. 2024, arXiv 2403.07691, equations 6 and 7.

    >>> from align_jax.losses.pairs import example_pair
    >>> [round(x, 4) for x in orpo(example_pair(), lam=0.1).tolist()]
    [0.1012, 0.0349]
    """
    chosen, rejected = (
        mean - jnp.log(-jnp.expm1(jnp.minimum(mean, CERTAIN))) for mean in _means(pair)
    )
    return -lam * log_sigmoid(chosen - rejected - pair.margin)


def cpo(
    pair: Pair,
    *,
    beta: Beta = 0.1,
    label_smoothing: Annotated[
        float,
        Option(
            "share of the labels that is taken to be flipped",
            low=0,
            below=0.5,
            only={"form": ("sigmoid",)},
        ),
    ] = 0.0,
    form: Annotated[
        Literal["sigmoid", "hinge", "ipo"], Option("a logistic loss, a hinge, or ipo's square")
    ] = "sigmoid",
) -> Float[Array, "B"]:
    """Compute CPO's preference term; its NLL of the chosen response is the term that ``alpha``
    adds.

        sigmoid: -(1-ε) log σ(z) - ε log σ(-z),    z = β (P_w - P_l) - margin
        hinge:   max(0, 1 - z)
        ipo:     (p̄_w - p̄_l - margin/β - 1/(2β))²

    References:
        Xu et al. 2024, arXiv 2401.08417, equation 3.  The other forms: TRL 1.16.0,
        ``cpo_trainer.py``.

    >>> from align_jax.losses.pairs import example_pair
    >>> [round(x, 4) for x in cpo(example_pair(), beta=0.1).tolist()]
    [0.5981, 0.7444]
    """
    z = beta * (pair.policy_chosen - pair.policy_rejected) - pair.margin
    if form == "sigmoid":
        return smoothed_logistic(z, label_smoothing)
    if form == "hinge":
        return jnp.maximum(1.0 - z, 0.0)
    chosen, rejected = _means(pair)
    return square(chosen - rejected - pair.margin / beta - 0.5 / beta)


def slic(
    pair: Pair,
    *,
    delta: Annotated[
        float, Option("δ: margin that the chosen response is to have", unit="nats", low=0)
    ] = 1.0,
    lam: Annotated[float, Option("λ: weight of the chosen response's likelihood", low=0)] = 0.1,
) -> Float[Array, "B"]:
    """Compute SLiC-HF: a calibration loss on sequences, kept near the chosen responses.

        max(0, δ + margin - P_w + P_l) - λ P_w

    References:
        Zhao et al. 2023, arXiv 2305.10425, the SLiC-HF loss with the chosen response as the
        regularization target.

    >>> from align_jax.losses.pairs import example_pair
    >>> [round(x, 4) for x in slic(example_pair()).tolist()]
    [1.0, 2.8]
    """
    calibration = jnp.maximum(delta + pair.margin - pair.policy_chosen + pair.policy_rejected, 0.0)
    return calibration - lam * pair.policy_chosen


def simper(pair: Pair) -> Float[Array, "B"]:
    """Compute SimPER, the difference of inverse perplexities, which has no option to tune.

        -e^(p̄_w - margin/2) + e^(p̄_l + margin/2)

    References:
        Xiao et al. 2025, arXiv 2502.00883, the SimPER loss.

    >>> from align_jax.losses.pairs import example_pair
    >>> [round(x, 4) for x in simper(example_pair()).tolist()]
    [0.0533, -0.0393]
    """
    chosen, rejected = _means(pair)
    half = 0.5 * pair.margin
    return jnp.exp(rejected + half) - jnp.exp(chosen - half)
