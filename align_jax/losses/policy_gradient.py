# SPDX-License-Identifier: Apache-2.0
"""Policy-gradient objectives on rollouts.

The rollout source fills ``old_token_logps`` and ``advantages`` [N, T] (and for PPO ``returns`` and
``old_values``); see ``targets``.  w_t = exp(a_t - old_t) is a token's importance ratio, its
logarithm cut at ±20; A its advantage.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from align_jax.core.schema import Batch, Outputs
from align_jax.losses.advantages import RATIO_MAX, kl_estimate
from align_jax.losses.logprobs import spread_to_tokens, sum_by_slot
from align_jax.losses.objective import Metrics

Result = tuple[Float[Array, "B"], Float[Array, "B"], Metrics]
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
IMPORTANCE = ("token", "sequence")


def _fields(batch: Batch, name: str, *fields: str) -> list[Array]:
    missing = [field for field in fields if getattr(batch, field) is None]
    if missing:
        raise ValueError(
            f"{name} needs batch.{', batch.'.join(missing)} [N, T] from the rollout; they are None"
        )
    return [jnp.asarray(getattr(batch, field), jnp.float32) for field in fields]


def _log_ratio(policy: Outputs, old: Float[Array, "N T"], batch: Batch) -> Float[Array, "N T"]:
    return jnp.where(
        batch.loss_mask, jnp.clip(policy.token_logps - old, -RATIO_MAX, RATIO_MAX), 0.0
    )


def _counts(batch: Batch) -> Float[Array, "B R"]:
    return jnp.asarray(batch.lengths).astype(jnp.float32)


def _over_tokens(
    x: Float[Array, "N T"], batch: Batch
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Average over a group's tokens, with its token count as weight: the mean over the global
    batch's tokens."""
    tokens = _counts(batch).sum(axis=1)
    return sum_by_slot(x, batch).sum(axis=1) / jnp.maximum(tokens, 1.0), jnp.asarray(
        batch.weight, jnp.float32
    ) * tokens


def _over_rows(x: Float[Array, "N T"], batch: Batch) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Average over each response's tokens, then over responses."""
    means = sum_by_slot(x, batch) / jnp.maximum(_counts(batch), 1.0)
    return means.mean(axis=1), jnp.asarray(batch.weight, jnp.float32)


