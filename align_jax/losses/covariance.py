# SPDX-License-Identifier: Apache-2.0
"""Policy gradients that keep the entropy up: they treat otherwise the few tokens whose
log-probability and advantage vary together, which is what brings the entropy down.

    Cov_t = (a_t - mean a) (A_t - mean A)          means over the tokens of the global batch

As in ``policy_gradient``, w_t = exp(a_t - old_t) is a token's ratio and A its advantage.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from align_jax.core.schema import Batch
from align_jax.losses.objective import Inputs, Result, StatisticsLoss, Tree
from align_jax.losses.options import Option
from align_jax.losses.policy_gradient import (
    EpsilonHigh,
    EpsilonLow,
    KlLoss,
    TokenMeanLoss,
    clipped,
    rollout_log_ratio,
    rollout_metrics,
    token_mean,
)
from align_jax.losses.token_choice import counted_tokens

Share = Annotated[
    float, Option("of the batch's tokens that are treated otherwise, at least one", above=0, high=1)
]


def _draws(batch: Batch) -> Float[Array, "N T"]:
    """Give each token a number in [0, 2^24) that looks random: a hash of what is known of it, the
    same however the batch is split."""
    found = jnp.zeros(batch.tokens.shape, jnp.uint32)
    for x in (batch.tokens, batch.positions, batch.old_token_logps, batch.advantages):
        bits = jax.lax.bitcast_convert_type(jnp.asarray(x), jnp.uint32)
        found = (found ^ bits) * jnp.uint32(0x85EBCA6B)  # the constants are MurmurHash3's
        found = (found ^ (found >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
        found = found ^ (found >> jnp.uint32(16))
    return (found >> jnp.uint32(8)).astype(jnp.float32)


def _least(
    key: Float[Array, "M N T"], able: Bool[Array, "M N T"], count: Float[Array, ""]
) -> Float[Array, "M N T"]:
    """Mark with 1.0 the so many that have the least key among those that are able."""
    order = jnp.argsort(jnp.where(able, key, jnp.inf).reshape(-1))
    places = jnp.arange(key.size, dtype=jnp.int32)
    ranks = jnp.zeros_like(places).at[order].set(places).reshape(key.shape)
    return ((ranks < count.astype(jnp.int32)) & able).astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CovarianceLoss(TokenMeanLoss, KlLoss, StatisticsLoss):
    """A loss of which some tokens are treated otherwise, chosen by their covariances."""

    cov_share: Share = 2e-4

    def able(self, inputs: Inputs) -> Bool[Array, "N T"]:
        """Tell which tokens can be chosen."""
        return counted_tokens(inputs.batch)

    def choose(
        self, covariance: Array, draws: Array, able: Array, count: Float[Array, ""]
    ) -> Array:
        """Mark the tokens that are chosen with 1.0, [M, N, T]."""
        raise NotImplementedError

    def batch_statistics(self, inputs: Inputs) -> dict[str, Array]:
        return {
            "logps": inputs.policy.token_logps,
            "advantages": inputs.of_batch("advantages"),
            "counted": counted_tokens(inputs.batch),
            "able": self.able(inputs),
            "draws": _draws(inputs.batch),
        }

    def reduce_statistics(
        self, found: Mapping[str, Array], weights: Float[Array, "M b"], running: Tree
    ) -> tuple[Tree, Tree]:
        """Choose the tokens of all microbatches together."""
        counted = found["counted"]
        size = jnp.maximum(counted.sum(dtype=jnp.float32), 1.0)

        def centered(x: Array) -> Array:
            return x - jnp.where(counted, x, 0.0).sum() / size

        covariance = centered(found["logps"]) * centered(found["advantages"])
        count = jnp.maximum(jnp.floor(self.cov_share * size), 1.0)
        return self.choose(covariance, found["draws"], found["able"], count), running


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipCov(CovarianceLoss):
    """Clip-Cov: the clipped loss, without the gradient of a few tokens of large covariance.

        -min(w A, clip(w, 1 - ε_low, 1 + ε_high) A), and 0 for r N tokens drawn at random among
        those of cov_low ≤ Cov ≤ cov_high that are not clipped anyway;  mean over the N tokens

    The draw is a hash of the token, so that a step can be repeated.

    References:
        Cui et al. 2025, arXiv 2505.22617, section 4.2, Clip-Cov, and the authors' code.

    >>> from align_jax.losses import jitted
    >>> found = jitted("clip_cov", cov_low=0.1)(
    ...     policy=[[[-1.0, -2.0, -3.0]]], old_token_logps=[[[-1.0, -2.0, -3.0]]],
    ...     advantages=[[[1.0, 0.0, 0.5]]])
    >>> [round(x, 4) for x in found.losses.tolist()]  # the first token is left out
    [-0.1667]
    """

    own = ("epsilon_low", "epsilon_high", "cov_share", "cov_low", "cov_high")
    epsilon_low: EpsilonLow = 0.2
    epsilon_high: EpsilonHigh = None
    cov_low: Annotated[float, Option("least covariance of a token that is left out")] = 1.0
    cov_high: Annotated[float, Option("greatest covariance of a token that is left out")] = 5.0

    def __post_init__(self) -> None:
        if self.cov_low >= self.cov_high:
            raise ValueError(
                f"cov_low = {self.cov_low:g}: expected less than cov_high = {self.cov_high:g}"
            )

    def _clipped(self, inputs: Inputs) -> tuple[Array, dict[str, Array]]:
        high = self.epsilon_low if self.epsilon_high is None else self.epsilon_high
        ratio = jnp.exp(rollout_log_ratio(inputs))
        return clipped(ratio, inputs.of_batch("advantages"), self.epsilon_low, high)

    def able(self, inputs: Inputs) -> Bool[Array, "N T"]:
        """Leave out those that are clipped, which have no gradient anyway."""
        _, clips = self._clipped(inputs)
        return super().able(inputs) & (clips["clip_ratio/region_mean"] == 0)

    def choose(
        self, covariance: Array, draws: Array, able: Array, count: Float[Array, ""]
    ) -> Array:
        """Draw among those whose covariance lies within the bounds."""
        within = (covariance >= self.cov_low) & (covariance <= self.cov_high)
        return _least(draws, able & within, count)

    def losses(self, inputs: Inputs) -> Result:
        losses, clips = self._clipped(inputs)
        penalty, kl = self.penalty(inputs, jnp.exp(rollout_log_ratio(inputs)))
        losses = (1.0 - inputs.stats) * self.token_factors(inputs) * losses
        metrics = rollout_metrics(inputs, {"clip_ratio/cov_mean": inputs.stats} | clips | kl)
        return token_mean(losses + penalty, inputs.batch), metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class KlCov(CovarianceLoss):
    """KL-Cov: the loss without a clip, and a penalty on the tokens of the greatest covariance.

        -w A + cov_coef |log w| for the k N tokens of the greatest Cov;  -w A for the others

    Mean over the N tokens.

    References:
        Cui et al. 2025, arXiv 2505.22617, section 4.2, KL-Cov; |log w| for the KL: the authors'
        code.

    >>> from align_jax.losses import jitted
    >>> found = jitted("kl_cov")(policy=[[[-1.0, -2.0]]], old_token_logps=[[[-1.5, -2.0]]],
    ...                          advantages=[[[1.0, 0.0]]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [-0.5744]
    """

    own = ("cov_share", "cov_coef")
    cov_coef: Annotated[float, Option("β of the penalty", unit="per nat", above=0)] = 1.0

    def choose(
        self, covariance: Array, draws: Array, able: Array, count: Float[Array, ""]
    ) -> Array:
        """Take those of the greatest covariance."""
        return _least(-covariance, able, count)

    def losses(self, inputs: Inputs) -> Result:
        log_ratio, chosen = rollout_log_ratio(inputs), inputs.stats
        ratio = jnp.exp(log_ratio)
        penalty, kl = self.penalty(inputs, ratio)
        losses = -self.token_factors(inputs) * ratio * inputs.of_batch("advantages")
        losses = losses + self.cov_coef * chosen * jnp.abs(log_ratio)
        metrics = rollout_metrics(inputs, {"kl_cov/share": chosen} | kl)
        return token_mean(losses + penalty, inputs.batch), metrics
