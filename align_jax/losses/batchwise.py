# SPDX-License-Identifier: Apache-2.0
"""Paired objectives that need more than a pair's log-ratios: AOT's ranks, a dynamic beta, TDPO's
token KLs.

Where the loss depends on the whole global batch, ``measure`` gives each pair's number, and
``summarize`` sees them all, without gradients, and hands each pair what it needs; so the loss does
not depend on how the batch was split over devices and microbatches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Float

from align_jax.core.schema import Batch, Outputs
from align_jax.losses.logprobs import sum_by_slot
from align_jax.losses.objective import Metrics
from align_jax.losses.pairs import Pair, pair_metrics, pair_of
from align_jax.losses.preference import check_smoothing, scaled_sides, smoothed_logistic

Result = tuple[Float[Array, "B"], Float[Array, "B"], Metrics]


def _require(stats: Any, name: str) -> Any:
    if stats is None:
        raise ValueError(f"{name} needs stats of the whole batch: call measure and summarize first")
    return stats


def _at_same_rank(
    keys: Float[Array, "M b"], values: Float[Array, "M b"], weights: Float[Array, "M b"]
) -> Float[Array, "M b"]:
    """Give each pair the value whose rank among the values is that pair's rank among the keys.

    Filler pairs (weight 0) rank last in both and get their own key.
    """
    real = (weights > 0).reshape(-1)
    keys, values = keys.reshape(-1), values.reshape(-1)
    order = jnp.argsort(jnp.where(real, keys, jnp.inf))
    ranked = jnp.sort(jnp.where(real, values, jnp.inf))
    found = jnp.zeros_like(keys).at[order].set(ranked)
    return jnp.where(real, found, keys).reshape(weights.shape)


def _finish(losses: Array, pair: Pair, beta: float, policy: Outputs, batch: Batch) -> Result:
    chosen = beta * (pair.policy_chosen - pair.reference_chosen)
    rejected = beta * (pair.policy_rejected - pair.reference_rejected)
    return (
        losses,
        jnp.asarray(batch.weight, jnp.float32),
        pair_metrics(chosen, rejected, policy, batch),
    )


def measure_aot(
    policy: Outputs,
    reference: Outputs,
    batch: Batch,
    *,
    mismatched: Any = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    ld_alpha: float | None = None,
) -> dict[str, Float[Array, "b"]]:
    """Measure P_w - P_l (less the margin) and R_w - R_l."""
    pair = pair_of(policy, reference, batch, ld_alpha=ld_alpha)
    return {
        "policy": pair.policy_chosen - pair.policy_rejected - pair.margin / beta,
        "reference": pair.reference_chosen - pair.reference_rejected,
    }


def summarize_aot(
    measured: Mapping[str, Float[Array, "M b"]],
    weights: Float[Array, "M b"],
    carry: Any,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    ld_alpha: float | None = None,
) -> tuple[Float[Array, "M b"], Any]:
    """Give each pair the reference's difference of the rank that its own difference has."""
    return _at_same_rank(measured["policy"], measured["reference"], weights), carry


def aot(
    policy: Outputs,
    reference: Outputs,
    batch: Batch,
    *,
    stats: Any = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    ld_alpha: float | None = None,
) -> Result:
    """Compute AOT (paired): the policy's differences dominate the reference's, rank by rank.

        u = sort(P_w - P_l) - sort(R_w - R_l),    -(1-ε) log σ(β u) - ε log σ(-β u)

    The sorts run over the global batch (TRL: over each device's microbatch).  Pair i's loss is that
    of its own rank.

    References:
        Melnyk et al. 2024, arXiv 2406.05882, algorithm 1 (paired).

    >>> from align_jax.losses import jitted
    >>> found = jitted("aot", beta=0.5)(policy=[[-10.0, -12.0], [-8.0, -7.0]], reference=[[-9.0, -9.0], [-5.0, -8.0]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [0.9741, 0.9741]
    """
    check_smoothing(label_smoothing, "aot")
    pair = pair_of(policy, reference, batch, ld_alpha=ld_alpha)
    u = pair.policy_chosen - pair.policy_rejected - pair.margin / beta - _require(stats, "aot")
    return _finish(smoothed_logistic(beta * u, label_smoothing), pair, beta, policy, batch)


def measure_aot_unpaired(
    policy: Outputs,
    reference: Outputs,
    batch: Batch,
    *,
    mismatched: Any = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    ld_alpha: float | None = None,
) -> dict[str, Float[Array, "b"]]:
    """Measure β x_w and β x_l, each with its half of the margin."""
    chosen, rejected = scaled_sides(pair_of(policy, reference, batch, ld_alpha=ld_alpha), beta)
    return {"chosen": chosen, "rejected": rejected}


def summarize_aot_unpaired(
    measured: Mapping[str, Float[Array, "M b"]],
    weights: Float[Array, "M b"],
    carry: Any,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    ld_alpha: float | None = None,
) -> tuple[dict[str, Float[Array, "M b"]], Any]:
    """Give each chosen response the rejected one of its rank, and each rejected one the chosen one
    of its rank."""
    chosen, rejected = measured["chosen"], measured["rejected"]
    return {
        "rejected": _at_same_rank(chosen, rejected, weights),
        "chosen": _at_same_rank(rejected, chosen, weights),
    }, carry


