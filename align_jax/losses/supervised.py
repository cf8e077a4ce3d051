# SPDX-License-Identifier: Apache-2.0
"""Supervised objectives: fine-tuning on responses, and reward models on a score head."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Float

from align_jax.core.schema import Batch, Outputs
from align_jax.losses.logprobs import sum_by_slot
from align_jax.losses.objective import Metrics

PER = ("token", "sequence")


def _token_losses(
    policy: Outputs, batch: Batch, per: str, dft: bool, responses: slice
) -> tuple[Float[Array, "B"], Float[Array, "B"], Metrics]:
    """Compute negative log-likelihoods of some of each group's responses."""
    if per not in PER:
        raise ValueError(f"sft: per must be one of {list(PER)}, got {per!r}")
    weight = jnp.asarray(batch.weight, jnp.float32)
    counts = batch.lengths[:, responses].astype(jnp.float32)  # [B, r]
    logps = policy.logps[:, responses]
    token_losses = -policy.token_logps
    if dft:
        token_losses = token_losses * jax.lax.stop_gradient(jnp.exp(policy.token_logps))
    sums = sum_by_slot(token_losses, batch)[:, responses]  # [B, r]
    tokens = counts.sum(axis=1)
    if per == "token":
        losses, weights = sums.sum(axis=1) / jnp.maximum(tokens, 1.0), weight * tokens
    else:
        losses, weights = (sums / jnp.maximum(counts, 1.0)).mean(axis=1), weight
    total = (weight * tokens).sum()
    metrics = {"nll": (jax.lax.stop_gradient(-(weight[:, None] * logps).sum()), total)}
    if policy.entropy is not None:
        entropy = sum_by_slot(policy.entropy, batch)[:, responses]
        metrics["entropy"] = (jax.lax.stop_gradient((weight[:, None] * entropy).sum()), total)
    return losses, weights, metrics


def sft(
    policy: Outputs,
    reference: Outputs | None,
    batch: Batch,
    *,
    stats: Any = None,
    per: str = "token",
    dft: bool = False,
) -> tuple[Float[Array, "B"], Float[Array, "B"], Metrics]:
    """Compute the negative log-likelihood of each group's first response: of a pair, the chosen
    one.

        per token:    Σ_i Σ_t -m_it a_it / Σ_i n_i, over the global batch
        per sequence: the mean over i of Σ_t -m_it a_it / n_i
        dft:          each token's loss times sg(exp a_it)

    Args:
        policy: the policy's outputs.
        reference: not used.
        batch: the batch.
        stats: not used.
        per: "token" (every token counts the same) or "sequence" (every response counts the same).
        dft: dynamic fine-tuning.

    Returns:
        Losses [B] in nats a token, weights [B] (token counts, or the groups' weights), metrics.

    References:
        dft: Wu et al. 2025, arXiv 2508.05629, the DFT loss.

    >>> from align_jax.losses import jitted
    >>> found = jitted("sft")([[-1.0, -3.0], [-2.0, 0.0]], mask=[[True, True], [True, False]])
    >>> found.losses.tolist(), found.weights.tolist(), float(found.loss)
    ([2.0, 2.0], [2.0, 1.0], 2.0)
    """
    return _token_losses(policy, batch, per, dft, slice(0, 1))


def csft(
    policy: Outputs,
    reference: Outputs | None,
    batch: Batch,
    *,
    stats: Any = None,
    per: str = "token",
) -> tuple[Float[Array, "B"], Float[Array, "B"], Metrics]:
    """Compute conditional fine-tuning: ``sft`` on all of a group's responses, each after its
    control token.

    The data layer writes the control tokens; sampling later conditions on the one for chosen
    responses.

    References:
        Korbak et al. 2023, arXiv 2302.08582, section 2 (conditional training); HALOs
        ``config/loss/csft.yaml``.

    >>> from align_jax.losses import jitted
    >>> found = jitted("csft")([[-1.0, -3.0], [-2.0, -2.0]], [[-4.0, -2.0], [-1.0, -3.0]])
    >>> found.losses.tolist()
    [2.5, 2.0]
    """
    return _token_losses(policy, batch, per, False, slice(None))


def _scores(policy: Outputs) -> Float[Array, "B R"]:
    if policy.scores is None:
        raise ValueError(
            "a reward model's objective needs policy.scores [B, R], from a score "
            "head; they are None"
        )
    return policy.scores


def _score_metrics(scores: Float[Array, "B R"], real: Array, weight: Array) -> Metrics:
    """Report the lowest, mean and highest reward of each group, averaged over the groups."""
    total = weight.sum()
    count = jnp.maximum(real.astype(jnp.float32).sum(axis=1), 1.0)
    any_real = real.any(axis=1)
    low = jnp.where(any_real, jnp.where(real, scores, jnp.inf).min(axis=1), 0.0)
    high = jnp.where(any_real, jnp.where(real, scores, -jnp.inf).max(axis=1), 0.0)
    values = {
        "min_reward": low,
        "mean_reward": jnp.where(real, scores, 0.0).sum(axis=1) / count,
        "max_reward": high,
    }
    return {
        name: (jax.lax.stop_gradient((weight * value).sum()), total)
        for name, value in values.items()
    }


