# SPDX-License-Identifier: Apache-2.0
"""Policy-gradient objectives on rollouts.

The rollout source fills ``old_token_logps`` and ``advantages`` [N, T] (and for PPO ``returns`` and
``old_values``); see ``targets``.  w_t = exp(a_t - old_t) is a token's importance ratio, its
logarithm cut at ±20; A its advantage.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from align_jax.core.schema import Batch
from align_jax.losses.advantages import RATIO_MAX, kl_estimate
from align_jax.losses.logprobs import spread_to_tokens, sum_by_slot
from align_jax.losses.objective import (
    Inputs,
    Loss,
    Metrics,
    Result,
    group_weights,
    summed,
    token_counts,
    token_weights,
)
from align_jax.losses.options import Option
from align_jax.losses.sampler import response_weights, sampler_weights
from align_jax.losses.token_choice import TopEntropy

Parts = dict[str, Array]  # reported quantities of tokens [N, T], or of responses [B, R]

EpsilonLow = Annotated[float, Option("ratios are clipped below 1 by this", low=0)]
EpsilonHigh = Annotated[
    float | None, Option("ratios are clipped above 1 by this; None = epsilon_low", low=0)
]


def token_mean(x: Float[Array, "N T"], batch: Batch) -> Float[Array, "B"]:
    """Average over all of a group's tokens; ``token_weights`` make it the global batch's mean."""
    tokens = token_counts(batch).sum(axis=1)
    return sum_by_slot(x, batch).sum(axis=1) / jnp.maximum(tokens, 1.0)


def response_mean(x: Float[Array, "N T"], batch: Batch) -> Float[Array, "B"]:
    """Average over each response's tokens, then over the group's responses."""
    means = sum_by_slot(x, batch) / jnp.maximum(token_counts(batch), 1.0)
    return means.mean(axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenMeanLoss(Loss):
    """A loss averaged over the global batch's tokens."""

    def weights(self, batch: Batch) -> Float[Array, "B"]:
        return token_weights(batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KlLoss(Loss):
    """A loss with the KL to the reference beside it, which may leave sequences out that have become
    off-policy.

    References:
        unbiased_kl, and equation 9, the mask: DeepSeek-AI 2025, arXiv 2512.02556.
    """

    beta: Annotated[
        float, Option("β: weight of the KL to the reference; 0 = no reference is run", low=0)
    ] = 0.0
    unbiased_kl: Annotated[
        bool,
        Option("the KL of a token is multiplied by its importance ratio", unless={"beta": (0,)}),
    ] = False
    off_policy_threshold: Annotated[
        float | None,
        Option(
            "sequences with A < 0 whose mean log(old / new) exceeds it are left out; None = none",
            unit="nats a token",
            above=0,
        ),
    ] = None

    reference: ClassVar[bool] = True

    @property
    def uses_reference(self) -> bool:
        return self.beta != 0

    @property
    def decides(self) -> dict[str, str]:
        return {"scale": "group"}

    def penalty(self, inputs: Inputs, ratio: Float[Array, "N T"]) -> tuple[Array, Parts]:
        """Compute β k3 for each token, times its ratio where ``unbiased_kl``; nothing where β is
        0."""
        if self.beta == 0:
            return jnp.zeros(()), {}
        log_ratio = inputs.policy.token_logps - inputs.of_reference("token_logps")
        kl = jnp.where(inputs.batch.loss_mask, kl_estimate(log_ratio, "k3"), 0.0)
        if self.unbiased_kl:
            kl = kl * ratio
        return self.beta * kl, {"kl": kl}

    def kept(self, inputs: Inputs) -> Array:
        """Return 1.0 for the responses that count, else 0.0, [B, R]; 1 where there is no
        threshold.

        Where the sampler's own log-probabilities are known, they are the old ones here.
        """
        if self.off_policy_threshold is None:
            return jnp.ones(())
        sampler = inputs.batch.sampler_token_logps
        old = inputs.of_batch("old_token_logps") if sampler is None else jnp.asarray(sampler)
        drift = old - inputs.policy.token_logps
        tokens = jnp.maximum(token_counts(inputs.batch), 1.0)
        drift = jax.lax.stop_gradient(sum_by_slot(drift, inputs.batch) / tokens)
        near = drift <= self.off_policy_threshold
        return ((response_advantages(inputs) >= 0) | near).astype(jnp.float32)

    def token_factors(self, inputs: Inputs) -> Array:
        """Return what weighs each token's policy loss: ``kept`` of its response, times what
        corrects for the sampler."""
        kept = self.kept(inputs)
        kept = spread_to_tokens(kept, inputs.batch) if kept.ndim else kept
        return kept * sampler_weights(inputs)


Importance = Annotated[
    Literal["token", "sequence"],
    Option("ratios of tokens, or exp of their logarithms' mean over the sequence (gspo)"),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenKlLoss(TopEntropy, KlLoss):
    """One of which some tokens may be left out."""

    def token_factors(self, inputs: Inputs) -> Array:
        return super().token_factors(inputs) * self.chosen(inputs)


def response_advantages(inputs: Inputs) -> Float[Array, "B R"]:
    """Return each response's advantage: the mean of its tokens'."""
    sums = sum_by_slot(inputs.of_batch("advantages"), inputs.batch)
    return sums / jnp.maximum(token_counts(inputs.batch), 1.0)


def rollout_log_ratio(inputs: Inputs, old: str = "old_token_logps") -> Float[Array, "N T"]:
    """Compute log w of each token, to the batch's field ``old``."""
    difference = inputs.policy.token_logps - inputs.of_batch(old)
    return jnp.where(inputs.batch.loss_mask, jnp.clip(difference, -RATIO_MAX, RATIO_MAX), 0.0)


def sequence_log_ratio(log_ratio: Float[Array, "N T"], batch: Batch) -> Float[Array, "N T"]:
    """Give each token the mean log w of its response: GSPO's ratio of sequences."""
    mean = sum_by_slot(log_ratio, batch) / jnp.maximum(token_counts(batch), 1.0)
    return spread_to_tokens(mean, batch)


def importance_ratio(inputs: Inputs, importance: str) -> Float[Array, "N T"]:
    """Compute w of each token, or of its response where ``importance`` is "sequence"."""
    log_ratio = rollout_log_ratio(inputs)
    if importance == "sequence":
        log_ratio = sequence_log_ratio(log_ratio, inputs.batch)
    return jnp.exp(log_ratio)


def clipped(
    ratio: Array, advantages: Array, low: float, high: float, delta: float | None = None
) -> tuple[Array, dict[str, Array]]:
    """Compute -min(min(w, δ) A, clip(w, 1 - low, 1 + high) A), and which tokens were clipped."""
    capped = ratio if delta is None else jnp.minimum(ratio, delta)
    losses = -jnp.minimum(capped * advantages, jnp.clip(ratio, 1.0 - low, 1.0 + high) * advantages)
    below = ((capped < 1.0 - low) & (advantages < 0)).astype(jnp.float32)
    above = ((capped > 1.0 + high) & (advantages > 0)).astype(jnp.float32)
    clips = {
        "clip_ratio/low_mean": below,
        "clip_ratio/high_mean": above,
        "clip_ratio/region_mean": below + above,
    }
    return losses, clips


def rollout_metrics(inputs: Inputs, parts: Parts, by_response: Sequence[str] = ()) -> Metrics:
    """Report token means of [N, T] quantities (response means of those in ``by_response``), means
    of [B, R] ones, lengths and rewards."""
    batch, weight = inputs.batch, group_weights(inputs.batch)
    if inputs.policy.entropy is not None:
        parts = {"entropy": inputs.policy.entropy} | parts

    def of_responses(x: Array) -> bool:
        return x.shape == batch.lengths.shape

    values = {
        name: summed(x.mean(axis=1) if of_responses(x) else response_mean(x, batch), weight)
        if name in by_response or of_responses(x)
        else summed(token_mean(x, batch), token_weights(batch))
        for name, x in parts.items()
    }
    values["completions/mean_length"] = summed(token_counts(batch).mean(axis=1), weight)
    if batch.scores is not None:
        scores = jnp.asarray(batch.scores, jnp.float32)
        values["reward"] = summed(scores.mean(axis=1), weight)
        if scores.shape[1] > 1:
            std = scores.std(axis=1, ddof=1)
            values["reward_std"] = summed(std, weight)
            values["frac_reward_zero_std"] = summed((std == 0).astype(jnp.float32), weight)
    return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grpo(TokenKlLoss):
    """The GRPO loss, in one of its aggregations.

        -min(min(w, δ) A, clip(w, 1 - ε_low, 1 + ε_high) A) + β k3

        grpo:        mean over a response's tokens, then over responses
        bnpo, dapo:  mean over the global batch's tokens
        luspo:       sum over tokens, mean over responses
        dr_grpo:     sum over tokens / (responses · max_length), A not divided by std

    References:
        Shao et al. 2024, arXiv 2402.03300, equation 3; dr_grpo: Liu et al. 2025, arXiv 2503.20783;
        dapo: Yu et al. 2025, arXiv 2503.14476, equation 8; the names: TRL 1.16.0,
        ``grpo_trainer.py``.

    >>> from align_jax.losses import jitted
    >>> found = jitted("grpo")(policy=[[[-1.0, -2.0], [-1.0, -3.0]]],
    ...                        old_token_logps=[[[-1.5, -2.0], [-1.0, -3.0]]],
    ...                        advantages=[[[1.0, 1.0], [-1.0, -1.0]]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [-0.05]
    """

    own = ("loss_type", "importance", "epsilon_low", "epsilon_high", "delta")
    loss_type: Annotated[
        Literal["grpo", "bnpo", "dr_grpo", "dapo", "luspo"],
        Option(
            "token losses are averaged by response (grpo), over all tokens (bnpo, dapo), summed "
            "over max_length (dr_grpo), or summed (luspo, with importance 'sequence')"
        ),
    ] = "grpo"
    importance: Annotated[
        Literal["token", "sequence", "sequence_token"],
        Option(
            "ratios of tokens, or exp of their logarithms' mean over the sequence (gspo); "
            "sequence_token: that, but each token's gradient goes by its own advantage"
        ),
    ] = "token"
    epsilon_low: EpsilonLow = 0.2
    epsilon_high: Annotated[
        float | None,
        Option(
            "ratios are clipped above 1 by this; None = epsilon_low, but 0.28 for loss_type dapo",
            low=0,
        ),
    ] = None
    delta: Annotated[
        float | None,
        Option(
            "δ: most that a ratio is on the unclipped side (two-sided clipping); None = off",
            above=0,
        ),
    ] = None
    max_length: Annotated[
        int | None,
        Option(
            "what dr_grpo divides by; None = the most that a completion may have",
            unit="tokens",
            low=1,
            only={"loss_type": ("dr_grpo",)},
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.loss_type == "luspo" and self.importance == "token":
            raise ValueError(
                "loss_type = 'luspo' scales sequences by their length, which needs ratios of "
                "sequences: set importance = 'sequence', got 'token'"
            )

    @property
    def decides(self) -> dict[str, str]:
        return {"scale": "none" if self.loss_type == "dr_grpo" else "group"}

    def weights(self, batch: Batch) -> Float[Array, "B"]:
        by_token = self.loss_type in ("bnpo", "dapo")
        return token_weights(batch) if by_token else group_weights(batch)

    def losses(self, inputs: Inputs) -> Result:
        batch, log_ratio, high = inputs.batch, rollout_log_ratio(inputs), self.epsilon_high
        if high is None:
            high = 0.28 if self.loss_type == "dapo" else self.epsilon_low
        if self.importance != "token":
            own = log_ratio - jax.lax.stop_gradient(log_ratio)  # 0, with the token's gradient
            log_ratio = sequence_log_ratio(log_ratio, batch)
            if self.importance == "sequence_token":
                log_ratio = jax.lax.stop_gradient(log_ratio) + own
        ratio = jnp.exp(log_ratio)
        losses, clips = clipped(
            ratio, inputs.of_batch("advantages"), self.epsilon_low, high, self.delta
        )
        losses = self.token_factors(inputs) * losses
        by_response = tuple(clips) if self.importance != "token" else ()
        penalty, kl = self.penalty(inputs, ratio)
        return self._aggregate(losses + penalty, batch), rollout_metrics(
            inputs, clips | kl, by_response
        )

    def _aggregate(self, x: Float[Array, "N T"], batch: Batch) -> Float[Array, "B"]:
        """Turn token losses into losses of groups."""
        if self.loss_type == "grpo":
            return response_mean(x, batch)
        if self.loss_type in ("bnpo", "dapo"):
            return token_mean(x, batch)
        sums = sum_by_slot(x, batch).mean(axis=1)
        if self.loss_type == "luspo":
            return sums
        slots = batch.lengths.size // batch.tokens.shape[0]
        return sums / (self.max_length or batch.loss_index.shape[1] // slots)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gspo(TokenKlLoss):
    """GSPO: GRPO with one ratio for the whole sequence, w = exp(mean_t (a_t - old_t)).

        GSPO-token (``importance`` "sequence_token"):  w_t = sg(w) π(t) / sg(π(t))

    The two are the same where a response's advantages are.

    References:
        Zheng et al. 2025, arXiv 2507.18071, the GSPO objective and its clip range; section 4.3,
        GSPO-token.

    >>> from align_jax.losses import jitted
    >>> found = jitted("gspo", epsilon_high=0.5)(
    ...     policy=[[[-1.0, -2.0]]], old_token_logps=[[[-1.5, -2.0]]], advantages=[[[1.0, 1.0]]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [-1.284]
    """

    own = ("importance", "epsilon_low", "epsilon_high")
    importance: Annotated[
        Literal["sequence", "sequence_token"],
        Option("the sequence's ratio; or each token's gradient goes by its own advantage"),
    ] = "sequence"
    epsilon_low: EpsilonLow = 3e-4
    epsilon_high: EpsilonHigh = 4e-4

    def losses(self, inputs: Inputs) -> Result:
        return Grpo(**self.values()).losses(inputs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cispo(TokenMeanLoss, TokenKlLoss):
    """CISPO: -sg(min(w, ε_high)) A a_t + β k3, mean over the global batch's tokens.

    References:
        MiniMax 2025, arXiv 2506.13585, the CISPO objective.

    >>> from align_jax.losses import jitted
    >>> found = jitted("cispo")(policy=[[[-1.0, -2.0]]], old_token_logps=[[[-1.5, -2.0]]],
    ...                         advantages=[[[1.0, 1.0]]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [1.8244]
    """

    own = ("importance", "epsilon_high")
    importance: Importance = "token"
    epsilon_high: Annotated[float, Option("ratios are cut at this", above=0)] = 5.0

    def losses(self, inputs: Inputs) -> Result:
        advantages, ratio = inputs.of_batch("advantages"), importance_ratio(inputs, self.importance)
        capped = jax.lax.stop_gradient(jnp.minimum(ratio, self.epsilon_high))
        losses = -self.token_factors(inputs) * capped * advantages * inputs.policy.token_logps
        penalty, kl = self.penalty(inputs, ratio)
        clipped = ((ratio > self.epsilon_high) & (advantages > 0)).astype(jnp.float32)
        by_response = ("cispo_clip_ratio",) if self.importance == "sequence" else ()
        metrics = rollout_metrics(inputs, {"cispo_clip_ratio": clipped} | kl, by_response)
        return token_mean(losses + penalty, inputs.batch), metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sapo(TokenKlLoss):
    """SAPO, a soft gate in place of the clip: -(4/τ) σ(τ (w - 1)) A + β k3, averaged as in GRPO.

    τ is ``tau_positive`` where A > 0, else ``tau_negative``.

    References:
        Gao et al. 2025, arXiv 2511.20347, the soft gate.

    >>> from align_jax.losses import jitted
    >>> found = jitted("sapo")(policy=[[[-1.0, -2.0]]], old_token_logps=[[[-1.5, -2.0]]],
    ...                        advantages=[[[1.0, 1.0]]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [-2.3134]
    """

    own = ("importance", "tau_positive", "tau_negative")
    importance: Importance = "token"
    tau_positive: Annotated[float, Option("τ: sharpness of the gate where A > 0", above=0)] = 1.0
    tau_negative: Annotated[float, Option("τ: sharpness of the gate elsewhere", above=0)] = 1.05

    def losses(self, inputs: Inputs) -> Result:
        advantages, ratio = inputs.of_batch("advantages"), importance_ratio(inputs, self.importance)
        tau = jnp.where(advantages > 0, self.tau_positive, self.tau_negative)
        losses = -jax.nn.sigmoid(tau * (ratio - 1.0)) * 4.0 / tau * advantages
        losses = self.token_factors(inputs) * losses
        penalty, kl = self.penalty(inputs, ratio)
        return response_mean(losses + penalty, inputs.batch), rollout_metrics(inputs, kl)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rloo(Loss):
    """RLOO: -min(w A, clip(w, 1 - ε_low, 1 + ε_high) A) with w the ratio of whole sequences.

    A is the reward (less the KL) minus the mean of the group's others: ``targets`` makes it.

    References:
        Ahmadian et al. 2024, arXiv 2402.14740, section 3; the clip: TRL 1.16.0,
        ``rloo_trainer.py``.

    >>> from align_jax.losses import jitted
    >>> found = jitted("rloo")(policy=[[[-1.0, -2.0]]], old_token_logps=[[[-1.1, -2.0]]],
    ...                        advantages=[[[1.0, 1.0]]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [-1.1052]
    """

    epsilon_low: EpsilonLow = 0.2
    epsilon_high: EpsilonHigh = None

    def losses(self, inputs: Inputs) -> Result:
        batch, high = inputs.batch, self.epsilon_high
        difference = inputs.policy.token_logps - inputs.of_batch("old_token_logps")
        log_ratio = sum_by_slot(difference, batch)
        ratio = jnp.exp(jnp.clip(log_ratio, -RATIO_MAX, RATIO_MAX))  # [B, R]
        high = self.epsilon_low if high is None else high
        losses, clips = clipped(ratio, response_advantages(inputs), self.epsilon_low, high)
        parts = {name: spread_to_tokens(x, batch) for name, x in clips.items()}
        losses = (response_weights(inputs) * losses).mean(axis=1)
        return losses, rollout_metrics(inputs, parts, tuple(parts))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reinforce(TopEntropy, TokenMeanLoss):
    """REINFORCE: -A a_t, mean over the global batch's tokens.

    References:
        Williams 1992, "Simple statistical gradient-following algorithms".

    >>> from align_jax.losses import jitted
    >>> jitted("reinforce")(policy=[[[-1.0, -2.0]]], advantages=[[[1.0, 1.0]]]).losses.tolist()
    [1.5]
    """

    def losses(self, inputs: Inputs) -> Result:
        advantages = self.chosen(inputs) * sampler_weights(inputs) * inputs.of_batch("advantages")
        losses = -advantages * inputs.policy.token_logps
        return token_mean(losses, inputs.batch), rollout_metrics(inputs, {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReinforcePp(TopEntropy, TokenMeanLoss):
    """REINFORCE++: PPO's clipped loss without a critic, on globally normalized advantages.

    References:
        Hu 2025, arXiv 2501.03262, section 3.

    >>> from align_jax.losses import jitted
    >>> found = jitted("reinforce_pp")(
    ...     policy=[[[-1.0, -2.0]]], old_token_logps=[[[-1.5, -2.0]]], advantages=[[[1.0, 1.0]]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [-1.1]
    """

    epsilon_low: EpsilonLow = 0.2
    epsilon_high: EpsilonHigh = None

    def losses(self, inputs: Inputs) -> Result:
        return Grpo(loss_type="bnpo", **self.values()).losses(inputs)
