# SPDX-License-Identifier: Apache-2.0
"""Objectives on unpaired feedback: a label for each response says whether it was desirable.

x = P - R is a response's log-ratio of policy to reference, σ the logistic function, z₀ an estimate
of the policy's KL from the reference: the mean of x over *mismatched* pairs (each prompt with
another prompt's response), clamped below at 0 after the mean, without gradient.  Its scope is the
global batch, so it does not depend on devices or microbatches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid
from jaxtyping import Array, Float

from align_jax.core.schema import Batch, Outputs
from align_jax.losses.logprobs import sum_by_slot
from align_jax.losses.objective import Metrics

Result = tuple[Float[Array, "B"], Float[Array, "B"], Metrics]
KL_SCOPES = ("global", "microbatch")
BALANCE = (1.0, 4.0 / 3.0)  # of w_D n_D to w_U n_U


def balance_warning(
    desirable: int, undesirable: int, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> str | None:
    """Return a warning where the classes' total weights are out of the advised proportion, else
    None.

    w_D n_D / (w_U n_U) should lie in [1, 4/3].  One class alone is no mistake, but said.

    References:
        Ethayarajh et al. 2024, arXiv 2402.01306, equation 8.

    >>> balance_warning(100, 300)
    'w_D n_D / (w_U n_U) = 0.333 lies outside [1, 1.333]: set desirable_weight to between 3 and 4'
    """
    if not desirable or not undesirable:
        only = "undesirable" if undesirable else "desirable"
        return f"all feedback is {only}: the loss has nothing to contrast it with"
    ratio = desirable_weight * desirable / (undesirable_weight * undesirable)
    if BALANCE[0] <= ratio <= BALANCE[1]:
        return None
    low, high = (bound * undesirable_weight * undesirable / desirable for bound in BALANCE)
    return (
        f"w_D n_D / (w_U n_U) = {ratio:.3g} lies outside [1, 1.333]: set desirable_weight to "
        "between "
        f"{low:.3g} and {high:.3g}"
    )


def log_ratios(policy: Outputs, reference: Outputs, batch: Batch) -> Float[Array, "B"]:
    """Compute x = P - R of a batch of single responses."""
    if batch.lengths.shape[1] != 1:
        raise ValueError(
            "an unpaired objective expects groups of R = 1 response, got R = "
            f"{batch.lengths.shape[1]}"
        )
    return (policy.logps - reference.logps)[:, 0]


def _labels(batch: Batch) -> Array:
    if batch.label is None:
        raise ValueError(
            "an unpaired objective needs batch.label [B], true for desirable responses; it is None"
        )
    return jnp.asarray(batch.label)


def _finish(
    losses: Array,
    x: Array,
    beta: float,
    shift: Array,
    policy: Outputs,
    batch: Batch,
    extra: Mapping[str, Array],
) -> Result:
    """Add the metrics; ``shift`` is what a desirable response's reward must exceed."""
    weight = jnp.asarray(batch.weight, jnp.float32)
    label = _labels(batch)
    wanted, unwanted = jnp.where(label, weight, 0.0), jnp.where(label, 0.0, weight)
    reward, logps, total = beta * x, policy.logps[:, 0], weight.sum()
    metrics = {
        "rewards/chosen": ((wanted * reward).sum(), wanted.sum()),
        "rewards/rejected": ((unwanted * reward).sum(), unwanted.sum()),
        "rewards/accuracies": (
            (weight * ((reward > shift) == label).astype(jnp.float32)).sum(),
            total,
        ),
        "logps/chosen": ((wanted * logps).sum(), wanted.sum()),
        "logps/rejected": ((unwanted * logps).sum(), unwanted.sum()),
    }
    metrics |= {name: (value * total, total) for name, value in extra.items()}
    if policy.entropy is not None:
        entropy = sum_by_slot(policy.entropy, batch)[:, 0]
        metrics["entropy"] = (
            (weight * entropy).sum(),
            (weight * batch.lengths[:, 0].astype(jnp.float32)).sum(),
        )
    return losses, weight, jax.tree.map(jax.lax.stop_gradient, metrics)


