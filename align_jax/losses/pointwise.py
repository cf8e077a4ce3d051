# SPDX-License-Identifier: Apache-2.0
"""Reward models that learn from one response at a time: a number, or a label."""

import dataclasses
from typing import Annotated

import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Bool, Float

from align_jax.losses.objective import Inputs, Metrics, Result, group_weights, summed
from align_jax.losses.options import Option
from align_jax.losses.supervised import ScoreLoss

PositiveWeight = Annotated[
    float, Option("weight of what is labeled true, beside 1 of what is labeled false", above=0)
]


def binary_cross_entropy(
    scores: Float[Array, "..."], labels: Float[Array, "..."], positive_weight: float
) -> Float[Array, "..."]:
    """Compute -w y log σ(s) - (1 - y) log σ(-s); a label y may lie between 0 and 1."""
    return -positive_weight * labels * log_sigmoid(scores) - (1.0 - labels) * log_sigmoid(-scores)


def judged(
    right: Bool[Array, "..."], true: Bool[Array, "..."], weight: Float[Array, "..."]
) -> Metrics:
    """Report the accuracy, and that of what is labeled true and false by itself.

    Args:
        right: where the score is on its label's side of 0.
        true: where the label is true.
        weight: 0 where there is nothing to judge.
    """
    hits, positive = right.astype(jnp.float32), jnp.where(true, weight, 0.0)
    shares = {"accuracy": weight, "accuracy/true": positive, "accuracy/false": weight - positive}
    return {name: ((share * hits).sum(), share.sum()) for name, share in shares.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardRegression(ScoreLoss):
    """The squared error of a reward model on responses with a number.

        (r - s)²,    s the data's score

    A reward is in the data's own units: scores of a wide range want a smaller learning rate, or
    are to be scaled first.

    References:
        Wang et al. 2024, arXiv 2406.08673, section 3.1 (a reward model on annotated numbers).

    >>> from align_jax.losses import jitted
    >>> found = jitted("reward_regression")([1.0, 0.5], scores=[[3.0], [0.5]])
    >>> found.losses.tolist(), float(found.metrics["absolute_error"])
    ([4.0, 0.0], 1.0)
    """

    def losses(self, inputs: Inputs) -> Result:
        gap = (inputs.of_policy("scores") - inputs.of_batch("scores"))[:, 0]
        metrics = self.metrics(inputs, jnp.ones(inputs.batch.lengths.shape, bool))
        weight = group_weights(inputs.batch)
        metrics["absolute_error"] = summed(jnp.abs(gap), weight)
        metrics["mean_score"] = summed(inputs.of_batch("scores")[:, 0], weight)
        return jnp.square(gap), metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardClassification(ScoreLoss):
    """The binary cross-entropy of a reward model on labeled responses.

        desirable: -w log σ(r);    undesirable: -log σ(-r)

    σ(r) is the probability that a response is desirable; the accuracy counts r > 0 as desirable.

    References:
        Cobbe et al. 2021, arXiv 2110.14168, section 4.2 (a verifier of whole solutions).

    >>> from align_jax.losses import jitted
    >>> found = jitted("reward_classification")([2.0, 2.0], label=[True, False])
    >>> [round(x, 4) for x in found.losses.tolist()], float(found.metrics["accuracy"])
    ([0.1269, 2.1269], 0.5)
    """

    positive_weight: PositiveWeight = 1.0

    def losses(self, inputs: Inputs) -> Result:
        scores, weight = inputs.of_policy("scores")[:, 0], group_weights(inputs.batch)
        label = inputs.of_batch("label")
        losses = binary_cross_entropy(scores, label.astype(jnp.float32), self.positive_weight)
        metrics = self.metrics(inputs, jnp.ones(inputs.batch.lengths.shape, bool))
        right = jnp.where(label, scores > 0, scores < 0)
        return losses, metrics | judged(right, label, weight)
