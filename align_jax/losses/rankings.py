# SPDX-License-Identifier: Apache-2.0
"""Policies learned from rankings: a group's responses, the best first."""

import dataclasses
from typing import Annotated, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from align_jax.core.schema import Batch
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
from align_jax.losses.pairs import Beta
from align_jax.losses.preference import smoothed_logistic, square


class Ranking(NamedTuple):
    """Which responses are there, the best first: some may bear no loss, and groups may hold fewer
    than K.

    Attributes:
        order: [B, K] indices of those that are there, then of the others.
        number: [B] of those that are there.
        scores: [B, K]; equal ones say nothing of each other.
    """

    order: Int[Array, "B K"]
    number: Int[Array, "B"]
    scores: Float[Array, "B K"]

    @classmethod
    def of(cls, batch: Batch) -> "Ranking":
        """Read a batch's rankings."""
        real = jnp.asarray(batch.lengths) > 0
        places = jnp.broadcast_to(-jnp.arange(real.shape[1], dtype=jnp.float32), real.shape)
        scores = places if batch.scores is None else jnp.asarray(batch.scores, jnp.float32)
        order = jnp.argsort(~real, axis=1, stable=True)
        return cls(order, real.sum(axis=1, dtype=jnp.int32), scores)

    def take(self, x: Float[Array, "B K"], place: int) -> Float[Array, "B"]:
        """Return the value of the response at a place of the ranking; -1: of the last there is."""
        last = jnp.maximum(self.number - 1, 0)
        at = last if place < 0 else jnp.full_like(last, place)
        index = jnp.take_along_axis(self.order, at[:, None], axis=1)
        return jnp.take_along_axis(x, index, axis=1)[:, 0]

    def above_last(self, place: int) -> Float[Array, "B"]:
        """Return 1.0 where the response at a place is better than the last one, 0.0 where they are
        a tie, or one."""
        unequal = self.take(self.scores, place) != self.take(self.scores, -1)
        return (unequal & (place < self.number - 1)).astype(jnp.float32)


