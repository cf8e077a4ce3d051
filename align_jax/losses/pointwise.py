# SPDX-License-Identifier: Apache-2.0
"""Reward models that learn from one response at a time: a number, a label, or a label for each of
its steps."""

import dataclasses
from typing import Annotated, Literal

import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Bool, Float, Int

from align_jax.core.schema import Batch
from align_jax.losses.advantages import discounted_sum
from align_jax.losses.logprobs import spread_to_tokens, sum_by_slot
from align_jax.losses.objective import (
    Inputs,
    Loss,
    Metrics,
    Result,
    group_weights,
    summed,
    token_counts,
)
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


def first_by_slot(flags: Bool[Array, "N T"], batch: Batch) -> Int[Array, "B R"]:
    """Return the index of each response's first flagged loss token; T where there is none."""
    rows, length = flags.shape
    slots = jnp.arange(batch.lengths.size // rows)
    own = (batch.slot[:, :, None] == slots[None, None]) & (flags & batch.loss_mask)[
        :, :, None
    ]  # [N, T, S]
    index = jnp.arange(length, dtype=jnp.int32)[None, :, None]
    return jnp.where(own, index, length).min(axis=1).reshape(batch.lengths.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardProcess(Loss):
    """The binary cross-entropy of a process reward model at the ends of labeled steps.

        mean over the ends t of steps of  -w y_t log σ(r_t) - (1 - y_t) log σ(-r_t)

    r_t is the score head at the step's last token (of its separator), σ(r_t) the probability that
    the step is right.  It is the cross-entropy of two classes whose logits differ by r_t.
    ``accuracy`` is that of steps, and ``first_error`` of responses: whether the first step that is
    taken for wrong is the first wrong one (none, where none is), of all responses and of those with
    and without a wrong step.

    References:
        Lightman et al. 2023, arXiv 2305.20050, section 2.6; Wang et al. 2023, arXiv 2312.08935,
        equation 2; TRL 1.9.0, ``prm_trainer.py``.  The first error: Zheng et al. 2024, arXiv
        2412.06559 (ProcessBench).

    >>> from align_jax.losses import jitted
    >>> found = jitted("reward_process")([[0.0, 2.0]], [[1.0, 0.0]], mask=[[True, True]])
    >>> [round(x, 4) for x in found.losses.tolist()], found.weights.tolist()
    ([1.41], [2.0])
    """

    steps: Annotated[
        Literal["all", "last"],
        Option("which of a response's steps are learned; the metrics are those of all"),
    ] = "all"
    positive_weight: PositiveWeight = 1.0

    @property
    def needs(self) -> tuple[str, ...]:
        return ("step_scores",)

    def _counts(self, batch: Batch) -> Float[Array, "B R"]:
        counts = token_counts(batch)
        return jnp.minimum(counts, 1.0) if self.steps == "last" else counts

    def weights(self, batch: Batch) -> Float[Array, "B"]:
        return group_weights(batch) * self._counts(batch).sum(axis=1)

    def losses(self, inputs: Inputs) -> Result:
        batch = inputs.batch
        scores, labels = inputs.of_policy("step_scores"), inputs.of_batch("step_labels")
        each = binary_cross_entropy(scores, labels, self.positive_weight)
        mask, slot = jnp.asarray(batch.loss_mask), jnp.asarray(batch.slot)
        if self.steps == "last":
            ahead = discounted_sum(jnp.ones(mask.shape, jnp.float32), mask, slot, 1.0)
            each = jnp.where(ahead == 1.0, each, 0.0)
        counts = self._counts(batch).sum(axis=1)
        losses = sum_by_slot(each, batch).sum(axis=1) / jnp.maximum(counts, 1.0)
        return losses, self._metrics(batch, scores, labels)

    def _metrics(
        self, batch: Batch, scores: Float[Array, "N T"], labels: Float[Array, "N T"]
    ) -> Metrics:
        group, real = group_weights(batch)[:, None], jnp.asarray(batch.lengths) > 0
        weight = jnp.where(real, group, 0.0)  # [B, R]
        by_step = spread_to_tokens(weight, batch)
        true = labels >= 0.5
        found = judged(jnp.where(true, scores > 0, scores <= 0), true, by_step)
        found["mean_reward"] = (by_step * scores).sum(), by_step.sum()
        first, taken = first_by_slot(~true, batch), first_by_slot(scores <= 0, batch)
        hit, wrong = (first == taken).astype(jnp.float32), first < scores.shape[1]
        shares = {
            "first_error": weight,
            "first_error/wrong": jnp.where(wrong, weight, 0.0),
            "first_error/right": jnp.where(wrong, 0.0, weight),
        }
        return found | {name: ((x * hit).sum(), x.sum()) for name, x in shares.items()}
