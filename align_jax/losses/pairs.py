# SPDX-License-Identifier: Apache-2.0
"""What all paired objectives have in common: log-ratios, their transforms, weights and metrics.

A paired loss is a small function of a ``Pair``; ``paired`` makes a row's ``fn`` of it, which adds
the options that all share.  So a new paired objective is one function of a line or two.

    Outputs, Batch ──ld_alpha──► P, R [B] ──► x = P - R ──f_divergence──► Pair ──loss──► [B] ──wpo──► [B]
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import log_sigmoid
from jaxtyping import Array, Float

from align_jax.core.schema import Batch, Outputs
from align_jax.losses.logprobs import sum_by_slot
from align_jax.losses.objective import Metrics

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")
EXP_MAX = 80.0  # exp of more would leave float32


class Pair(NamedTuple):
    """A batch of pairs, [B] float32 each, nats and tokens.

    The log-ratios are transformed by the f-divergence; where there is no reference they are the
    policy's log-probabilities.
    """

    chosen: Float[Array, "B"]  # x_w
    rejected: Float[Array, "B"]  # x_l
    chosen_length: Float[Array, "B"]  # n_w, at least 1
    rejected_length: Float[Array, "B"]  # n_l, at least 1
    policy_chosen: Float[Array, "B"]  # P_w
    policy_rejected: Float[Array, "B"]  # P_l
    reference_chosen: Float[Array, "B"]  # R_w
    reference_rejected: Float[Array, "B"]  # R_l
    margin: Float[Array, "B"]  # in units of reward (beta · nats)


def make_pair(
    policy: Any,
    reference: Any = None,
    lengths: Any = None,
    margin: Any = None,
    *,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
) -> Pair:
    """Make a Pair of sequence log-probabilities.

    Args:
        policy: [B, 2] float, nats, chosen first.
        reference: the same; None: no reference.
        lengths: [B, 2] tokens; None: 1 each.
        margin: [B], in units of reward; None: 0.
        f_divergence: one of ``DIVERGENCES``.
        f_alpha: α of the alpha divergence.
    """
    policy = jnp.asarray(policy, jnp.float32)
    reference = jnp.zeros_like(policy) if reference is None else jnp.asarray(reference, jnp.float32)
    counts = (
        jnp.ones_like(policy)
        if lengths is None
        else jnp.maximum(jnp.asarray(lengths).astype(jnp.float32), 1.0)
    )
    x = transform(policy - reference, f_divergence, f_alpha)
    offsets = jnp.zeros_like(policy[:, 0]) if margin is None else jnp.asarray(margin, jnp.float32)
    return Pair(
        x[:, 0],
        x[:, 1],
        counts[:, 0],
        counts[:, 1],
        policy[:, 0],
        policy[:, 1],
        reference[:, 0],
        reference[:, 1],
        offsets,
    )


def example_pair(margin: float = 0.0) -> Pair:
    """Make the docstrings' two pairs: log-ratios (1, -1) and (0.5, 0.5), lengths (4, 6) and (3,
    2)."""
    return make_pair(
        [[-10.0, -12.0], [-8.0, -7.0]],
        [[-11.0, -11.0], [-8.5, -7.5]],
        [[4, 6], [3, 2]],
        [margin, margin],
    )


def transform(
    x: Float[Array, "B R"], f_divergence: str = "reverse_kl", alpha: float = 0.5
) -> Float[Array, "B R"]:
    """Apply f' of a divergence to log-ratios, before the difference.

        reverse_kl: x      forward_kl: 1 - e^(-x)      js: log 2 + log σ(x)      alpha: (e^((α-1) x) - 1) / (α - 1)

    Exponents are cut at 80, where float32 would overflow.  α = 1 is the reverse KL.

    References:
        Wang et al. 2023, arXiv 2309.16240, table 1.  The alpha divergence in the form of TRL
        1.16.0, ``dpo_trainer.py``.
    """
    if f_divergence == "reverse_kl":
        return x
    if f_divergence == "forward_kl":
        return 1.0 - jnp.exp(jnp.minimum(-x, EXP_MAX))
    if f_divergence == "js":
        return np.log(2.0).item() + log_sigmoid(x)
    if f_divergence == "alpha":
        if abs(alpha - 1.0) < 1e-6:
            return x
        return jnp.expm1(jnp.minimum((alpha - 1.0) * x, EXP_MAX)) / (alpha - 1.0)
    raise ValueError(f"unknown f_divergence {f_divergence!r}; known: {list(DIVERGENCES)}")


def shared_length_logps(
    token_logps: Float[Array, "N T"], batch: Batch, alpha: float
) -> Float[Array, "B R"]:
    """Sum log-probabilities, those beyond the shorter response's length weighed by α.

        P = Σ_{t ≤ k} a_t + α Σ_{t > k} a_t,    k = min(n_w, n_l)

    References:
        Liu et al. 2024, arXiv 2409.06411 (LD-DPO), the modified likelihood.
    """
    shared = jnp.broadcast_to(batch.lengths.min(axis=1, keepdims=True), batch.lengths.shape)
    slots = batch.lengths.size // token_logps.shape[0]
    # [N, T, S]
    belongs = (batch.slot[:, :, None] == jnp.arange(slots)[None, None]) & batch.loss_mask[
        :, :, None
    ]
    # 1 = a response's first
    order = jnp.where(belongs, jnp.cumsum(belongs.astype(jnp.int32), axis=1), 0).sum(axis=2)
    limit = jnp.take_along_axis(shared.reshape(-1, slots), batch.slot, axis=1)
    return sum_by_slot(jnp.where(order <= limit, token_logps, alpha * token_logps), batch)


def on_policy_weights(policy: Outputs, batch: Batch) -> Float[Array, "B"]:
    """Weigh pairs by how likely the policy is to write them: WPO.

        w = u_w u_l,    u = exp(mean_t [a_t - log Σ_v p_v²]),    no gradient

    References:
        Zhou et al. 2024, arXiv 2406.11827, equation 2 and section 3.2 (sampled alignment).
    """
    aligned = sum_by_slot(policy.token_logps - policy.log_sum_sq, batch)
    mean = aligned / jnp.maximum(batch.lengths.astype(jnp.float32), 1.0)
    return jax.lax.stop_gradient(jnp.exp(mean.sum(axis=1)))


def check_pairs(batch: Batch) -> None:
    """Refuse a batch whose groups are not pairs."""
    if batch.lengths.shape[1] != 2:
        raise ValueError(
            "a paired objective expects groups of R = 2 responses, got R = "
            f"{batch.lengths.shape[1]}"
        )


def pair_of(
    policy: Outputs,
    reference: Outputs | None,
    batch: Batch,
    *,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    ld_alpha: float | None = None,
) -> Pair:
    """Make the Pair of a batch: what ``paired`` hands to a loss."""
    check_pairs(batch)
    if ld_alpha is None:
        sums = [None if outputs is None else outputs.logps for outputs in (policy, reference)]
    else:
        sums = [
            None if outputs is None else shared_length_logps(outputs.token_logps, batch, ld_alpha)
            for outputs in (policy, reference)
        ]
    return make_pair(*sums, batch.lengths, batch.margin, f_divergence=f_divergence, f_alpha=f_alpha)


def pair_metrics(
    chosen_rewards: Float[Array, "B"],
    rejected_rewards: Float[Array, "B"],
    policy: Outputs,
    batch: Batch,
) -> Metrics:
    """Report rewards and log-probabilities of pairs; accuracy counts strictly greater."""
    weight = jnp.asarray(batch.weight, jnp.float32)
    total = weight.sum()
    values = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).astype(jnp.float32),
        "logps/chosen": policy.logps[:, 0],
        "logps/rejected": policy.logps[:, 1],
    }
    metrics = {
        name: (jax.lax.stop_gradient((weight * value).sum()), total)
        for name, value in values.items()
    }
    if policy.entropy is not None:
        tokens = batch.lengths.astype(jnp.float32) * weight[:, None]
        metrics["entropy"] = (
            jax.lax.stop_gradient((sum_by_slot(policy.entropy, batch) * weight[:, None]).sum()),
            tokens.sum(),
        )
    return metrics


def paired(
    loss: Callable[..., Float[Array, "B"]],
    *,
    reference: bool = True,
    divergences: bool = True,
    reward: str = "sum",
    scale: str = "beta",
) -> Callable[..., tuple[Array, Array, Metrics]]:
    """Make a row's ``fn`` of a paired loss.

    Args:
        loss: ``loss(pair, **options) -> [B]``.
        reference: adds the option ``reference_free`` (log-ratios are the policy's
            log-probabilities).
        divergences: adds ``f_divergence`` and ``f_alpha``; off for losses that use a log-ratio by
            itself, for which the transforms are not defined.
        reward: implicit reward reported, in units of beta: "sum" (log-ratio) or "mean" (log-ratio
            per token).
        scale: the option that multiplies it; 1 where the loss has none of this name.

    Returns:
        ``fn(policy, reference, batch, *, stats=None, **options)``, whose options are the loss's and
        ``ld_alpha`` (None: off) and ``wpo`` (False), and those above.
    """
    shared: dict[str, Any] = {"ld_alpha": None, "wpo": False}
    shared |= {"f_divergence": "reverse_kl", "f_alpha": 0.5} if divergences else {}
    shared |= {"reference_free": False} if reference else {}
    own = {
        name: parameter.default
        for name, parameter in inspect.signature(loss).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }

    def fn(
        policy: Outputs,
        reference: Outputs | None,
        batch: Batch,
        *,
        stats: Any = None,
        **options: Any,
    ) -> tuple[Float[Array, "B"], Float[Array, "B"], Metrics]:
        options = own | shared | options
        plain = {name: options[name] for name in own}
        kinds = {
            name: options[name]
            for name in ("f_divergence", "f_alpha", "ld_alpha")
            if name in options
        }
        pair = pair_of(policy, None if options.get("reference_free") else reference, batch, **kinds)
        losses = loss(pair, **plain)
        if options["wpo"]:
            losses = losses * on_policy_weights(policy, batch)
        # Rewards are beta · x whatever the divergence, so that curves of different objectives
        # compare.
        unit = plain.get(scale, 1.0)
        chosen = unit * (pair.policy_chosen - pair.reference_chosen)
        rejected = unit * (pair.policy_rejected - pair.reference_rejected)
        if reward == "mean":
            chosen, rejected = chosen / pair.chosen_length, rejected / pair.rejected_length
        return (
            losses,
            jnp.asarray(batch.weight, jnp.float32),
            pair_metrics(chosen, rejected, policy, batch),
        )

    keywords = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in ({"stats": None} | own | shared).items()
    ]
    positional = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        for name in ("policy", "reference", "batch")
    ]
    fn.__signature__ = inspect.Signature(positional + keywords)
    fn.__name__, fn.__doc__ = loss.__name__, loss.__doc__
    return fn
