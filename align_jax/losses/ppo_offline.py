# SPDX-License-Identifier: Apache-2.0
"""Offline PPO on unpaired feedback, as HALOs has it: one-step PPO whose behavior policy is the
reference.

Advantages come from the value head's own predictions at the start of the step; their whitening is
over the global batch, so it is measured in a pass of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from align_jax.core.schema import Batch, Outputs
from align_jax.losses.advantages import RATIO_MAX, discounted_sum, gae, token_rewards
from align_jax.losses.kto import log_ratios
from align_jax.losses.logprobs import spread_to_tokens, sum_by_slot
from align_jax.losses.objective import Metrics

CLIP_FORMS = ("symmetric", "reciprocal")
CRITIC_TARGETS = ("discounted", "gae")
REWARDS = ("label", "score")


def _scores(batch: Batch, reward: str) -> Float[Array, "B 1"]:
    """Return +1 or -1 by the label, or the score that came with the data."""
    if reward not in REWARDS:
        raise ValueError(f"ppo_offline: reward must be one of {list(REWARDS)}, got {reward!r}")
    if reward == "score":
        if batch.scores is None:
            raise ValueError(
                "ppo_offline with reward='score' needs batch.scores [B, 1]; they are None"
            )
        return jnp.asarray(batch.scores, jnp.float32)
    if batch.label is None:
        raise ValueError("ppo_offline with reward='label' needs batch.label [B]; it is None")
    return jnp.where(jnp.asarray(batch.label), 1.0, -1.0)[:, None]


def _estimates(
    policy: Outputs, batch: Batch, reward: str, gamma: float, lam: float, critic_target: str
) -> tuple[Float[Array, "N T"], Float[Array, "N T"]]:
    """Compute the (not yet whitened) advantages and what the values are trained towards."""
    if critic_target not in CRITIC_TARGETS:
        raise ValueError(
            f"ppo_offline: critic_target must be one of {list(CRITIC_TARGETS)}, got "
            f"{critic_target!r}"
        )
    if policy.values is None:
        raise ValueError("ppo_offline needs policy.values [N, T], from a value head; they are None")
    mask, slot = jnp.asarray(batch.loss_mask), jnp.asarray(batch.slot)
    scores = _scores(batch, reward).reshape(mask.shape[0], -1)  # [B, 1] -> [N, S]
    rewards = token_rewards(scores, jnp.zeros(mask.shape), mask, slot, kl_coef=0.0)
    advantages, returns = gae(rewards, policy.values, mask, slot, gamma=gamma, lam=lam)
    return advantages, discounted_sum(
        rewards, mask, slot, gamma
    ) if critic_target == "discounted" else returns


def measure_advantages(
    policy: Outputs,
    reference: Outputs,
    batch: Batch,
    *,
    mismatched: Any = None,
    clip: float = 0.5,
    gamma: float = 0.99,
    lam: float = 0.95,
    critic_coef: float = 0.01,
    kl_coef: float = 0.1,
    clip_form: str = "symmetric",
    kl_sign: int = 1,
    critic_target: str = "discounted",
    reward: str = "label",
    whiten: bool = True,
) -> dict[str, Float[Array, "b"]]:
    """Measure each response's token count and the mean and spread of its advantages."""
    advantages, _ = _estimates(policy, batch, reward, gamma, lam, critic_target)
    count = batch.lengths[:, 0].astype(jnp.float32)
    mean = sum_by_slot(advantages, batch)[:, 0] / jnp.maximum(count, 1.0)
    centered = advantages - spread_to_tokens(mean[:, None], batch)
    return {
        "count": count,
        "mean": mean,
        "spread": sum_by_slot(jnp.square(centered), batch)[:, 0],
        "weight": jnp.asarray(batch.weight, jnp.float32),
    }


def summarize_advantages(
    measured: Mapping[str, Float[Array, "M b"]],
    weights: Float[Array, "M b"],
    carry: Any,
    **options: Any,
) -> tuple[dict[str, Float[Array, "M"]], Any]:
    """Compute the mean and the scale of all tokens' advantages: 0 and 1 where they are not to be
    whitened."""
    microbatches = (weights.shape[0],)
    if not options["whiten"]:
        return {"mean": jnp.zeros(microbatches), "scale": jnp.ones(microbatches)}, carry
    tokens = measured["count"] * measured["weight"]
    total = jnp.maximum(tokens.sum(), 1e-30)
    mean = (tokens * measured["mean"]).sum() / total
    spread = (
        measured["weight"] * measured["spread"] + tokens * jnp.square(measured["mean"] - mean)
    ).sum() / total
    scale = jax.lax.rsqrt(spread + 1e-8)
    return {
        "mean": jnp.broadcast_to(mean, microbatches),
        "scale": jnp.broadcast_to(scale, microbatches),
    }, carry


