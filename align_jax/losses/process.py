# SPDX-License-Identifier: Apache-2.0
"""Advantages of rewards that stand at the ends of a response's steps: process rewards.

    question [ step 0 | step 1 | step 2 ]        a token's ``ended`` is 0, 1, 2 in the three steps
                    r_0      r_1      r_2        each reward at its step's last token

Methods that add up the rewards of tokens (``gae``, ``global``, ``optimal_token``) find them among
those.  For methods that give a whole response one advantage, what the steps say is added: a token's
is that of the step that it is in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from align_jax.core.schema import Batch
from align_jax.losses.advantages import SCALES

EPS = 1e-4  # added to standard deviations, as for whole responses

OF_TOKENS = ("gae", "global", "optimal_token")
OF_STEPS = ("group", "leave_one_out", "batch", "group_global")
METHODS = OF_TOKENS + OF_STEPS  # values of ``targets.Advantages`` that look at steps


class Steps(NamedTuple):
    """What a rollout's steps are worth.

    Attributes:
        rewards: [B, R, K] of each response's steps, NaN beyond its last; K is above their number.
        ended: [N, T] how many of its response's steps end before a loss token; 0 elsewhere.
        at_ends: [N, T] the rewards of the steps that end at a loss token; 0 elsewhere.
    """

    rewards: Float[Any, "B R K"]
    ended: Int[Any, "N T"]
    at_ends: Float[Any, "N T"]


def to_go(rewards: Float[Array, "B R K"]) -> Float[Array, "B R K"]:
    """Sum each response's rewards from a step on.

    >>> to_go(jnp.array([[[1.0, 2.0, jnp.nan]]])).tolist()
    [[[3.0, 2.0, 0.0]]]
    """
    known = jnp.nan_to_num(rewards)
    return jnp.flip(jnp.cumsum(jnp.flip(known, axis=2), axis=2), axis=2)


def normalized(rewards: Float[Array, "B R K"], *, scale: str = "group") -> Float[Array, "B R K"]:
    """Compute GRPO's advantages of steps: the normalized rewards from each step on, added up.

        r̃ = (r - mean r) / (std r + eps),    A_k = Σ_{j ≥ k} r̃_j

    The mean is over all steps of the group's responses; the standard deviation is the sample's, as
    for whole responses.  Where all steps of a group have the same reward they give nothing.

    Args:
        rewards: [B, R, K], NaN where there is no step.
        scale: the standard deviation of the "group", of the "batch", or "none".

    References:
        Shao et al. 2024, arXiv 2402.03300, section 4.1.3 (process supervision).

    >>> normalized(jnp.array([[[0.0, 1.0], [0.5, jnp.nan]]]), scale="none").tolist()
    [[[0.0, 0.5], [0.0, 0.0]]]
    """
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {list(SCALES)}, got {scale!r}")
    known = ~jnp.isnan(rewards)
    count = known.sum(axis=(1, 2), keepdims=True, dtype=jnp.float32)
    mean = jnp.nan_to_num(rewards).sum(axis=(1, 2), keepdims=True) / jnp.maximum(count, 1.0)
    least = jnp.where(known, rewards, jnp.inf).min(axis=(1, 2), keepdims=True)
    greatest = jnp.where(known, rewards, -jnp.inf).max(axis=(1, 2), keepdims=True)
    # equal rewards whose mean is rounded must give exactly 0, not rounding noise over eps
    gaps = jnp.where(known & (greatest > least), rewards - mean, 0.0)
    if scale != "none":
        gaps = gaps / (_deviation(rewards, gaps, scale) + EPS)
    return to_go(gaps)


def _deviation(
    rewards: Float[Array, "B R K"], gaps: Float[Array, "B R K"], scale: str
) -> Float[Array, "..."]:
    """Return the sample's standard deviation of the rewards of each group, or of the batch."""
    known = ~jnp.isnan(rewards)
    axes = (1, 2) if scale == "group" else (0, 1, 2)
    count = known.sum(axis=axes, keepdims=True, dtype=jnp.float32)
    if scale == "batch":
        mean = jnp.nan_to_num(rewards).sum() / jnp.maximum(count, 1.0)
        gaps = jnp.where(known, rewards - mean, 0.0)
    squares = jnp.square(gaps).sum(axis=axes, keepdims=True)
    return jnp.sqrt(squares / jnp.maximum(count - 1.0, 1.0))


def less_mean(rewards: Float[Array, "B R K"], over: str) -> Float[Array, "B R K"]:
    """Compute rewards to go, less the mean of other responses' after as many steps.

        A_rk = G_rk - mean_q G_qk,    G_qk = Σ_{j ≥ k} r_qj, 0 of a response with no such step

    How many steps have ended hangs on what was drawn before, so the mean is a baseline.

    Args:
        rewards: [B, R, K], NaN where there is no step.
        over: which responses q: the group's "others", all of the "group", or of the "batch".

    >>> less_mean(jnp.array([[[1.0, 1.0], [0.0, jnp.nan]]]), "others").tolist()
    [[[2.0, 1.0], [-2.0, -1.0]]]
    """
    found, responses = to_go(rewards), rewards.shape[1]
    if over == "batch":
        return found - found.mean(axis=(0, 1), keepdims=True)
    if over == "group":
        return found - found.mean(axis=1, keepdims=True)
    return found - (found.sum(axis=1, keepdims=True) - found) / max(responses - 1, 1)


def advantages(method: str, steps: Steps, batch: Batch, *, scale: str) -> Float[Array, "N T"]:
    """Compute what the steps add to the advantages of a method that gives responses one.

    Args:
        method: one of ``OF_STEPS``: "group" normalizes; "leave_one_out", "batch" and "group_global"
            take off the mean of the group's others, the batch's, the group's.
        steps: of the rollout.
        batch: its ``loss_mask``, ``slot`` and ``lengths``.
        scale: as ``normalized`` takes it.

    Returns:
        [N, T]; 0 where the loss mask is false.
    """
    rewards = jnp.asarray(steps.rewards)
    if method == "group":
        found = normalized(rewards, scale=scale)
    else:
        over = {"leave_one_out": "others", "group_global": "group"}.get(method, "batch")
        found = less_mean(rewards, over)
    rows = found.reshape(batch.tokens.shape[0], -1)  # [B, R, K] -> [N, S K]
    index = jnp.asarray(batch.slot) * found.shape[2] + steps.ended
    own = jnp.take_along_axis(rows, index, axis=1)
    return jax.lax.stop_gradient(jnp.where(batch.loss_mask, own, 0.0))