def _aggregate(
    x: Float[Array, "N T"], batch: Batch, loss_type: str, max_length: int | None
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Turn token losses into losses and weights of groups, one of ``LOSS_TYPES``."""
    if loss_type == "grpo":
        return _over_rows(x, batch)
    if loss_type in ("bnpo", "dapo"):
        return _over_tokens(x, batch)
    weight = jnp.asarray(batch.weight, jnp.float32)
    if loss_type == "luspo":
        return sum_by_slot(x, batch).mean(axis=1), weight
    if loss_type == "dr_grpo":
        if max_length is None:
            raise ValueError(
                "loss_type 'dr_grpo' divides by max_length, the longest completion "
                "in tokens; it is None"
            )
        return sum_by_slot(x, batch).mean(axis=1) / max_length, weight
    raise ValueError(f"unknown loss_type {loss_type!r}; known: {list(LOSS_TYPES)}")


def _mean_metrics(
    batch: Batch, policy: Outputs, parts: dict[str, Array], by_row: tuple[str, ...] = ()
) -> Metrics:
    """Report token means of [N, T] quantities (row means of those in ``by_row``), lengths and
    rewards."""
    metrics: Metrics = {}
    if policy.entropy is not None:
        parts = {"entropy": policy.entropy} | parts
    for name, x in parts.items():
        values, weights = (_over_rows if name in by_row else _over_tokens)(x, batch)
        metrics[name] = ((values * weights).sum(), weights.sum())
    weight = jnp.asarray(batch.weight, jnp.float32)
    total = weight.sum()
    metrics["completions/mean_length"] = ((weight * _counts(batch).mean(axis=1)).sum(), total)
    if batch.scores is not None:
        scores = jnp.asarray(batch.scores, jnp.float32)
        metrics["reward"] = ((weight * scores.mean(axis=1)).sum(), total)
        if scores.shape[1] > 1:
            std = scores.std(axis=1, ddof=1)
            metrics["reward_std"] = ((weight * std).sum(), total)
            metrics["frac_reward_zero_std"] = (
                (weight * (std == 0).astype(jnp.float32)).sum(),
                total,
            )
    return jax.tree.map(jax.lax.stop_gradient, metrics)


def _clipped(
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


def _kl_term(
    policy: Outputs, reference: Outputs | None, batch: Batch, beta: float
) -> tuple[Array, dict[str, Array]]:
    """Compute β k3 for each token; nothing where β is 0."""
    if beta == 0:
        return jnp.zeros(()), {}
    kl = jnp.where(
        batch.loss_mask, kl_estimate(policy.token_logps - reference.token_logps, "k3"), 0.0
    )
    return beta * kl, {"kl": kl}


def grpo(
    policy: Outputs,
    reference: Outputs | None,
    batch: Batch,
    *,
    stats: Any = None,
    loss_type: str = "grpo",
    importance: str = "token",
    epsilon_low: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    max_length: int | None = None,
) -> Result:
    """Compute the GRPO loss, in one of its aggregations.

        -min(min(w, δ) A, clip(w, 1 - ε_low, 1 + ε_high) A) + β k3

        grpo: mean over a response's tokens, then over responses     luspo: sum over tokens, mean over responses
        bnpo, dapo: mean over the global batch's tokens              dr_grpo: sum over tokens / (responses · max_length)

    Args:
        policy: the policy's outputs.
        reference: the reference's; needed where β is not 0.
        batch: a rollout with ``old_token_logps`` and ``advantages``.
        stats: not used.
        loss_type: one of ``LOSS_TYPES``.
        importance: "token" ratios, or the "sequence"'s: exp of their logarithms' mean (GSPO).
        epsilon_low: clip range below 1.
        epsilon_high: above 1; None: ε_low, but 0.28 for dapo.
        delta: upper bound of ratios on the unclipped side (two-sided clipping); None: off.
        beta: of the KL to the reference.
        max_length: tokens; dr_grpo's constant.

    References:
        Shao et al. 2024, arXiv 2402.03300, equation 3; dr_grpo: Liu et al. 2025, arXiv 2503.20783;
        dapo: Yu et al. 2025, arXiv 2503.14476, equation 8; the names: TRL 1.16.0,
        ``grpo_trainer.py``.

    >>> from align_jax.losses import jitted
    >>> found = jitted("grpo")(policy=[[[-1.0, -2.0], [-1.0, -3.0]]], old_token_logps=[[[-1.5, -2.0], [-1.0, -3.0]]],
    ...                        advantages=[[[1.0, 1.0], [-1.0, -1.0]]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [-0.05]
    """
    if importance not in IMPORTANCE:
        raise ValueError(f"importance must be one of {list(IMPORTANCE)}, got {importance!r}")
    old, advantages = _fields(batch, "grpo", "old_token_logps", "advantages")
    log_ratio = _log_ratio(policy, old, batch)
    if importance == "sequence":
        log_ratio = spread_to_tokens(
            sum_by_slot(log_ratio, batch) / jnp.maximum(_counts(batch), 1.0), batch
        )
    if epsilon_high is None:
        epsilon_high = 0.28 if loss_type == "dapo" else epsilon_low
    losses, clips = _clipped(jnp.exp(log_ratio), advantages, epsilon_low, epsilon_high, delta)
    penalty, kl = _kl_term(policy, reference, batch, beta)
    metrics = _mean_metrics(
        batch, policy, clips | kl, tuple(clips) if importance == "sequence" else ()
    )
    return *_aggregate(losses + penalty, batch, loss_type, max_length), metrics


def gspo(
    policy: Outputs,
    reference: Outputs | None,
    batch: Batch,
    *,
    stats: Any = None,
    epsilon_low: float = 3e-4,
    epsilon_high: float | None = 4e-4,
    beta: float = 0.0,
) -> Result:
    """Compute GSPO: GRPO with one ratio for the whole sequence, w = exp(mean_t (a_t - old_t)).

    References:
        Zheng et al. 2025, arXiv 2507.18071, the GSPO objective and its clip range.

    >>> from align_jax.losses import jitted
    >>> found = jitted("gspo", epsilon_high=0.5)(policy=[[[-1.0, -2.0]]], old_token_logps=[[[-1.5, -2.0]]],
    ...                                          advantages=[[[1.0, 1.0]]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [-1.284]
    """
    return grpo(
        policy,
        reference,
        batch,
        importance="sequence",
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        beta=beta,
    )


def cispo(
    policy: Outputs,
    reference: Outputs | None,
    batch: Batch,
    *,
    stats: Any = None,
    epsilon_high: float = 5.0,
    beta: float = 0.0,
) -> Result:
    """Compute CISPO: -sg(min(w, ε_high)) A a_t + β k3, mean over the global batch's tokens.

    References:
        MiniMax 2025, arXiv 2506.13585, the CISPO objective.

    >>> from align_jax.losses import jitted
    >>> found = jitted("cispo")(policy=[[[-1.0, -2.0]]], old_token_logps=[[[-1.5, -2.0]]], advantages=[[[1.0, 1.0]]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [1.8244]
    """
    old, advantages = _fields(batch, "cispo", "old_token_logps", "advantages")
    ratio = jax.lax.stop_gradient(jnp.exp(_log_ratio(policy, old, batch)))
    losses = -jnp.minimum(ratio, epsilon_high) * advantages * policy.token_logps
    penalty, kl = _kl_term(policy, reference, batch, beta)
    clipped = ((ratio > epsilon_high) & (advantages > 0)).astype(jnp.float32)
    return *_over_tokens(losses + penalty, batch), _mean_metrics(
        batch, policy, {"cispo_clip_ratio": clipped} | kl
    )


def sapo(
    policy: Outputs,
    reference: Outputs | None,
    batch: Batch,
    *,
    stats: Any = None,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
    beta: float = 0.0,
) -> Result:
    """Compute SAPO, a soft gate in place of the clip: -(4/τ) σ(τ (w - 1)) A + β k3, averaged as in
    GRPO.

    τ is ``tau_positive`` where A > 0, else ``tau_negative``.

    References:
        Gao et al. 2025, arXiv 2511.20347, the soft gate.

    >>> from align_jax.losses import jitted
    >>> found = jitted("sapo")(policy=[[[-1.0, -2.0]]], old_token_logps=[[[-1.5, -2.0]]], advantages=[[[1.0, 1.0]]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [-2.3134]
    """
    old, advantages = _fields(batch, "sapo", "old_token_logps", "advantages")
    ratio = jnp.exp(_log_ratio(policy, old, batch))
    tau = jnp.where(advantages > 0, tau_positive, tau_negative)
    losses = -jax.nn.sigmoid(tau * (ratio - 1.0)) * 4.0 / tau * advantages
    penalty, kl = _kl_term(policy, reference, batch, beta)
    return *_over_rows(losses + penalty, batch), _mean_metrics(batch, policy, kl)


def rloo(
    policy: Outputs,
    reference: Outputs | None,
    batch: Batch,
    *,
    stats: Any = None,
    epsilon_low: float = 0.2,
    epsilon_high: float | None = None,
) -> Result:
    """Compute RLOO: -min(w A, clip(w, 1 - ε_low, 1 + ε_high) A) with w the ratio of whole
    sequences.

    A is the reward (less the KL) minus the mean of the group's others: ``targets`` makes it.

    References:
        Ahmadian et al. 2024, arXiv 2402.14740, section 3; the clip: TRL 1.16.0,
        ``rloo_trainer.py``.

    >>> from align_jax.losses import jitted
    >>> found = jitted("rloo")(policy=[[[-1.0, -2.0]]], old_token_logps=[[[-1.1, -2.0]]], advantages=[[[1.0, 1.0]]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [-1.1052]
    """
    old, advantages = _fields(batch, "rloo", "old_token_logps", "advantages")
    difference = sum_by_slot(policy.token_logps - old, batch)
    ratio = jnp.exp(jnp.clip(difference, -RATIO_MAX, RATIO_MAX))  # [B, R]
    # the same on all of a response's tokens
    each = sum_by_slot(advantages, batch) / jnp.maximum(_counts(batch), 1.0)
    losses, clips = _clipped(
        ratio, each, epsilon_low, epsilon_low if epsilon_high is None else epsilon_high
    )
    spread = {name: spread_to_tokens(x, batch) for name, x in clips.items()}
    metrics = _mean_metrics(batch, policy, spread, tuple(spread))
    return losses.mean(axis=1), jnp.asarray(batch.weight, jnp.float32), metrics


def reinforce(
    policy: Outputs, reference: Outputs | None, batch: Batch, *, stats: Any = None
) -> Result:
    """Compute REINFORCE: -A a_t, mean over the global batch's tokens.

    References:
        Williams 1992, "Simple statistical gradient-following algorithms".

    >>> from align_jax.losses import jitted
    >>> jitted("reinforce")(policy=[[[-1.0, -2.0]]], advantages=[[[1.0, 1.0]]]).losses.tolist()
    [1.5]
    """
    (advantages,) = _fields(batch, "reinforce", "advantages")
    return *_over_tokens(-advantages * policy.token_logps, batch), _mean_metrics(batch, policy, {})


def reinforce_pp(
    policy: Outputs,
    reference: Outputs | None,
    batch: Batch,
    *,
    stats: Any = None,
    epsilon_low: float = 0.2,
    epsilon_high: float | None = None,
) -> Result:
    """Compute REINFORCE++: PPO's clipped loss without a critic, on globally normalized advantages.

    References:
        Hu 2025, arXiv 2501.03262, section 3.

    >>> from align_jax.losses import jitted
    >>> found = jitted("reinforce_pp")(policy=[[[-1.0, -2.0]]], old_token_logps=[[[-1.5, -2.0]]],
    ...                                advantages=[[[1.0, 1.0]]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [-1.1]
    """
    return grpo(
        policy,
        reference,
        batch,
        loss_type="bnpo",
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
    )


def ppo(
    policy: Outputs,
    reference: Outputs | None,
    batch: Batch,
    *,
    stats: Any = None,
    clip: float = 0.2,
    value_clip: float = 0.2,
    vf_coef: float = 0.1,
) -> Result:
    """Compute the PPO loss, mean over the global batch's tokens.

        max(-A w, -A clip(w, 1 - c, 1 + c)) + vf_coef · ½ max((V - ret)², (clip(V, V_old ± c_v) -
        ret)²)

    Its entropy bonus and PPO-ptx's NLL are the terms that ``entropy_coef`` and ``ptx_coef`` add.
    Groups whose ``batch.label`` is false are rows of text for PPO-ptx, and do not count here.

    Args:
        policy: the policy's outputs, with ``values``.
        reference: not used: the KL is in the reward.
        batch: a rollout with ``old_token_logps``, ``advantages``, ``returns`` and ``old_values``.
        stats: not used.
        clip: c.
        value_clip: c_v, units of reward.
        vf_coef: weight of the value loss.

    References:
        Schulman et al. 2017, arXiv 1707.06347, equations 7 and 9; the value clip: Huang et al.
        2024, arXiv 2403.17031 (value function clipping).

    >>> from align_jax.losses import jitted
    >>> found = jitted("ppo")(policy=[[-1.0, -2.0]], old_token_logps=[[-1.5, -2.0]], advantages=[[1.0, 1.0]],
    ...                       values=[[0.5, 0.0]], old_values=[[0.0, 0.0]], returns=[[1.0, 0.0]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [-1.084]
    """
    names = ("old_token_logps", "advantages", "returns", "old_values")
    old, advantages, returns, old_values = _fields(batch, "ppo", *names)
    if policy.values is None:
        raise ValueError("ppo needs policy.values [N, T], from a value head; they are None")
    if batch.label is not None:
        batch = batch._replace(
            weight=jnp.where(jnp.asarray(batch.label), jnp.asarray(batch.weight), 0.0)
        )
    log_ratio = _log_ratio(policy, old, batch)
    ratio = jnp.exp(log_ratio)
    plain, clipped = -advantages * ratio, -advantages * jnp.clip(ratio, 1.0 - clip, 1.0 + clip)
    near = jnp.clip(policy.values, old_values - value_clip, old_values + value_clip)
    free, bound = jnp.square(policy.values - returns), jnp.square(near - returns)
    parts = {
        "loss/policy_avg": jnp.maximum(plain, clipped),
        "loss/value_avg": 0.5 * jnp.maximum(free, bound),
        "policy/clipfrac_avg": (clipped > plain).astype(jnp.float32),
        "policy/approxkl_avg": 0.5 * jnp.square(log_ratio),
        "val/ratio": ratio,
        "val/clipfrac_avg": (bound > free).astype(jnp.float32),
    }
    loss = parts["loss/policy_avg"] + vf_coef * parts["loss/value_avg"]
    return *_over_tokens(loss, batch), _mean_metrics(batch, policy, parts)


def entropy(
    policy: Outputs, reference: Outputs | None, batch: Batch, *, stats: Any = None
) -> Result:
    """Compute minus the entropy of the next-token distributions, mean over the global batch's
    tokens, nats.

    >>> from align_jax.losses import jitted
    >>> jitted("entropy")(policy=[[[-1.0, -2.0]]], entropy=[[[0.5, 1.5]]]).losses.tolist()
    [-1.0]
    """
    losses, weights = _over_tokens(-policy.entropy, batch)
    return (
        losses,
        weights,
        {"entropy": (-jax.lax.stop_gradient((losses * weights).sum()), weights.sum())},
    )


def ptx(policy: Outputs, reference: Outputs | None, batch: Batch, *, stats: Any = None) -> Result:
    """Compute the NLL of the groups whose ``batch.label`` is false: the text that PPO-ptx mixes in.

    References:
        Ouyang et al. 2022, arXiv 2203.02155, equation 2.

    >>> from align_jax.losses import jitted
    >>> found = jitted("ptx")(policy=[[-1.0, -2.0], [-3.0, -5.0]], label=[True, False])
    >>> found.losses.tolist(), found.weights.tolist(), float(found.loss)
    ([1.5, 4.0], [0.0, 2.0], 4.0)
    """
    if batch.label is None:
        raise ValueError(
            "ptx needs batch.label [B], false for the rows of text mixed in; it is None"
        )
    batch = batch._replace(
        weight=jnp.where(jnp.asarray(batch.label), 0.0, jnp.asarray(batch.weight))
    )
    losses, weights = _over_tokens(-policy.token_logps, batch)
    return (
        losses,
        weights,
        {"ptx_nll": (jax.lax.stop_gradient((losses * weights).sum()), weights.sum())},
    )
