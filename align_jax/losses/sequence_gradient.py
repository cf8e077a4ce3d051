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
    KlLoss,
    TokenKlLoss,
    TokenMeanLoss,
    response_advantages,
    response_mean,
    rollout_log_ratio,
    rollout_metrics,
    token_mean,
)
from align_jax.losses.sampler import response_weights, sampler_weights

LEAST_RATIO = 1e-8  # a sequence's ratio is cut here, as the paper's code does


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vespo(TokenMeanLoss, TokenKlLoss):
    """VESPO: the ratio W of the whole sequence, reshaped by a gamma density, weighs its gradient.

        -sg(φ(W)) A a_t + β k3,    φ(W) = W^k e^(λ (1 - W)),    W = Π_t w_t

    φ(1) = 1; k and λ are those of the advantage's sign.  Mean over the global batch's tokens.

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
        batch, advantages = inputs.batch, response_advantages(inputs)
        token_log_ratio = rollout_log_ratio(inputs)
        to_sampler = jnp.log(jnp.maximum(sampler_weights(inputs), LEAST_RATIO))  # W is π / μ
        log_ratio = sum_by_slot(token_log_ratio + to_sampler, batch)
        log_ratio = jax.lax.stop_gradient(jnp.clip(log_ratio, math.log(LEAST_RATIO), RATIO_MAX))
        k = jnp.where(advantages >= 0, self.k_positive, self.k_negative)
        lam = jnp.where(advantages >= 0, self.lambda_positive, self.lambda_negative)
        weight = jnp.exp(k * log_ratio + lam * (1.0 - jnp.exp(log_ratio)))  # [B, R]
        scale = self.kept(inputs) * weight * advantages
        scale = self.chosen(inputs) * spread_to_tokens(scale, batch)
        losses = -scale * inputs.policy.token_logps
        penalty, kl = self.penalty(inputs, jnp.exp(token_log_ratio))
        parts = {"vespo/phi_seq_mean": spread_to_tokens(weight, batch)} | kl
        metrics = rollout_metrics(inputs, parts, ("vespo/phi_seq_mean",))
        return token_mean(losses + penalty, batch), metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gmpo(KlLoss):
    """GMPO: the geometric mean of a response's ratios, each token's clipped in the logarithm.

        -A exp(mean_t l_t) + β k3,    l_t = min(log w_t, clip(log w_t, ±ε)) where A > 0, else max

    Averaged as in GRPO.

    References:
        Zhao et al. 2025, arXiv 2507.20673, the GMPO objective with its wide clip range.

    >>> from align_jax.losses import jitted
    >>> found = jitted("gmpo")(policy=[[[-1.0, -2.0]]], old_token_logps=[[[-1.5, -2.0]]],
    ...                        advantages=[[[1.0, 1.0]]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [-1.2214]
    """

    own = ("epsilon",)
    epsilon: Annotated[
        float, Option("log-ratios of tokens are clipped to ± this", unit="nats", above=0)
    ] = 0.4

    def losses(self, inputs: Inputs) -> Result:
        batch, advantages = inputs.batch, response_advantages(inputs)
        sign = spread_to_tokens(jnp.where(advantages > 0, 1.0, -1.0), batch)
        token_log_ratio = rollout_log_ratio(inputs)
        log_ratio = sign * token_log_ratio
        clipped = sign * jnp.minimum(log_ratio, self.epsilon)
        mean = sum_by_slot(clipped, batch) / jnp.maximum(token_counts(batch), 1.0)
        penalty, kl = self.penalty(inputs, jnp.exp(token_log_ratio))
        kept = self.kept(inputs) * response_weights(inputs)
        losses = -(kept * advantages * jnp.exp(mean)).mean(axis=1)
        parts = {"clip_ratio/region_mean": (log_ratio > self.epsilon).astype(jnp.float32)} | kl
        if kl:
            losses += response_mean(penalty, batch)
        return losses, rollout_metrics(inputs, parts)
