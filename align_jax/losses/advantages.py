# SPDX-License-Identifier: Apache-2.0
"""Advantages, returns and the rewards they are made of: pure functions that the rollout and the
losses call.

    scores [B, R] ──shaping──┬──► token_rewards (less the KL) ──► rewards [N, T]
                             │                 ──► gae ──► advantages, returns [N, T]
                             └──► group_advantages / leave_one_out / batch_baseline [B, R]
                                               ──► spread_to_tokens ──► advantages [N, T]

Arrays [N, T] speak of loss tokens only: where ``mask`` is false they are 0 or ignored, and the next
token of a response is its next *loss* token, so prompts, padding and tool output between turns do
not matter.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

SCALES = ("group", "batch", "none")
ESTIMATORS = ("k1", "k2", "k3")
# log-ratios are cut here before exp: e^20 is no sensible ratio, e^89 leaves float32
RATIO_MAX = 20.0


def _next_token(
    mask: Bool[Array, "N T"], slot: Int[Array, "N T"]
) -> tuple[Int[Array, "N T"], Float[Array, "N T"]]:
    """Find the index of each response's next loss token, and whether there is one (1.0 or 0.0)."""
    length = mask.shape[1]
    indices = jnp.where(mask, jnp.arange(length, dtype=jnp.int32)[None], length)
    ahead = jax.lax.cummin(
        jnp.pad(indices[:, 1:], ((0, 0), (0, 1)), constant_values=length), axis=1, reverse=True
    )
    inside = jnp.minimum(ahead, length - 1)
    same = (ahead < length) & (jnp.take_along_axis(slot, inside, axis=1) == slot) & mask
    return inside, same.astype(jnp.float32)


def discounted_sum(
    x: Float[Array, "N T"], mask: Bool[Array, "N T"], slot: Int[Array, "N T"], discount: float
) -> Float[Array, "N T"]:
    """Compute Σ_{k ≥ t} discount^(k-t) x_k over each response's loss tokens.

    Computed by an associative scan: log T steps instead of T.

    Args:
        x: [N, T] float32.
        mask: true on loss tokens.
        slot: which of the row's responses a token belongs to.
        discount: in [0, 1].

    Returns:
        [N, T]; 0 where the mask is false.

    >>> one, slot = jnp.ones((1, 4), bool), jnp.array([[0, 0, 0, 1]])
    >>> discounted_sum(jnp.array([[0.0, 0.0, 1.0, 2.0]]), one, slot, 0.5).tolist()
    [[0.25, 0.5, 1.0, 2.0]]
    """
    _, same = _next_token(mask, slot)
    keep = jnp.where(mask, discount * same, 1.0)  # other tokens pass on what comes after them
    add = jnp.where(mask, x, 0.0)

    def combine(later: tuple[Array, Array], earlier: tuple[Array, Array]) -> tuple[Array, Array]:
        return later[0] * earlier[0], earlier[1] + earlier[0] * later[1]

    _, sums = jax.lax.associative_scan(combine, (keep, add), reverse=True, axis=1)
    return jnp.where(mask, sums, 0.0)