def measure_kl(
    policy: Outputs,
    reference: Outputs,
    batch: Batch,
    *,
    mismatched: tuple[Outputs, Outputs],
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    kl_scope: str = "global",
) -> dict[str, Float[Array, "b"]]:
    """Measure x of each mismatched response, and its weight (0 where a prompt found no partner)."""
    return {
        "x": log_ratios(*mismatched, batch.mismatched),
        "weight": jnp.asarray(batch.mismatched.weight, jnp.float32),
    }


def summarize_kl(
    measured: Mapping[str, Float[Array, "M b"]],
    weights: Float[Array, "M b"],
    carry: Any,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    kl_scope: str = "global",
) -> tuple[Float[Array, "M"], Any]:
    """Compute z₀ = max(0, mean x) over the global batch, or over each microbatch (HALOs, TRL)."""
    if kl_scope not in KL_SCOPES:
        raise ValueError(f"kl_scope must be one of {list(KL_SCOPES)}, got {kl_scope!r}")
    axes = None if kl_scope == "global" else 1
    total = (measured["x"] * measured["weight"]).sum(axis=axes)
    count = measured["weight"].sum(axis=axes)
    return jnp.broadcast_to(
        jnp.maximum(total / jnp.maximum(count, 1e-30), 0.0), (weights.shape[0],)
    ), carry


def _with_kl(
    value: Callable[[Array], Array],
    policy: Outputs,
    reference: Outputs,
    batch: Batch,
    stats: Any,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    kl_scope: str,
) -> Result:
    """Compute w · value(±β (x - z₀)), + for desirable responses."""
    if kl_scope not in KL_SCOPES:
        raise ValueError(f"kl_scope must be one of {list(KL_SCOPES)}, got {kl_scope!r}")
    if stats is None:
        raise ValueError(
            "kto needs stats, the KL estimate of the whole batch: call measure and summarize first"
        )
    x, label = log_ratios(policy, reference, batch), _labels(batch)
    z = beta * (x - stats)
    losses = jnp.where(label, desirable_weight * value(z), undesirable_weight * value(-z))
    return _finish(losses, x, beta, beta * stats, policy, batch, {"kl": stats})


def kto(
    policy: Outputs,
    reference: Outputs,
    batch: Batch,
    *,
    stats: Any = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    kl_scope: str = "global",
) -> Result:
    """Compute the KTO loss.

        desirable:   w_D (1 - σ(β (x - z₀)))
        undesirable: w_U (1 - σ(β (z₀ - x)))

    Args:
        policy: the policy's outputs, R = 1.
        reference: the reference's.
        batch: the batch, with ``label`` and ``mismatched``.
        stats: z₀, nats.
        beta: per nat.
        desirable_weight: w_D.
        undesirable_weight: w_U; see ``balance_warning``.
        kl_scope: z₀ over the "global" batch, or over each "microbatch" as HALOs and TRL have it.

    Returns:
        Losses [B] (1/2 w where the policy is the reference), weights [B], metrics.

    References:
        Ethayarajh et al. 2024, arXiv 2402.01306, equations 7 and 8.

    >>> from align_jax.losses import jitted
    >>> run = jitted("kto", beta=0.5)
    >>> found = run([-8.0, -9.0], [True, False], [-10.0, -9.0],
    ...             mismatched_policy=[-5.0, -4.0], mismatched_reference=[-6.0, -4.0])
    >>> [round(x, 4) for x in found.losses.tolist()], round(float(found.metrics["kl"]), 4)
    ([0.3208, 0.4378], 0.5)
    """
    return _with_kl(
        lambda z: sigmoid(-z),
        policy,
        reference,
        batch,
        stats,
        beta,
        desirable_weight,
        undesirable_weight,
        kl_scope,
    )


def kto_logsigmoid(
    policy: Outputs,
    reference: Outputs,
    batch: Batch,
    *,
    stats: Any = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    kl_scope: str = "global",
) -> Result:
    """Compute KTO with a logistic loss in place of the bounded value: w_D (-log σ(β (x - z₀))) and
    its mirror.

    References:
        Ethayarajh et al. 2024, arXiv 2402.01306: an ablation of the value function.

    >>> from align_jax.losses import jitted
    >>> found = jitted("kto_logsigmoid", beta=0.5)([-8.0, -9.0], [True, False], [-10.0, -9.0],
    ...     mismatched_policy=[-5.0, -4.0], mismatched_reference=[-6.0, -4.0])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [0.3869, 0.5759]
    """
    return _with_kl(
        lambda z: -log_sigmoid(z),
        policy,
        reference,
        batch,
        stats,
        beta,
        desirable_weight,
        undesirable_weight,
        kl_scope,
    )


