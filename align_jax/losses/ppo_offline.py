# SPDX-License-Identifier: Apache-2.0
"""Offline PPO on unpaired feedback, as HALOs has it: one-step PPO whose behavior policy is the
reference.

Advantages come from the value head's own predictions at the start of the step; their whitening is
over the global batch, so it is a statistic of it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from align_jax.core.schema import Batch
from align_jax.losses.advantages import RATIO_MAX, discounted_sum, gae, token_rewards
from align_jax.losses.kto import log_ratios
from align_jax.losses.logprobs import spread_to_tokens, sum_by_slot
from align_jax.losses.objective import (
    Inputs,
    Metrics,
    Result,
    StatisticsLoss,
    Tree,
    group_weights,
    summed,
    token_counts,
    token_weights,
)
from align_jax.losses.options import Option


@dataclasses.dataclass(frozen=True, kw_only=True)
class PpoOffline(StatisticsLoss):
    """One-step PPO on fixed data; the behavior policy is the reference.

        w_t = exp(a_t - b_t)
        mean over tokens of max(-A w, -A clip(w)) + critic_coef · ½ (V - target)²
                            + kl_coef · kl_sign · (a - b)

    A is the generalized advantage of the reward (on the last token) and the value head's own
    predictions, whitened over the global batch's tokens.  The value head sees detached hidden
    states.

    References:
        Schulman et al. 2017, arXiv 1707.06347, equation 7; Ethayarajh et al. 2024, arXiv
        2402.01306, section 3; HALOs, commit 4831988, ``train/trainers.py``, ``PPOTrainer``.

    >>> from align_jax.losses import jitted
    >>> found = jitted("ppo_offline")([[-1.0, -2.0], [-2.0, -2.0]], [True, False],
    ...                               [[-1.5, -2.0], [-2.0, -2.0]], values=[[0.0, 0.0], [0.0, 0.0]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [-1.2118, 1.0045]
    """

    clip: Annotated[float, Option("c: the ratios' range, see clip_form", above=0)] = 0.5
    gamma: Annotated[float, Option("γ: discount per token", low=0, high=1)] = 0.99
    lam: Annotated[float, Option("λ of the advantages", low=0, high=1)] = 0.95
    critic_coef: Annotated[float, Option("weight of the value loss", low=0)] = 0.01
    kl_coef: Annotated[float, Option("weight of the log-ratio", low=0)] = 0.1
    clip_form: Annotated[
        Literal["symmetric", "reciprocal"],
        Option("ratios in [1-c, 1+c] (HALOs' code), or [c, 1/c] (its configuration's comment)"),
    ] = "symmetric"
    kl_sign: Annotated[
        Literal[1, -1],
        Option(
            "1: log π - log π_ref (HALOs now); -1: its older versions", unless={"kl_coef": (0,)}
        ),
    ] = 1
    critic_target: Annotated[
        Literal["discounted", "gae"],
        Option(
            "values are trained towards discounted rewards to go (HALOs), or the returns",
            unless={"critic_coef": (0,)},
        ),
    ] = "discounted"
    reward: Annotated[
        Literal["label", "score"], Option("±1 by the label, or the score that came with the data")
    ] = "label"
    whiten: Annotated[bool, Option("advantages to mean 0 and variance 1 over all tokens")] = True

    reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.clip_form == "reciprocal" and self.clip >= 1:
            raise ValueError(
                f"clip = {self.clip:g}: expected below 1 with clip_form = 'reciprocal': ratios are "
                "kept in [c, 1/c]"
            )

    @property
    def needs(self) -> tuple[str, ...]:
        return ("values",)

    def weights(self, batch: Batch) -> Float[Array, "B"]:
        return token_weights(batch)

    def _scores(self, inputs: Inputs) -> Float[Array, "B 1"]:
        if self.reward == "score":
            return inputs.of_batch("scores").astype(jnp.float32)
        return jnp.where(inputs.of_batch("label"), 1.0, -1.0)[:, None]

    def _estimates(self, inputs: Inputs) -> tuple[Float[Array, "N T"], Float[Array, "N T"]]:
        """Compute the (not yet whitened) advantages and what the values are trained towards."""
        mask, slot = jnp.asarray(inputs.batch.loss_mask), jnp.asarray(inputs.batch.slot)
        scores = self._scores(inputs).reshape(mask.shape[0], -1)  # [B, 1] -> [N, S]
        rewards = token_rewards(scores, jnp.zeros(mask.shape), mask, slot, kl_coef=0.0)
        values = inputs.of_policy("values")
        advantages, returns = gae(rewards, values, mask, slot, gamma=self.gamma, lam=self.lam)
        if self.critic_target == "discounted":
            returns = discounted_sum(rewards, mask, slot, self.gamma)
        return advantages, returns

    def batch_statistics(self, inputs: Inputs) -> dict[str, Float[Array, "b"]]:
        """Return each response's token count and the mean and spread of its advantages."""
        batch, (advantages, _) = inputs.batch, self._estimates(inputs)
        count = token_counts(batch)[:, 0]
        mean = sum_by_slot(advantages, batch)[:, 0] / jnp.maximum(count, 1.0)
        centered = advantages - spread_to_tokens(mean[:, None], batch)
        spread = sum_by_slot(jnp.square(centered), batch)[:, 0]
        return {"mean": mean, "spread": group_weights(batch) * spread}

    def reduce_statistics(
        self, found: Mapping[str, Float[Array, "M b"]], weights: Float[Array, "M b"], running: Tree
    ) -> tuple[Tree, Tree]:
        """Compute the mean and the scale of all tokens' advantages: 0 and 1 where they are not to
        be whitened."""
        microbatches = weights.shape[:1]
        if not self.whiten:
            return {"mean": jnp.zeros(microbatches), "scale": jnp.ones(microbatches)}, running
        total = jnp.maximum(weights.sum(), 1e-30)
        mean = (weights * found["mean"]).sum() / total
        # within the responses, and between them
        spread = (found["spread"] + weights * jnp.square(found["mean"] - mean)).sum() / total
        stats = {"mean": mean, "scale": jax.lax.rsqrt(spread + 1e-8)}
        return jax.tree.map(lambda x: jnp.broadcast_to(x, microbatches), stats), running

    def losses(self, inputs: Inputs) -> Result:
        policy, batch, clip = inputs.policy, inputs.batch, self.clip
        advantages, targets = self._estimates(inputs)
        advantages = (advantages - inputs.stats["mean"]) * inputs.stats["scale"]
        log_ratio = policy.token_logps - inputs.of_reference("token_logps")
        ratio = jnp.exp(jnp.clip(log_ratio, -RATIO_MAX, RATIO_MAX))
        low, high = (1.0 - clip, 1.0 + clip) if self.clip_form == "symmetric" else (clip, 1 / clip)
        plain, clipped = -advantages * ratio, -advantages * jnp.clip(ratio, low, high)
        parts = {
            "loss/policy_avg": jnp.maximum(plain, clipped),
            "loss/value_avg": 0.5 * jnp.square(inputs.of_policy("values") - targets),
            "policy/clipfrac_avg": (clipped > plain).astype(jnp.float32),
            "val/ratio": ratio,
            "policy/approxkl_avg": 0.5 * jnp.square(log_ratio),
        }
        loss = parts["loss/policy_avg"] + self.critic_coef * parts["loss/value_avg"]
        loss += self.kl_coef * self.kl_sign * log_ratio
        losses = sum_by_slot(loss, batch)[:, 0] / jnp.maximum(token_counts(batch)[:, 0], 1.0)
        return losses, self._metrics(inputs, parts)

    def _metrics(self, inputs: Inputs, parts: Mapping[str, Float[Array, "N T"]]) -> Metrics:
        """Report token means, and the rewards by whether a response was good."""
        batch, weight = inputs.batch, group_weights(inputs.batch)
        total = token_weights(batch).sum()
        metrics = {
            name: ((weight * sum_by_slot(part, batch)[:, 0]).sum(), total)
            for name, part in parts.items()
        }
        x = log_ratios(inputs.policy.logps, inputs.of_reference("logps"))
        good = self._scores(inputs)[:, 0] > 0
        right = ((x > 0) == good).astype(jnp.float32)
        return metrics | {
            "rewards/chosen": summed(x, jnp.where(good, weight, 0.0)),
            "rewards/rejected": summed(x, jnp.where(good, 0.0, weight)),
            "rewards/accuracies": summed(right, weight),
        }