def reward(
    policy: Outputs,
    reference: Outputs | None,
    batch: Batch,
    *,
    stats: Any = None,
    center_coef: float = 0.0,
) -> tuple[Float[Array, "B"], Float[Array, "B"], Metrics]:
    """Compute the Bradley-Terry loss of a reward model on pairs.

        -log σ(r_w - r_l - margin) + center_coef (r_w + r_l)²

    Args:
        policy: ``scores`` [B, 2], chosen first.
        reference: not used.
        batch: the batch; ``margin`` [B] in units of reward, or None.
        stats: not used.
        center_coef: keeps the rewards' mean near 0; 0.01 is advised.

    Returns:
        Losses [B], weights [B], metrics (accuracy counts strictly greater).

    References:
        Ouyang et al. 2022, arXiv 2203.02155, equation 1; margin: Touvron et al. 2023, arXiv
        2307.09288, equation 2; centring: Eisenstein et al. 2023, arXiv 2312.09244.

    >>> from align_jax.losses import jitted
    >>> [round(x, 4) for x in jitted("reward", center_coef=0.01)([[1.0, 0.0], [0.5, 0.5]]).losses.tolist()]
    [0.3233, 0.7031]
    """
    scores = _scores(policy)
    if scores.shape[1] != 2:
        raise ValueError(
            f"reward expects pairs (R = 2), got R = {scores.shape[1]}; for more use reward_ranked"
        )
    weight = jnp.asarray(batch.weight, jnp.float32)
    difference = scores[:, 0] - scores[:, 1]
    margin = (
        jnp.zeros_like(difference)
        if batch.margin is None
        else jnp.asarray(batch.margin, jnp.float32)
    )
    losses = -log_sigmoid(difference - margin) + center_coef * jnp.square(
        scores[:, 0] + scores[:, 1]
    )
    total = weight.sum()
    metrics = _score_metrics(scores, jnp.ones(scores.shape, bool), weight)
    metrics["accuracy"] = ((weight * (difference > 0).astype(jnp.float32)).sum(), total)
    metrics["margin"] = (jax.lax.stop_gradient((weight * difference).sum()), total)
    return losses, weight, metrics


FORMS = ("plackett_luce", "pairs", "best_of")


def reward_ranked(
    policy: Outputs,
    reference: Outputs | None,
    batch: Batch,
    *,
    stats: Any = None,
    form: str = "plackett_luce",
) -> tuple[Float[Array, "B"], Float[Array, "B"], Metrics]:
    """Compute a ranking loss of a reward model on K responses, the best first.

        plackett_luce: -Σ_k log softmax(r_k, ..., r_K)[k]
        pairs:         the mean over i < j of -log σ(r_i - r_j); pairs whose ``batch.scores`` are equal do not count
        best_of:       -log softmax(r_1, ..., r_K)[1]

    A response without tokens is not there: groups may hold fewer than K.

    Args:
        policy: ``scores`` [B, K].
        reference: not used.
        batch: the batch; ``scores`` [B, K], if given, tell ties.
        stats: not used.
        form: one of ``FORMS``.

    Returns:
        Losses [B], weights [B], metrics; accuracy is the share of pairs in order.

    References:
        plackett_luce: Rafailov et al. 2023, arXiv 2305.18290, equation 18; pairs: Ouyang et al.
        2022, arXiv 2203.02155, equation 1; best_of: Ziegler et al. 2019, arXiv 1909.08593, equation
        1.

    >>> from align_jax.losses import jitted
    >>> for form in ("plackett_luce", "pairs", "best_of"):
    ...     print([round(x, 4) for x in jitted("reward_ranked", form=form)([[2.0, 1.0, 0.0]]).losses.tolist()])
    [0.7209]
    [0.2512]
    [0.4076]
    """
    if form not in FORMS:
        raise ValueError(f"reward_ranked: form must be one of {list(FORMS)}, got {form!r}")
    scores = _scores(policy)
    weight = jnp.asarray(batch.weight, jnp.float32)
    real = jnp.asarray(batch.lengths) > 0
    responses = scores.shape[1]
    above = jnp.triu(jnp.ones((responses, responses), bool), 1)[None]
    ordered = above & real[:, :, None] & real[:, None, :]  # [B, K, K]: i before j
    if batch.scores is not None:
        ordered &= jnp.asarray(batch.scores)[:, :, None] != jnp.asarray(batch.scores)[:, None, :]
    difference = scores[:, :, None] - scores[:, None, :]
    pairs = ordered.astype(jnp.float32)
    count = pairs.sum(axis=(1, 2))
    if form == "pairs":
        losses = (pairs * -log_sigmoid(difference)).sum(axis=(1, 2)) / jnp.maximum(count, 1.0)
    else:
        # log-sum-exp over the responses from k on, those that are not there left out
        rest = (above | jnp.eye(responses, dtype=bool)[None]) & real[:, None, :]
        masked = jnp.where(rest, jnp.broadcast_to(scores[:, None, :], rest.shape), -1e30)
        terms = jnp.where(real, jax.nn.logsumexp(masked, axis=2) - scores, 0.0)
        losses = terms.sum(axis=1) if form == "plackett_luce" else terms[:, 0]
    correct = (pairs * (difference > 0).astype(jnp.float32)).sum(axis=(1, 2))
    metrics = _score_metrics(scores, real, weight)
    metrics["accuracy"] = ((weight * correct).sum(), (weight * count).sum())
    gap = jax.lax.stop_gradient((pairs * difference).sum(axis=(1, 2)))
    metrics["margin"] = ((weight * gap).sum(), (weight * count).sum())
    return losses, weight, metrics
