# SPDX-License-Identifier: Apache-2.0
"""Policy gradients that weigh whole sequences smoothly: VESPO's reshaped ratio, GMPO's geometric
mean.

As in ``policy_gradient``, w_t = exp(a_t - old_t) is a token's ratio and A its advantage.
"""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp

from align_jax.losses.advantages import RATIO_MAX
from align_jax.losses.logprobs import spread_to_tokens, sum_by_slot
from align_jax.losses.objective import Inputs, Result, token_counts
from align_jax.losses.options import Option
from align_jax.losses.policy_gradient import (
    TokenKlLoss,
    TokenMeanLoss,
    response_advantages,
    response_mean,
    rollout_log_ratio,
    rollout_metrics,
    token_mean,
)
from align_jax.losses.sampler import LEAST_RATIO, log_correction, response_weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vespo(TokenMeanLoss, TokenKlLoss):
    """VESPO: the ratio W of the whole sequence, reshaped by a gamma density, weighs its gradient.

        -sg(φ(W)) A_t a_t + β k3,    φ(W) = W^k e^(λ (1 - W)),    W = Π_t w_t

    φ(1) = 1; k and λ are those of the sign of A_t, W is cut to [1e-8, e^20].  Where the sampler is
    corrected for, W is to it: times the sequence's ratio, or its tokens'.  Mean over the global
    batch's tokens.

    References:
        Arxiv 2602.10693, the VESPO objective; the cuts: TRL 1.16.0, ``grpo_trainer.py``.

    >>> from align_jax.losses import jitted
    >>> found = jitted("vespo")(policy=[[[-1.0, -2.0]]], old_token_logps=[[[-1.5, -2.0]]],
    ...                         advantages=[[[1.0, 1.0]]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [0.5823]
    """

    own = ("k_positive", "lambda_positive", "k_negative", "lambda_negative")
    k_positive: Annotated[float, Option("k where A >= 0: how small ratios count", low=0)] = 2.0
    lambda_positive: Annotated[float, Option("λ where A >= 0: how large ratios do", above=0)] = 3.0
    k_negative: Annotated[float, Option("k elsewhere", low=0)] = 3.0
    lambda_negative: Annotated[float, Option("λ elsewhere", above=0)] = 2.0

    def losses(self, inputs: Inputs) -> Result:
        batch, advantages = inputs.batch, inputs.of_batch("advantages")
        token_log_ratio = rollout_log_ratio(inputs)
        log_ratio = sum_by_slot(token_log_ratio, batch) + log_correction(inputs)  # [B, R]
        log_ratio = jax.lax.stop_gradient(jnp.clip(log_ratio, math.log(LEAST_RATIO), RATIO_MAX))
        log_ratio = spread_to_tokens(log_ratio, batch)
        k = jnp.where(advantages >= 0, self.k_positive, self.k_negative)
        lam = jnp.where(advantages >= 0, self.lambda_positive, self.lambda_negative)
        weight = jnp.exp(k * log_ratio + lam * (1.0 - jnp.exp(log_ratio)))  # [N, T]
        kept = self.kept(inputs)
        scale = self.chosen(inputs) * (spread_to_tokens(kept, batch) if kept.ndim else kept)
        losses = -scale * weight * advantages * inputs.policy.token_logps
        penalty, kl = self.penalty(inputs, jnp.exp(token_log_ratio))
        tokens = token_counts(batch)
        means = sum_by_slot(weight, batch) / jnp.maximum(tokens, 1.0)
        parts = {"vespo/phi_seq_mean": jnp.where(tokens > 0, means, 1.0)} | kl  # φ(1) of no tokens
        return token_mean(losses + penalty, batch), rollout_metrics(inputs, parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gmpo(TokenKlLoss):
    """GMPO: the geometric mean of a response's ratios, each token's clipped in the logarithm.

        -A exp(mean_t l_t) + β k3,    l_t = min(log w_t, ε_high) where A > 0, else max(log w_t, -ε)

    The mean is over the tokens that count (``top_entropy_quantile``).  Averaged as in GRPO.

    References:
        Zhao et al. 2025, arXiv 2507.20673, the GMPO objective with its wide clip range; the
        options: TRL 1.16.0, ``gmpo_trainer.py``.

    >>> from align_jax.losses import jitted
    >>> found = jitted("gmpo")(policy=[[[-1.0, -2.0]]], old_token_logps=[[[-1.5, -2.0]]],
    ...                        advantages=[[[1.0, 1.0]]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [-1.2214]
    """

    own = ("epsilon", "epsilon_high")
    epsilon: Annotated[
        float, Option("log-ratios of tokens are clipped to ± this", unit="nats", above=0)
    ] = 0.4
    epsilon_high: Annotated[
        float | None,
        Option("log-ratios are clipped above at this; None = epsilon", unit="nats", above=0),
    ] = None

    def losses(self, inputs: Inputs) -> Result:
        batch, advantages = inputs.batch, response_advantages(inputs)
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        log_ratio, sign = rollout_log_ratio(inputs), spread_to_tokens(jnp.sign(advantages), batch)
        above, below = (sign > 0) & (log_ratio > high), (sign < 0) & (log_ratio < -self.epsilon)
        cut = jnp.where(above, high, jnp.where(below, -self.epsilon, log_ratio))
        counted = jnp.broadcast_to(self.chosen(inputs), cut.shape)
        tokens = sum_by_slot(jnp.where(batch.loss_mask, counted, 0.0), batch)
        mean = sum_by_slot(counted * cut, batch) / jnp.maximum(tokens, 1.0)
        penalty, kl = self.penalty(inputs, jnp.exp(log_ratio))
        kept = self.kept(inputs) * response_weights(inputs)
        losses = -(kept * advantages * jnp.exp(mean)).mean(axis=1)
        clips = {"low_mean": below, "high_mean": above, "region_mean": above | below}
        parts = {f"clip_ratio/{name}": x.astype(jnp.float32) for name, x in clips.items()} | kl
        if kl:
            losses += response_mean(penalty, batch)
        return losses, rollout_metrics(inputs, parts)
