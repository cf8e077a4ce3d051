# SPDX-License-Identifier: Apache-2.0
"""What a response is compared with, beyond its group's mean: each reward by itself, the variance
that a response or a token adds, the most probable response, whether any of k passes, the group's
short ones alone.

Pure functions of a rollout's scores, which ``targets`` calls; see ``advantages`` for the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from align_jax.core.schema import Batch
from align_jax.losses.advantages import discounted_sum, group_advantages

EPS = 1e-4  # added to standard deviations, as TRL does


def decoupled(
    each_score: Float[Array, "B R K"], reward_weights: Sequence[float], weight: Float[Array, "B"]
) -> Float[Array, "B R"]:
    """Compute GDPO's advantages: each reward is normalized by itself over the group, their weighted
    sum over the batch.

        Â = Σ_k w_k (r_k - mean r_k) / (std r_k + eps),    A = (Â - mean Â) / (std Â + eps)

    The first means are over a group, the last over the batch; standard deviations are the sample's.
    A reward that said nothing of a response (NaN) adds nothing to it; a response of which none said
    anything gets 0.  One of which a whole group has the same amount adds nothing to any.

    Args:
        each_score: [B, R, K] of K rewards, unweighted.
        reward_weights: K of them.
        weight: [B] of the groups; 0 leaves a group out of the batch's mean.

    References:
        Liu et al. 2026, arXiv 2601.05242, equations 4 to 6; TRL 1.16.0,
        ``multi_objective_aggregation="normalize_then_sum"``.

    >>> each = jnp.array([[[1.0, 10.0], [0.0, 20.0]]])
    >>> [round(x, 3) for x in decoupled(each, (1.0, 0.5), jnp.ones(1))[0].tolist()]
    [0.707, -0.707]
    """
    said = ~jnp.isnan(each_score)
    scores = jnp.where(said, each_score, 0.0)
    count = said.sum(axis=1, keepdims=True, dtype=jnp.float32)
    mean = scores.sum(axis=1, keepdims=True) / jnp.maximum(count, 1.0)
    least = jnp.where(said, each_score, jnp.inf).min(axis=1, keepdims=True)
    greatest = jnp.where(said, each_score, -jnp.inf).max(axis=1, keepdims=True)
    gap = jnp.where(said & (greatest > least), scores - mean, 0.0)
    variance = jnp.square(gap).sum(axis=1, keepdims=True) / jnp.maximum(count - 1.0, 1.0)
    parts = gap / (jnp.sqrt(variance) + EPS)
    total = parts @ jnp.asarray(reward_weights, jnp.float32)
    counts = (said.any(axis=-1) & (weight > 0)[:, None]).astype(jnp.float32)
    number = counts.sum()
    centered = total - (counts * total).sum() / jnp.maximum(number, 1.0)
    spread = (counts * jnp.square(centered)).sum() / jnp.maximum(number - 1.0, 1.0)
    return counts * centered / (jnp.sqrt(spread) + EPS)


def length_weighted(scores: Float[Array, "B R"], lengths: Int[Array, "B R"]) -> Float[Array, "B R"]:
    """Compute OPO's advantages: scores less their group's mean, weighed by length.

        A_r = s_r - Σ_q l_q s_q / Σ_q l_q

    It is the baseline of least variance where the squared norm of a response's gradient grows as
    its length.  A response that bears no loss has length 0 and does not count in it.

    References:
        Hao et al. 2025, arXiv 2505.23585, equation 8 (the optimal baseline for sequences).

    >>> length_weighted(jnp.array([[1.0, 0.0]]), jnp.array([[3, 1]])).tolist()
    [[0.25, -0.75]]
    """
    weights = lengths.astype(jnp.float32)
    total = jnp.maximum(weights.sum(axis=1, keepdims=True), 1.0)
    return scores - (weights * scores).sum(axis=1, keepdims=True) / total


def pass_at_k(
    scores: Float[Array, "B R"], *, k: int, pass_score: float = 0.5
) -> Float[Array, "B R"]:
    """Compute the advantages of pass@k: how much a response adds to any of k of them passing.

    With N responses of which F fail, over all groups of k of the N:

        mean = 1 - C(F, k) / C(N, k),    std = √(mean (1 - mean))
        A = (1 - mean) / std of one that passes
        A = (1 - mean - C(F-1, k-1) / C(N-1, k-1)) / std of one that fails

    The second line's fraction is how often the other k - 1 fail too.  k = 1 is GRPO with the
    population's standard deviation.  Where every group of k passes, or none, all are 0.

    Args:
        scores: [B, R].
        k: from 1 to R.
        pass_score: a response passes from this score on.

    References:
        Chen et al. 2025, arXiv 2508.10751, section 2.3 (analytical derivation).

    >>> pass_at_k(jnp.array([[1.0, 0.0]]), k=1).tolist()
    [[1.0, -1.0]]
    """
    responses = scores.shape[1]
    if not 1 <= k <= responses:
        raise ValueError(f"pass@k needs k from 1 to the {responses} responses of a prompt, got {k}")
    passed = scores >= pass_score
    failed = (~passed).sum(axis=1, keepdims=True).astype(jnp.float32)

    def share(some: Array, every: int, count: int) -> Array:
        """C(some, count) / C(every, count)."""
        found = jnp.ones_like(some)
        for i in range(count):
            found = found * jnp.maximum(some - i, 0.0) / (every - i)
        return found

    none = share(failed, responses, k)
    std = jnp.sqrt((1.0 - none) * none)
    others = share(failed - 1.0, responses - 1, k - 1)
    found = jnp.where(passed, none, none - others) / jnp.maximum(std, 1e-20)
    return jnp.where(std > 0, found, 0.0)


def filtered(
    scores: Float[Array, "B R"],
    lengths: Int[Array, "B R"],
    *,
    count: int,
    by: str = "length",
    scale: str = "group",
    hard: int | None = None,
) -> Float[Array, "B R"]:
    """Compute GFPO's advantages: of a group only some responses are kept and compared.

        S = the k shortest, or those of most score a token
        A_r = (s_r - mean_S s) / (std_S s + eps) of r in S, 0 of the others

    k is ``count``; in the adaptive form (``hard``) it is ``count`` for the quarter of the groups of
    the greatest mean score, halfway to ``hard`` (rounded down) for the next quarter, and ``hard``
    for the others.

    They are ``group_advantages`` of what is kept, with the sample's standard deviation (as in TRL
    1.5's trainer; the paper's divides by k).  Of equal ones the first are kept.  A response
    that bears no loss has length 0 and is kept last.  The others' tokens still count in the mean
    over tokens, as in the paper.  The paper's quarters are of all prompts so far; here they are of
    this batch, the whole rollout.

    Args:
        scores: [B, R].
        lengths: [B, R] in tokens.
        count: from 2 to R; R: ``group_advantages``.
        by: "length", or "efficiency": score over length.
        scale: the standard deviation of the "group" that is kept, of all in the "batch" that are,
            or "none".
        hard: responses kept of a hard group, from ``count`` to R; None: ``count`` of each.

    References:
        Shrivastava et al. 2025, arXiv 2508.09726, section 3 and algorithm 1; adaptive: section 3.2.

    >>> scores, lengths = jnp.array([[1.0, 0.0, 1.0]]), jnp.array([[2, 3, 9]])
    >>> filtered(scores, lengths, count=2, scale="none").tolist()
    [[0.5, -0.5, 0.0]]
    """
    responses, most = scores.shape[1], count if hard is None else hard
    if not 2 <= count <= most <= responses:
        raise ValueError(
            f"GFPO keeps from 2 to the {responses} responses of a prompt, got {count} to {most}"
        )
    means = scores.mean(axis=1)
    harder = (means[None, :] < means[:, None]).mean(axis=1)  # the share of groups that are
    counts = jnp.where(harder >= 0.75, count, jnp.where(harder >= 0.5, (count + most) // 2, most))
    size = lengths.astype(jnp.float32)
    order = size if by == "length" else -scores / jnp.maximum(size, 1.0)
    order = jnp.argsort(jnp.where(size > 0, order, jnp.inf), axis=1, stable=True)
    kept = jnp.argsort(order, axis=1) < counts[:, None]  # by each one's place in the order
    return group_advantages(scores, scale=scale, kept=kept)


def optimal_token(
    returns: Float[Array, "N T"],
    token_logps: Float[Array, "N T"],
    log_sum_sq: Float[Array, "N T"],
    batch: Batch,
) -> Float[Array, "N T"]:
    """Compute the advantages of the optimal token baseline: rewards to go less, at each place in
    the response, their group's mean weighed by the variance that has come up so far.

        w_t = 1 - 2 π_t + Σ_v p_v²,    W_t = Σ_{j ≤ t} w_j
        B_t = Σ_r G_t W_t / Σ_r W_t over the group's responses with a t-th token
        A_t = G_t - B_t

    w is the squared norm of the gradient of log π with respect to the logits.  Where a response is
    the only one left, B is 0, as the authors have it.

    Args:
        returns: [N, T] rewards to go.
        token_logps: [N, T] log π_t of the policy that sampled.
        log_sum_sq: [N, T] log Σ_v p_v² of its distributions.
        batch: its ``loss_mask``, ``slot`` and ``lengths``.

    References:
        Li et al. 2026, arXiv 2602.07078; verl, ``core_algos.py``,
        ``compute_optimal_token_baseline_advantage``.

    >>> from align_jax.losses.arrays import make_batch
    >>> batch, said = make_batch(jnp.log(jnp.array([[0.5, 0.5], [0.5, 0.5]])), responses=2)
    >>> togo, flat = jnp.array([[1.0, 1.0], [0.0, 0.0]]), jnp.log(jnp.full((2, 2), 0.5))
    >>> optimal_token(togo, said.token_logps, flat, batch).tolist()
    [[0.5, 0.5], [-0.5, -0.5]]
    """
    mask, slot = jnp.asarray(batch.loss_mask), jnp.asarray(batch.slot)
    rows, length = mask.shape

    def so_far(x: Float[Array, "N T"]) -> Float[Array, "N T"]:
        """Sum a response's tokens up to each one, it included."""
        back, mask_back, slot_back = (jnp.flip(y, axis=1) for y in (x, mask, slot))
        return jnp.flip(discounted_sum(back, mask_back, slot_back, 1.0), axis=1)

    variance = 1.0 - 2.0 * jnp.exp(token_logps) + jnp.exp(log_sum_sq)
    weights = jnp.where(mask, so_far(jnp.maximum(variance, 0.0)), 0.0)
    place = jnp.maximum(so_far(jnp.ones(mask.shape, jnp.float32)).astype(jnp.int32) - 1, 0)
    groups, responses = batch.lengths.shape
    response = jnp.arange(rows)[:, None] * (batch.lengths.size // rows) + slot
    index = response // responses * length + place  # of (group, place)

    def over_group(x: Float[Array, "N T"]) -> Float[Array, "N T"]:
        """Sum over the responses of a group that have a token at the same place."""
        zeros = jnp.zeros(groups * length, jnp.float32)
        return zeros.at[index].add(jnp.where(mask, x, 0.0))[index]

    alone = over_group(mask.astype(jnp.float32)) < 2.0
    baseline = over_group(returns * weights) / jnp.maximum(over_group(weights), 1e-8)
    return jax.lax.stop_gradient(jnp.where(mask, returns - jnp.where(alone, 0.0, baseline), 0.0))