def aot_unpaired(
    policy: Outputs,
    reference: Outputs,
    batch: Batch,
    *,
    stats: Any = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    ld_alpha: float | None = None,
) -> Result:
    """Compute AOT (unpaired): the chosen log-ratios dominate the rejected ones, rank by rank.

        u = sort(x_w) - sort(x_l),    -(1-ε) log σ(β u) - ε log σ(-β u)

    A rank's chosen and rejected response may stand in different microbatches, so each pair reports
    half of the losses of its chosen's and of its rejected's rank, with the whole gradient of each
    to its own side; the sums agree.

    References:
        Melnyk et al. 2024, arXiv 2406.05882, algorithm 1 (unpaired).

    >>> from align_jax.losses import jitted
    >>> found = jitted("aot_unpaired", beta=0.5)(policy=[[-10.0, -12.0], [-8.0, -7.0]],
    ...                                          reference=[[-9.0, -9.0], [-5.0, -8.0]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [1.0032, 1.0032]
    """
    check_smoothing(label_smoothing, "aot_unpaired")
    pair = pair_of(policy, reference, batch, ld_alpha=ld_alpha)
    chosen, rejected = scaled_sides(pair, beta)
    stats = _require(stats, "aot_unpaired")
    both = smoothed_logistic(chosen - stats["rejected"], label_smoothing) + smoothed_logistic(
        stats["chosen"] - rejected, label_smoothing
    )
    return _finish(both - jax.lax.stop_gradient(0.5 * both), pair, beta, policy, batch)


BETA_CARRY = {"mean": 0.0, "started": 0.0}  # M_0 of beta_dpo, and whether it has been set


def measure_gap(
    policy: Outputs,
    reference: Outputs,
    batch: Batch,
    *,
    mismatched: Any = None,
    beta: float = 0.1,
    alpha: float = 0.6,
    momentum: float = 0.9,
) -> dict[str, Float[Array, "b"]]:
    """Measure each pair's discrepancy of reward, β₀ (x_w - x_l)."""
    pair = pair_of(policy, reference, batch)
    return {"gap": beta * (pair.chosen - pair.rejected)}


def summarize_gap(
    measured: Mapping[str, Float[Array, "M b"]],
    weights: Float[Array, "M b"],
    carry: Any,
    *,
    beta: float = 0.1,
    alpha: float = 0.6,
    momentum: float = 0.9,
) -> tuple[Float[Array, "M"], Any]:
    """Compute the batch's beta, and update the running mean of the gaps."""
    mean = (weights * measured["gap"]).sum() / jnp.maximum(weights.sum(), 1e-30)
    started = jnp.asarray(carry["started"], jnp.float32)
    before = jnp.where(started > 0, jnp.asarray(carry["mean"], jnp.float32), mean)
    dynamic = jnp.maximum(beta * (1.0 + alpha * (mean - before)), 1e-2 * beta)
    after = momentum * before + (1.0 - momentum) * mean
    return jnp.broadcast_to(dynamic, (weights.shape[0],)), {
        "mean": after,
        "started": jnp.ones_like(started),
    }


def beta_dpo(
    policy: Outputs,
    reference: Outputs,
    batch: Batch,
    *,
    stats: Any = None,
    beta: float = 0.1,
    alpha: float = 0.6,
    momentum: float = 0.9,
) -> Result:
    """Compute DPO with a β that follows how informative the batch's pairs are.

        β = β₀ (1 + α (mean_i M_i - M₀)),    M_i = β₀ d_i,    M₀ ← m M₀ + (1-m) mean_i M_i

    β has no gradient and stays above β₀/100; M₀ starts at the first batch's mean and is carried in
    the train state. The paper's second part, which drops outlying pairs at random, is not here.
    Rewards reported use β₀.

    References:
        Wu et al. 2024, arXiv 2407.08639, the batch-level dynamic β; α = 0.6, m = 0.9 are the
        paper's.

    >>> from align_jax.losses import jitted
    >>> found = jitted("beta_dpo", beta=0.5)(policy=[[-10.0, -12.0]], reference=[[-11.0, -11.0]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [0.3133]
    """
    pair = pair_of(policy, reference, batch)
    z = _require(stats, "beta_dpo") * (pair.chosen - pair.rejected) - pair.margin
    losses, weights, metrics = _finish(-log_sigmoid(z), pair, beta, policy, batch)
    total = weights.sum()
    return losses, weights, metrics | {"beta": (jax.lax.stop_gradient(stats) * total, total)}


def tdpo(
    policy: Outputs,
    reference: Outputs,
    batch: Batch,
    *,
    stats: Any = None,
    beta: float = 0.1,
    alpha: float = 0.5,
    stop_gradient_chosen: bool = True,
) -> Result:
    """Compute token-level DPO: DPO less the difference of the sequential forward KLs.

        -log σ(β d - α (β D_l - β sg(D_w)) - margin),    D = Σ_t KL(π_ref(·|y_<t) || π(·|y_<t))

    That is TDPO₂; ``stop_gradient_chosen=False`` with ``alpha=1`` is TDPO₁.

    References:
        Zeng et al. 2024, arXiv 2404.11999, the losses of TDPO₁ and TDPO₂.

    >>> from align_jax.losses import jitted
    >>> found = jitted("tdpo", beta=0.5)(policy=[[[-4.0], [-6.0]]], reference=[[[-5.0], [-5.0]]],
    ...                                  kl=[[[0.5], [1.5]]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [0.3869]
    """
    pair = pair_of(policy, reference, batch)
    divergence = sum_by_slot(policy.kl, batch)  # [B, 2]
    chosen = jax.lax.stop_gradient(divergence[:, 0]) if stop_gradient_chosen else divergence[:, 0]
    z = (
        beta * (pair.chosen - pair.rejected)
        - alpha * beta * (divergence[:, 1] - chosen)
        - pair.margin
    )
    losses, weights, metrics = _finish(-log_sigmoid(z), pair, beta, policy, batch)
    total = weights.sum()
    for name, column in (("kl/chosen", 0), ("kl/rejected", 1)):
        metrics[name] = (jax.lax.stop_gradient((weights * divergence[:, column]).sum()), total)
    return losses, weights, metrics
