# SPDX-License-Identifier: Apache-2.0
"""What a rollout is trained towards: advantages and returns, made once a rollout from scores and
log-probabilities.

The defaults below are the rollout options of the policy-gradient rows of the table.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from align_jax.core.schema import Batch
from align_jax.losses import advantages as estimators
from align_jax.losses.logprobs import spread_to_tokens, sum_by_slot

METHODS = ("gae", "group", "leave_one_out", "batch", "global")

_KL: dict[str, Any] = {
    "kl_coef": 0.05,  # of the KL in the reward, units of reward per nat; 0: no reference is run
    "kl_estimator": "k1",
    "kl_target": None,  # nats a response: the coefficient then adapts
    "kl_horizon": 10000.0,  # responses
}
_REUSE: dict[str, Any] = {
    "epochs": 1,  # passes over a rollout
    "minibatches": 1,  # optimizer steps a pass
    "missing_eos_penalty": 0.0,  # taken from the score of a response that did not end
}
PPO: dict[str, Any] = {
    "advantages": "gae",
    "gamma": 1.0,
    "lam": 0.95,
    "whiten_advantages": True,
    "whiten_rewards": False,
    **_KL,
    **_REUSE,
    "epochs": 4,
}
GRPO: dict[str, Any] = {"advantages": "group", "scale": "group", **_REUSE}
RLOO: dict[str, Any] = {"advantages": "leave_one_out", "whiten_advantages": False, **_KL, **_REUSE}
REINFORCE: dict[str, Any] = {"advantages": "batch", "whiten_advantages": False, **_KL, **_REUSE}
REINFORCE_PP: dict[str, Any] = {"advantages": "global", "gamma": 1.0, **_KL, **_REUSE}


def make_targets(
    batch: Batch,
    *,
    reference_token_logps: Float[Array, "N T"] | None = None,
    advantages: str = "gae",
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten_advantages: bool = False,
    whiten_rewards: bool = False,
    kl_coef: float | Array = 0.0,
    kl_estimator: str = "k1",
    scale: str = "group",
) -> tuple[Batch, dict[str, tuple[Array, Array]]]:
    """Fill a rollout's ``advantages`` (and for "gae" its ``returns``).

        gae:           token rewards (score on the last token, less the KL) and ``old_values``
        group:         (s - mean of the group) / std                                             GRPO
        leave_one_out: s - KL less the mean of the group's others                                RLOO
        batch:         s - KL less the batch's mean                                              REINFORCE
        global:        discounted token rewards to go, normalized over all tokens                REINFORCE++

    Statistics are over this batch: hand in the whole global batch.

    Args:
        batch: a rollout with ``scores`` [B, R], and ``old_token_logps``; "gae" needs ``old_values``
            too.
        reference_token_logps: [N, T]; needed where ``kl_coef`` is not 0.
        advantages: one of ``METHODS``.
        gamma: discount per token.
        lam: λ of "gae".
        whiten_advantages: to mean 0 and variance 1 over all tokens.
        whiten_rewards: token rewards to variance 1, their mean kept ("gae").
        kl_coef: units of reward per nat, in the reward; "group" has its KL in the loss and takes
            none.
        kl_estimator: "k1", "k2" or "k3".
        scale: "group"'s standard deviation; see ``advantages.group_advantages``.

    Returns:
        The batch, and metrics: ``objective/{kl,non_score_reward,rlhf_reward,scores}``, sums over a
        response, averaged.

    Raises:
        ValueError: an unknown method, or a field that it needs is None.
    """
    if advantages not in METHODS:
        raise ValueError(f"advantages must be one of {list(METHODS)}, got {advantages!r}")
    if batch.scores is None or batch.old_token_logps is None:
        raise ValueError("targets need batch.scores and batch.old_token_logps from the rollout")
    with_kl = not (isinstance(kl_coef, (int, float)) and kl_coef == 0)
    if with_kl and reference_token_logps is None:
        raise ValueError(f"kl_coef {kl_coef} needs reference_token_logps; they are None")
    if with_kl and advantages == "group":
        raise ValueError("group advantages have their KL in the loss (beta): kl_coef must be 0")
    mask, slot = jnp.asarray(batch.loss_mask), jnp.asarray(batch.slot)
    weight, scores = jnp.asarray(batch.weight, jnp.float32), jnp.asarray(batch.scores, jnp.float32)
    token_weight = spread_to_tokens(jnp.broadcast_to(weight[:, None], scores.shape), batch)
    old = jnp.asarray(batch.old_token_logps, jnp.float32)
    base = old if reference_token_logps is None else reference_token_logps
    ratio = jnp.where(mask, old - base, 0.0)
    rows = scores.reshape(mask.shape[0], -1)  # [B, R] -> [N, S]
    rewards = estimators.token_rewards(
        rows, ratio, mask, slot, kl_coef=kl_coef, kl_estimator=kl_estimator
    )
    totals = sum_by_slot(rewards, batch)  # [B, R]: score less KL
    returns = None
    if advantages == "gae":
        if batch.old_values is None:
            raise ValueError("gae needs batch.old_values [N, T]; they are None")
        if whiten_rewards:
            rewards = estimators.whiten(rewards, token_weight, shift_mean=False)
        found, returns = estimators.gae(
            rewards, jnp.asarray(batch.old_values), mask, slot, gamma=gamma, lam=lam
        )
    elif advantages == "global":
        found = estimators.whiten(
            estimators.discounted_sum(rewards, mask, slot, gamma), token_weight
        )
    else:
        groups = {
            "group": lambda: estimators.group_advantages(scores, scale=scale),
            "leave_one_out": lambda: estimators.leave_one_out(totals),
            "batch": lambda: estimators.batch_baseline(totals, weight),
        }[advantages]()
        found = spread_to_tokens(groups, batch)
    if whiten_advantages:
        found = estimators.whiten(found, token_weight)
    kl = sum_by_slot(estimators.kl_estimate(ratio, kl_estimator), batch)
    parts = {
        "objective/kl": kl,
        "objective/scores": scores,
        "objective/rlhf_reward": totals,
        "objective/non_score_reward": totals - scores,
    }
    count = weight.sum()
    metrics = {name: ((weight * x.mean(axis=1)).sum(), count) for name, x in parts.items()}
    batch = batch._replace(advantages=jax.lax.stop_gradient(found), returns=returns)
    return batch, jax.tree.map(jax.lax.stop_gradient, metrics)