def _metrics(
    batch: Batch,
    ranking: Ranking,
    better: int,
    rewards: Float[Array, "B K"],
    logps: Float[Array, "B K"],
) -> Metrics:
    """Report the response at a place as a pair's chosen and the last one as its rejected, where
    they are no tie."""
    weight = group_weights(batch) * ranking.above_last(better)
    chosen, rejected = ranking.take(rewards, better), ranking.take(rewards, -1)
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
        "logps/chosen": ranking.take(logps, better),
        "logps/rejected": ranking.take(logps, -1),
    }
    return {name: summed(value, weight) for name, value in values.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tpo(Loss):
    """Triple preference optimization: a gold response beside a pair, without a reference.

        mean:  S(β (p̄_w - p̄_l) - γ) - α p̄_gold          (TPO-L)
        sum:   S(β (P_w - P_l)) - α P_gold                (TPO)
        hinge: max(0, 1 - β (P_w - P_l)) - α P_gold
        ipo:   (p̄_w - p̄_l - 1 / (2 β))² - α p̄_gold

    S(z) = -(1-ε) log σ(z) - ε log σ(-z).  Of a ranking the best response is the gold one, the next
    the chosen, the last the rejected; where these two have equal ``batch.scores``, the gold one
    alone is learned.

    References:
        Saeidi et al. 2024, arXiv 2405.16681, the TPO and TPO-L losses; hinge: Zhao et al. 2023,
        arXiv 2305.10425; ipo: Azar et al. 2023, arXiv 2310.12036, equation 17.

    >>> from align_jax.losses import jitted
    >>> found = jitted("tpo", form="sum", beta=0.5, alpha=0.1)([[-5.0, -10.0, -12.0]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [0.8133]
    """

    beta: Beta = 2.0
    alpha: Annotated[float, Option("α: weight of the gold response's likelihood", low=0)] = 1.0
    gamma: Annotated[
        float, Option("γ: target margin", unit="of reward", only={"form": ("mean",)})
    ] = 0.5
    form: Annotated[
        Literal["mean", "sum", "hinge", "ipo"],
        Option("log-probabilities per token (TPO-L), of responses (TPO), or another loss of pairs"),
    ] = "mean"
    label_smoothing: Annotated[
        float,
        Option(
            "ε: share of pairs that are labeled the wrong way round",
            low=0,
            below=0.5,
            only={"form": ("mean", "sum")},
        ),
    ] = 0.0

    def _contrast(self, difference: Float[Array, "B"]) -> Float[Array, "B"]:
        """Compute the chosen response's part against the rejected one."""
        if self.form == "hinge":
            return jnp.maximum(1.0 - self.beta * difference, 0.0)
        if self.form == "ipo":
            return square(difference - 0.5 / self.beta)
        margin = self.gamma if self.form == "mean" else 0.0
        return smoothed_logistic(self.beta * difference - margin, self.label_smoothing)

    def losses(self, inputs: Inputs) -> Result:
        batch, logps = inputs.batch, inputs.policy.logps
        if logps.shape[1] < 3:
            raise ValueError(
                "tpo expects rankings of R >= 3 responses (gold, chosen, rejected), got R = "
                f"{logps.shape[1]}"
            )
        per_token, ranking = self.form in ("mean", "ipo"), Ranking.of(batch)
        x = logps / jnp.maximum(token_counts(batch), 1.0) if per_token else logps
        contrast = self._contrast(ranking.take(x, 1) - ranking.take(x, -1))
        losses = ranking.above_last(1) * contrast - self.alpha * ranking.take(x, 0)
        metrics = _metrics(batch, ranking, 1, self.beta * x, logps)
        return losses, metrics | {
            "logps/gold": summed(ranking.take(logps, 0), group_weights(batch))
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adpo(Loss):
    """Anchored DPO on lists: a softmax over the responses' log-ratios, drawn to a target.

        -Σ_i q_i log softmax(β x)_i
        target = "best": q is 1 at the best response;    "scores": q = softmax(scores / temperature)

    A response without tokens is not there: groups may hold fewer than K.  Several best ones, of
    equal ``batch.scores``, share q.

    References:
        Wang 2025, arXiv 2510.18913, the listwise anchored loss (β is its 1/τ).

    >>> from align_jax.losses import jitted
    >>> logps = [[-10.0, -12.0, -9.0]]
    >>> [round(jitted("adpo", beta=0.5)(logps, reference=[[-11.0, -11.0, -9.0]]).loss.item(), 4)]
    [0.6803]
    """

    beta: Beta = 0.1
    target: Annotated[
        Literal["best", "scores"], Option("all on the best response, or by the data's scores")
    ] = "best"
    temperature: Annotated[
        float, Option("the scores are divided by it", above=0, only={"target": ("scores",)})
    ] = 1.0

    reference: ClassVar[bool] = True

    def losses(self, inputs: Inputs) -> Result:
        batch = inputs.batch
        real = jnp.asarray(batch.lengths) > 0
        rewards = self.beta * (inputs.policy.logps - inputs.of_reference("logps"))
        logs = jax.nn.log_softmax(jnp.where(real, rewards, -1e30), axis=1)
        ranking = Ranking.of(batch)
        if self.target == "best":
            best = ranking.scores == ranking.take(ranking.scores, 0)[:, None]
            best = (real & best).astype(jnp.float32)
            target = best / jnp.maximum(best.sum(axis=1, keepdims=True), 1.0)
        else:
            scores = jnp.where(real, inputs.of_batch("scores") / self.temperature, -1e30)
            target = jax.nn.softmax(scores, axis=1)
        losses = -(target * jnp.where(real, logs, 0.0)).sum(axis=1)
        return losses, _metrics(batch, ranking, 0, rewards, inputs.policy.logps)
