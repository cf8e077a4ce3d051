# SPDX-License-Identifier: Apache-2.0
"""Supervised objectives: fine-tuning on responses, and reward models on a score head."""

import dataclasses
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Bool, Float

from align_jax.core.metrics import Greatest, Least
from align_jax.core.schema import Batch
from align_jax.losses.logprobs import sum_by_slot
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

# means over the learned tokens, by TRL's names
TOKEN_METRICS = {"entropy": "entropy", "mean_token_accuracy": "most_probable"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLoss(Loss):
    """The negative log-likelihood of some of each group's responses, nats a token.

    Reported beside it are the entropy of the policy's distributions, and the share of tokens than
    which none is more probable.
    """

    per: Annotated[
        Literal["token", "sequence"],
        Option("every token of the global batch counts the same, or every response"),
    ] = "token"

    responses: ClassVar[slice] = slice(None)  # those of a group that are learned

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(TOKEN_METRICS.values())

    def _groups(self, batch: Batch) -> Float[Array, "B"]:
        """Weigh each group; of unpaired feedback the desirable ones alone are imitated."""
        weight = group_weights(batch)
        return weight if batch.label is None else jnp.where(batch.label, weight, 0.0)

    def token_losses(self, inputs: Inputs) -> Float[Array, "N T"]:
        """Compute each token's loss."""
        return -inputs.policy.token_logps

    def _counts(self, batch: Batch) -> Float[Array, "B r"]:
        return token_counts(batch)[:, self.responses]

    def weights(self, batch: Batch) -> Float[Array, "B"]:
        weight = self._groups(batch)
        return weight * self._counts(batch).sum(axis=1) if self.per == "token" else weight

    def losses(self, inputs: Inputs) -> Result:
        batch, policy, counts = inputs.batch, inputs.policy, self._counts(inputs.batch)
        sums = sum_by_slot(self.token_losses(inputs), batch)[:, self.responses]  # [B, r]
        if self.per == "token":
            losses = sums.sum(axis=1) / jnp.maximum(counts.sum(axis=1), 1.0)
        else:
            losses = (sums / jnp.maximum(counts, 1.0)).mean(axis=1)
        weight = self._groups(batch)
        total = (weight * counts.sum(axis=1)).sum()
        reported = {"nll": -policy.logps[:, self.responses]}
        for name, field in TOKEN_METRICS.items():
            if (said := getattr(policy, field)) is not None:
                reported[name] = sum_by_slot(said, batch)[:, self.responses]
        return losses, {
            name: ((weight[:, None] * value).sum(), total) for name, value in reported.items()
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sft(TokenLoss):
    """The negative log-likelihood of each group's first response: of a pair, the chosen one; of
    unpaired feedback, the desirable ones'.

        per token:    Σ_i Σ_t -m_it a_it / Σ_i n_i, over the global batch
        per sequence: the mean over i of Σ_t -m_it a_it / n_i
        dft:          each token's loss times sg(exp a_it)

    References:
        dft: Wu et al. 2025, arXiv 2508.05629, the DFT loss.

    >>> from align_jax.losses import jitted
    >>> found = jitted("sft")([[-1.0, -3.0], [-2.0, 0.0]], mask=[[True, True], [True, False]])
    >>> found.losses.tolist(), found.weights.tolist(), float(found.loss)
    ([2.0, 2.0], [2.0, 1.0], 2.0)
    """

    dft: Annotated[bool, Option("dynamic fine-tuning: each token's loss times its probability")] = (
        False
    )

    responses: ClassVar[slice] = slice(0, 1)

    def token_losses(self, inputs: Inputs) -> Float[Array, "N T"]:
        losses, logps = super().token_losses(inputs), inputs.policy.token_logps
        return losses * jax.lax.stop_gradient(jnp.exp(logps)) if self.dft else losses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Csft(TokenLoss):
    """Conditional fine-tuning: ``sft`` on all of a group's responses, each after its control token.

    The data layer writes the control tokens; sampling later conditions on the one for chosen
    responses.

    References:
        Korbak et al. 2023, arXiv 2302.08582, section 2 (conditional training); HALOs
        ``config/loss/csft.yaml``.

    >>> from align_jax.losses import jitted
    >>> found = jitted("csft")([[-1.0, -3.0], [-2.0, -2.0]], [[-4.0, -2.0], [-1.0, -3.0]])
    >>> found.losses.tolist()
    [2.5, 2.0]
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreLoss(Loss):
    """A loss of a reward model's scores."""

    @property
    def needs(self) -> tuple[str, ...]:
        return ("scores",)

    def metrics(self, inputs: Inputs, real: Bool[Array, "B R"]) -> Metrics:
        """Report the batch's lowest, mean and highest reward, as TRL does."""
        scores, weight = inputs.of_policy("scores"), group_weights(inputs.batch)[:, None]
        real &= weight > 0
        counts = jnp.where(real, weight, 0.0)
        return {
            "min_reward": Least(jnp.where(real, scores, jnp.inf).min()),
            "mean_reward": ((counts * scores).sum(), counts.sum()),
            "max_reward": Greatest(jnp.where(real, scores, -jnp.inf).max()),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward(ScoreLoss):
    """The Bradley-Terry loss of a reward model on pairs.

        -log σ(r_w - r_l - margin) + center_coef (r_w + r_l)²

    The accuracy counts strictly greater.

    References:
        Ouyang et al. 2022, arXiv 2203.02155, equation 1; margin: Touvron et al. 2023, arXiv
        2307.09288, equation 2; centering: Eisenstein et al. 2023, arXiv 2312.09244.

    >>> from align_jax.losses import jitted
    >>> found = jitted("reward", center_coef=0.01)([[1.0, 0.0], [0.5, 0.5]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [0.3233, 0.7031]
    """

    center_coef: Annotated[
        float,
        Option(
            "weight of (r_w + r_l)², which keeps the rewards' mean near 0; 0.01 is usual", low=0
        ),
    ] = 0.0

    def losses(self, inputs: Inputs) -> Result:
        scores, weight = inputs.of_policy("scores"), group_weights(inputs.batch)
        if scores.shape[1] != 2:
            raise ValueError(
                f"reward expects pairs (R = 2), got R = {scores.shape[1]}; for more use "
                "reward_ranked"
            )
        chosen, rejected = scores.T  # [B] each
        difference, margin = chosen - rejected, inputs.batch.margin
        excess = difference if margin is None else difference - jnp.asarray(margin, jnp.float32)
        losses = -log_sigmoid(excess) + self.center_coef * jnp.square(chosen + rejected)
        metrics = self.metrics(inputs, jnp.ones(scores.shape, bool))
        metrics["accuracy"] = summed((difference > 0).astype(jnp.float32), weight)
        metrics["margin"] = summed(difference, weight)
        return losses, metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardRanked(ScoreLoss):
    """A ranking loss of a reward model on K responses, the best first.

        plackett_luce: -Σ_k log softmax(r_k, ..., r_K)[k]
        pairs:         the mean over i < j of -log σ(r_i - r_j)
        best_of:       -log softmax(r_1, ..., r_K)[1]

    A response without tokens is not there: groups may hold fewer than K.  Responses whose
    ``batch.scores`` are equal say nothing of each other: such pairs do not count, neither of the
    two stands in the other's softmax, and of several best ones the mean is taken.  Accuracy is the
    share of pairs in order.

    References:
        plackett_luce: Rafailov et al. 2023, arXiv 2305.18290, equation 18; pairs: Ouyang et al.
        2022, arXiv 2203.02155, equation 1; best_of: Ziegler et al. 2019, arXiv 1909.08593, equation
        1.

    >>> from align_jax.losses import jitted
    >>> for form in ("plackett_luce", "pairs", "best_of"):
    ...     print(round(jitted("reward_ranked", form=form)([[2.0, 1.0, 0.0]]).losses.item(), 4))
    0.7209
    0.2512
    0.4076
    """

    form: Annotated[
        Literal["plackett_luce", "pairs", "best_of"],
        Option("likelihood of the ranking, of each pair's order, or of the best"),
    ] = "plackett_luce"

    def losses(self, inputs: Inputs) -> Result:
        batch, scores = inputs.batch, inputs.of_policy("scores")
        weight, real = group_weights(batch), jnp.asarray(batch.lengths) > 0
        responses = scores.shape[1]
        above = jnp.triu(jnp.ones((responses, responses), bool), 1)[None]
        ordered = above & real[:, :, None] & real[:, None, :]  # [B, K, K]: i before j
        if batch.scores is not None:
            known = jnp.asarray(batch.scores)
            ordered &= known[:, :, None] != known[:, None, :]
        difference = scores[:, :, None] - scores[:, None, :]
        pairs = ordered.astype(jnp.float32)
        count = pairs.sum(axis=(1, 2))
        if self.form == "pairs":
            losses = (pairs * -log_sigmoid(difference)).sum(axis=(1, 2)) / jnp.maximum(count, 1.0)
        else:
            # log-sum-exp over each response and those below it that are there
            rest = ordered | jnp.eye(responses, dtype=bool)[None]
            masked = jnp.where(rest, jnp.broadcast_to(scores[:, None, :], rest.shape), -1e30)
            terms = jnp.where(real, jax.nn.logsumexp(masked, axis=2) - scores, 0.0)
            losses = terms.sum(axis=1)
            if self.form == "best_of":
                best = (real & ~ordered.any(axis=1)).astype(jnp.float32)
                losses = (best * terms).sum(axis=1) / jnp.maximum(best.sum(axis=1), 1.0)
        metrics = self.metrics(inputs, real)
        for name, value in (
            ("accuracy", (difference > 0).astype(jnp.float32)),
            ("margin", difference),
        ):
            in_order = (pairs * value).sum(axis=(1, 2))
            metrics[name] = (weight * in_order).sum(), (weight * count).sum()
        return losses, metrics