def ppo_offline(
    policy: Outputs,
    reference: Outputs,
    batch: Batch,
    *,
    stats: Any = None,
    clip: float = 0.5,
    gamma: float = 0.99,
    lam: float = 0.95,
    critic_coef: float = 0.01,
    kl_coef: float = 0.1,
    clip_form: str = "symmetric",
    kl_sign: int = 1,
    critic_target: str = "discounted",
    reward: str = "label",
    whiten: bool = True,
) -> tuple[Float[Array, "B"], Float[Array, "B"], Metrics]:
    """Compute one-step PPO on fixed data; the behavior policy is the reference.

        w_t = exp(a_t - b_t)
        mean over tokens of max(-A w, -A clip(w)) + critic_coef · ½ (V - target)² + kl_coef ·
        kl_sign · (a - b)

    A is the generalized advantage of the reward (on the last token) and the value head's own
    predictions, whitened over the global batch's tokens.  The value head sees detached hidden
    states.

    Args:
        policy: the policy's outputs, with ``values``.
        reference: the reference's.
        batch: the batch, R = 1, with ``label`` (reward +1 or -1) or ``scores``.
        stats: mean and scale of the advantages.
        clip: c.
        gamma: discount per token.
        lam: λ of the advantages.
        critic_coef: weight of the value loss.
        kl_coef: weight of the log-ratio.
        clip_form: ratios within [1-c, 1+c] ("symmetric", HALOs' code) or [c, 1/c] ("reciprocal",
            its configuration's comment).
        kl_sign: 1 (log π - log π_ref, HALOs now) or -1 (its older versions).
        critic_target: "discounted" rewards to go (HALOs) or the "gae" returns.
        reward: from the "label", or the "score" that came with the data.
        whiten: whiten the advantages.

    Returns:
        Token means [B], token counts as weights [B], metrics.

    References:
        Schulman et al. 2017, arXiv 1707.06347, equation 7; Ethayarajh et al. 2024, arXiv
        2402.01306, section 3; HALOs, commit 4831988, ``train/trainers.py``, ``PPOTrainer``.

    >>> from align_jax.losses import jitted
    >>> found = jitted("ppo_offline")([[-1.0, -2.0], [-2.0, -2.0]], [True, False], [[-1.5, -2.0], [-2.0, -2.0]],
    ...                               values=[[0.0, 0.0], [0.0, 0.0]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [-1.2118, 1.0045]
    """
    if clip_form not in CLIP_FORMS:
        raise ValueError(
            f"ppo_offline: clip_form must be one of {list(CLIP_FORMS)}, got {clip_form!r}"
        )
    if kl_sign not in (1, -1):
        raise ValueError(f"ppo_offline: kl_sign must be 1 or -1, got {kl_sign!r}")
    if stats is None:
        raise ValueError(
            "ppo_offline needs stats, the moments of the advantages: call measure "
            "and summarize first"
        )
    x = log_ratios(policy, reference, batch)
    advantages, targets = _estimates(policy, batch, reward, gamma, lam, critic_target)
    advantages = (advantages - stats["mean"]) * stats["scale"]
    log_ratio = policy.token_logps - reference.token_logps
    ratio = jnp.exp(jnp.clip(log_ratio, -RATIO_MAX, RATIO_MAX))
    low, high = (1.0 - clip, 1.0 + clip) if clip_form == "symmetric" else (clip, 1.0 / clip)
    plain, clipped = -advantages * ratio, -advantages * jnp.clip(ratio, low, high)
    value = 0.5 * jnp.square(policy.values - targets)
    parts = {
        "loss/policy_avg": jnp.maximum(plain, clipped),
        "loss/value_avg": value,
        "policy/clipfrac_avg": (clipped > plain).astype(jnp.float32),
        "val/ratio": ratio,
        "policy/approxkl_avg": 0.5 * jnp.square(log_ratio),
    }
    loss = parts["loss/policy_avg"] + critic_coef * value + kl_coef * kl_sign * log_ratio
    weight, count = jnp.asarray(batch.weight, jnp.float32), batch.lengths[:, 0].astype(jnp.float32)
    losses = sum_by_slot(loss, batch)[:, 0] / jnp.maximum(count, 1.0)
    weights = weight * count
    metrics = {
        name: ((weight * sum_by_slot(part, batch)[:, 0]).sum(), weights.sum())
        for name, part in parts.items()
    }
    good = _scores(batch, reward)[:, 0] > 0
    for name, side in (("rewards/chosen", good), ("rewards/rejected", ~good)):
        chosen = jnp.where(side, weight, 0.0)
        metrics[name] = ((chosen * x).sum(), chosen.sum())
    right = ((x > 0) == good).astype(jnp.float32)
    metrics["rewards/accuracies"] = ((weight * right).sum(), weight.sum())
    return losses, weights, jax.tree.map(jax.lax.stop_gradient, metrics)