def gae(
    rewards: Float[Array, "N T"],
    values: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    slot: Int[Array, "N T"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    final: Float[Array, "B R"] | None = None,
) -> tuple[Float[Array, "N T"], Float[Array, "N T"]]:
    """Compute generalized advantage estimates.

        δ_t = r_t + γ V_{t+1} - V_t,    A_t = Σ_{k ≥ t} (γ λ)^(k-t) δ_k,    returns = A + V

    The value after a response's last token is 0, or what ``final`` says.  λ = 1 gives Σ γ^k r - V,
    λ = 0 gives δ.

    Args:
        rewards: [N, T], units of reward.
        values: [N, T], V of the state before token t.
        mask: true on loss tokens.
        slot: which of the row's responses a token belongs to.
        gamma: discount per token, in [0, 1].
        lam: in [0, 1].
        final: V of the state behind each response's last token; None: 0.

    Returns:
        Advantages and returns, [N, T], 0 where the mask is false, without gradient.

    References:
        Schulman et al. 2015, arXiv 1506.02438, equations 11 to 16.

    >>> one, slot = jnp.ones((1, 3), bool), jnp.zeros((1, 3), int)
    >>> rewards, values = jnp.array([[0.0, 0.0, 1.0]]), jnp.array([[0.5, 0.25, 0.5]])
    >>> advantages, returns = gae(rewards, values, one, slot, lam=0.5)
    >>> advantages.tolist(), returns.tolist()
    ([[0.0, 0.5, 0.5]], [[0.5, 0.75, 1.0]])
    """
    rewards, values = (jnp.where(mask, jax.lax.stop_gradient(x), 0.0) for x in (rewards, values))
    following, same = _next_token(mask, slot)
    after = jnp.take_along_axis(values, following, axis=1) * same
    if final is not None:
        by_slot = jax.lax.stop_gradient(final).reshape(mask.shape[0], -1)  # [B, R] -> [N, S]
        last = jnp.take_along_axis(by_slot, slot, axis=1)
        after += jnp.where(mask, last * (1.0 - same), 0.0)
    advantages = discounted_sum(rewards + gamma * after - values, mask, slot, gamma * lam)
    return advantages, jnp.where(mask, advantages + values, 0.0)


def group_advantages(
    scores: Float[Array, "B R"],
    *,
    scale: str = "group",
    eps: float = 1e-4,
    kept: Bool[Array, "B R"] | None = None,
) -> Float[Array, "B R"]:
    """Compute GRPO's advantages: scores less their group's mean, over a standard deviation.

        A_r = (s_r - mean s) / (std + eps)

    They sum to zero in each group; a group whose scores are all equal gives none.  The standard
    deviation is the sample's (R - 1), as in TRL.

    Args:
        scores: [B, R], R ≥ 2.
        scale: the standard deviation of the "group" (GRPO), of the "batch", or "none" (Dr. GRPO).
        eps: added to the standard deviation.
        kept: the responses that are compared, two or more of a group; others have 0.  None: all.

    References:
        Shao et al. 2024, arXiv 2402.03300, section 4.1; "none": Liu et al. 2025, arXiv 2503.20783.

    >>> group_advantages(jnp.array([[1.0, 0.0], [2.0, 2.0]]), scale="none").tolist()
    [[0.5, -0.5], [0.0, 0.0]]
    """
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {list(SCALES)}, got {scale!r}")
    if scores.shape[1] < 2:
        raise ValueError(f"group advantages need R >= 2 responses a prompt, got {scores.shape[1]}")
    centered = scores - scores.mean(axis=1, keepdims=True, where=kept)
    # Equal scores whose mean is rounded must give exactly 0, not rounding noise over eps.
    low = scores.min(axis=1, keepdims=True, where=kept, initial=jnp.inf)
    high = scores.max(axis=1, keepdims=True, where=kept, initial=-jnp.inf)
    centered = jnp.where(low == high, 0.0, centered)
    if kept is not None:
        centered = jnp.where(kept, centered, 0.0)
    if scale == "none":
        return centered
    axis = 1 if scale == "group" else None
    return centered / (scores.std(axis=axis, keepdims=True, ddof=1, where=kept) + eps)


def leave_one_out(scores: Float[Array, "B R"]) -> Float[Array, "B R"]:
    """Compute RLOO's advantages: each score less the mean of its group's others.

        A_r = s_r - Σ_{q ≠ r} s_q / (R - 1)

    References:
        Ahmadian et al. 2024, arXiv 2402.14740, the leave-one-out estimator.

    >>> leave_one_out(jnp.array([[1.0, 0.0, 0.5]])).tolist()
    [[0.75, -0.75, 0.0]]
    """
    responses = scores.shape[1]
    if responses < 2:
        raise ValueError(f"leave-one-out needs R >= 2 responses a prompt, got {responses}")
    return scores - (scores.sum(axis=1, keepdims=True) - scores) / (responses - 1)


def batch_baseline(scores: Float[Array, "B R"], weight: Float[Array, "B"]) -> Float[Array, "B R"]:
    """Compute REINFORCE's advantages: scores less the batch's mean.

    >>> batch_baseline(jnp.array([[1.0], [0.0]]), jnp.ones(2)).tolist()
    [[0.5], [-0.5]]
    """
    total = jnp.maximum(weight.sum() * scores.shape[1], 1e-30)
    return scores - (scores * weight[:, None]).sum() / total


def moments(
    x: Float[Array, "..."], weight: Float[Array, "..."]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Compute the weighted mean and (population) variance over everything."""
    total = jnp.maximum(weight.sum(), 1e-30)
    mean = (x * weight).sum() / total
    return mean, (jnp.square(x - mean) * weight).sum() / total


def whiten(
    x: Float[Array, "N T"],
    weight: Float[Array, "N T"],
    *,
    shift_mean: bool = True,
    eps: float = 1e-8,
) -> Float[Array, "N T"]:
    """Scale to variance 1 over the weighted entries, and to mean 0 unless ``shift_mean`` is off; 0
    where weight is 0.

    Run it on the whole global batch: over a microbatch it would depend on how the batch was split.

    >>> whiten(jnp.array([[1.0, 3.0, 9.0]]), jnp.array([[1.0, 1.0, 0.0]])).round(3).tolist()
    [[-1.0, 1.0, 0.0]]
    """
    mean, variance = moments(x, weight)
    white = (x - mean) * jax.lax.rsqrt(variance + eps)
    return jnp.where(weight > 0, white if shift_mean else white + mean, 0.0)


def kl_estimate(log_ratio: Float[Array, "..."], kind: str = "k1") -> Float[Array, "..."]:
    """Estimate KL(π || π_ref) of one sample from log π - log π_ref.

        k1 = l,    k2 = l² / 2,    k3 = e^(-l) - 1 + l

    k1 is unbiased, k3 unbiased and never negative.  In k3 a log-ratio below -20 is taken for -20 as
    a whole, in both of its places: cutting the exponent alone would turn the gradient round.

    References:
        Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html.

    >>> [round(kl_estimate(jnp.array(0.5), kind).item(), 4) for kind in ("k1", "k2", "k3")]
    [0.5, 0.125, 0.1065]
    """
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * jnp.square(log_ratio)
    if kind == "k3":
        near = jnp.maximum(log_ratio, -RATIO_MAX)
        return jnp.expm1(-near) + near
    raise ValueError(f"unknown KL estimator {kind!r}; known: {list(ESTIMATORS)}")


def token_rewards(
    scores: Float[Array, "N S"],
    log_ratio: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    slot: Int[Array, "N T"],
    *,
    kl_coef: float | Array = 0.05,
    kl_estimator: str = "k1",
) -> Float[Array, "N T"]:
    """Put each response's score on its last loss token, less the KL penalty on every token.

        r_t = -kl_coef · KL_t + [t last] · score

    Args:
        scores: [N, S], one for each of a row's response slots.
        log_ratio: [N, T] log π_old - log π_ref, nats.
        mask: true on loss tokens.
        slot: [N, T].
        kl_coef: units of reward per nat.
        kl_estimator: one of ``ESTIMATORS``.

    References:
        Ziegler et al. 2019, arXiv 1909.08593, equation 2.

    >>> one, slot = jnp.ones((1, 2), bool), jnp.zeros((1, 2), int)
    >>> token_rewards(jnp.array([[1.0]]), jnp.array([[0.0, 2.0]]), one, slot, kl_coef=0.25).tolist()
    [[0.0, 0.5]]
    """
    _, same = _next_token(mask, slot)
    last = mask & (same == 0)
    score = jnp.where(last, jnp.take_along_axis(scores, slot, axis=1), 0.0)
    return jnp.where(mask, score - kl_coef * kl_estimate(log_ratio, kl_estimator), 0.0)


def adaptive_kl_coef(
    coef: Float[Array, ""],
    kl: Float[Array, ""],
    episodes: int,
    *,
    target: float = 6.0,
    horizon: float = 10000.0,
) -> Float[Array, ""]:
    """Move the KL coefficient towards a target KL: the adaptive controller.

        coef ← coef · (1 + clip(KL / target - 1, -0.2, 0.2) · episodes / horizon)

    Args:
        coef: the coefficient now.
        kl: the batch's mean KL of a response, nats.
        episodes: responses in the batch.
        target: nats a response.
        horizon: responses.

    References:
        Ziegler et al. 2019, arXiv 1909.08593, section 2.2.

    >>> round(adaptive_kl_coef(jnp.array(0.2), jnp.array(9.0), 1000).item(), 4)
    0.204
    """
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return coef * (1.0 + error * (episodes / horizon))


def missing_eos_penalty(
    scores: Float[Array, "B R"], finished: Bool[Array, "B R"], penalty: float
) -> Float[Array, "B R"]:
    """Take a penalty from the scores of responses that did not end by themselves.

    >>> missing_eos_penalty(jnp.array([[1.0, 1.0]]), jnp.array([[True, False]]), 2.0).tolist()
    [[1.0, -1.0]]
    """
    return jnp.where(finished, scores, scores - penalty)


def overlong_penalty(
    lengths: Int[Array, "B R"], *, max_length: int, buffer: int
) -> Float[Array, "B R"]:
    """Compute DAPO's soft punishment of long responses, to be added to the scores.

        0 up to max_length - buffer tokens, then falling linearly to -1 at max_length, -1 beyond

    References:
        Yu et al. 2025, arXiv 2503.14476, equation 13.

    >>> overlong_penalty(jnp.array([[80, 95, 120]]), max_length=100, buffer=10).tolist()
    [[0.0, -0.5, -1.0]]
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"buffer must be in (0, max_length = {max_length}] tokens, got {buffer}")
    over = (lengths.astype(jnp.float32) - (max_length - buffer)) / buffer
    return jnp.clip(-over, -1.0, 0.0)


FIRST_MOMENTS = {"count": 0.0, "mean": 0.0, "variance": 0.0}


def normalize_scores(
    scores: Float[Array, "B R"],
    running: dict[str, Any],
    *,
    shift_mean: bool = True,
    clip: float | None = None,
) -> tuple[Float[Array, "B R"], dict[str, Array]]:
    """Scale scores by the running moments of all scores so far, this batch's included, and clip
    them.

    Args:
        scores: [B, R].
        running: the moments so far; ``FIRST_MOMENTS`` at first.
        shift_mean: take the running mean off as well.
        clip: in units after scaling; None: off.

    Returns:
        The scores, and the moments with these among them.

    >>> found, running = normalize_scores(jnp.array([[1.0, 3.0]]), FIRST_MOMENTS)
    >>> found.round(3).tolist(), float(running["mean"])
    ([[-1.0, 1.0]], 2.0)
    """
    before, size = jnp.asarray(running["count"], jnp.float32), float(scores.size)
    count = before + size
    gap = scores.mean() - jnp.asarray(running["mean"], jnp.float32)
    mean = running["mean"] + gap * size / count
    spread = jnp.asarray(running["variance"], jnp.float32) * before + scores.var() * size
    variance = (spread + jnp.square(gap) * before * size / count) / count
    scaled = (scores - mean if shift_mean else scores) * jax.lax.rsqrt(variance + 1e-8)
    if clip is not None:
        scaled = jnp.clip(scaled, -clip, clip)
    return scaled, {"count": count, "mean": mean, "variance": variance}
