# SPDX-License-Identifier: Apache-2.0
"""Supervised objectives: fine-tuning on responses, and reward models on a score head."""
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from align_jax.core.schema import Batch, Outputs
from align_jax.losses.logprobs import sum_by_slot
from align_jax.losses.objective import Metrics

PER = ("token", "sequence")


def _token_losses(policy: Outputs, batch: Batch, per: str, dft: bool,
                  responses: slice) -> tuple[Float[Array, "B"], Float[Array, "B"], Metrics]:
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


def sft(policy: Outputs, reference: Outputs | None, batch: Batch, *, stats: Any = None, per: str = "token",
        dft: bool = False) -> tuple[Float[Array, "B"], Float[Array, "B"], Metrics]:
    """Compute the negative log-likelihood of each group's first response: of a pair, the chosen one.

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
        dft: Wu et al. 2025, arXiv 2508.05629, equation 9.

    """
    return _token_losses(policy, batch, per, dft, slice(0, 1))