def kto_zero(
    policy: Outputs,
    reference: Outputs,
    batch: Batch,
    *,
    stats: Any = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Result:
    """Compute KTO with z₀ = 0, which needs no mismatched responses: w_D (1 - σ(β x)), w_U (1 - σ(-β
    x)).

    References:
        Ethayarajh et al. 2024, arXiv 2402.01306: an ablation of the reference point.

    >>> from align_jax.losses import jitted
    >>> found = jitted("kto_zero", beta=0.5)([-8.0, -9.0], [True, False], [-10.0, -9.0])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [0.2689, 0.5]
    """
    x, label = log_ratios(policy, reference, batch), _labels(batch)
    losses = jnp.where(
        label, desirable_weight * sigmoid(-beta * x), undesirable_weight * sigmoid(beta * x)
    )
    return _finish(losses, x, beta, jnp.zeros(()), policy, batch, {})


def apo_zero_unpaired(
    policy: Outputs,
    reference: Outputs,
    batch: Batch,
    *,
    stats: Any = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Result:
    """Compute APO-zero on unpaired feedback: w_D (1 - σ(β x)), w_U σ(β x).

    The same numbers as ``kto_zero``, under the name that TRL gives them.

    References:
        D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7, each side by itself.

    >>> from align_jax.losses import jitted
    >>> found = jitted("apo_zero_unpaired", beta=0.5)([-8.0, -9.0], [True, False], [-10.0, -9.0])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [0.2689, 0.5]
    """
    return kto_zero(
        policy,
        reference,
        batch,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )


BCO_CARRY = {"mean": 0.0, "count": 0.0}  # of β x over all batches so far


def measure_rewards(
    policy: Outputs,
    reference: Outputs,
    batch: Batch,
    *,
    mismatched: Any = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> dict[str, Float[Array, "b"]]:
    """Measure β x."""
    return {"reward": beta * log_ratios(policy, reference, batch)}


def summarize_rewards(
    measured: Mapping[str, Float[Array, "M b"]],
    weights: Float[Array, "M b"],
    carry: Any,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Float[Array, "M"], Any]:
    """Update the running mean of the rewards with this batch, and hand it out."""
    count = jnp.asarray(carry["count"], jnp.float32) + weights.sum()
    before = jnp.asarray(carry["mean"], jnp.float32)
    mean = before + (weights * (measured["reward"] - before)).sum() / jnp.maximum(count, 1e-30)
    return jnp.broadcast_to(mean, (weights.shape[0],)), {"mean": mean, "count": count}


def bco(
    policy: Outputs,
    reference: Outputs,
    batch: Batch,
    *,
    stats: Any = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Result:
    """Compute binary classifier optimization with a reward shift.

        desirable: -w_D log σ(β x - δ),    undesirable: -w_U log σ(-(β x - δ)),    δ = running mean of β x

    δ is the mean over all responses seen, this batch's included, without gradient; it is carried in
    the train state.

    References:
        Jung et al. 2024, arXiv 2404.04656: the reward shift.

    >>> from align_jax.losses import jitted
    >>> found = jitted("bco", beta=0.5)([-8.0, -9.0], [True, False], [-10.0, -9.0])
    >>> [round(x, 4) for x in found.losses.tolist()], round(float(found.metrics["delta"]), 4)
    ([0.4741, 0.4741], 0.5)
    """
    if stats is None:
        raise ValueError(
            "bco needs stats, the running mean of the rewards: call measure and summarize first"
        )
    x, label = log_ratios(policy, reference, batch), _labels(batch)
    z = beta * x - stats
    losses = jnp.where(
        label, -desirable_weight * log_sigmoid(z), -undesirable_weight * log_sigmoid(-z)
    )
    return _finish(losses, x, beta, stats, policy, batch, {"delta": stats})
