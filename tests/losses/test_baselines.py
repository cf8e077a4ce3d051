# SPDX-License-Identifier: Apache-2.0
"""Baselines against loops in NumPy written from the papers, and against all groups of k."""

import itertools
import math

import jax.numpy as jnp
import loss_cases as cases
import numpy as np
import pytest

from align_jax import losses
from align_jax.losses import baselines, targets
from align_jax.losses.logprobs import sum_by_slot

WEIGHTS = (1.0, 0.3)


def rewards(seed=0, groups=4, responses=3):
    """Two rewards of a rollout's responses; of some the second says nothing, of one neither."""
    each = np.random.default_rng(seed).normal(size=(groups, responses, 2)).astype(np.float32)
    each[0, :, 0] = 0.1  # all equal: its mean is rounded
    each[1, 1, 1] = each[2, :2, 1] = each[3, 2] = np.nan
    return each


def gdpo(each, weights):
    """Liu et al. 2601.05242, equations 4 to 6, and TRL's nan-aware reading of them."""
    total = np.zeros(each.shape[:2])
    for b, k in itertools.product(range(len(each)), range(each.shape[2])):
        r = each[b, :, k].astype(np.float64)
        said = r[~np.isnan(r)]
        if len(said) > 1:
            total[b] += weights[k] * np.nan_to_num((r - said.mean()) / (said.std(ddof=1) + 1e-4))
    scored = ~np.isnan(each).all(2)
    every = total[scored]
    return np.where(scored, (total - every.mean()) / (every.std(ddof=1) + 1e-4), 0)


def test_gdpo_normalizes_each_reward_by_itself():
    each = rewards()
    found = baselines.decoupled(jnp.asarray(each), WEIGHTS, jnp.ones(4))
    np.testing.assert_allclose(found, gdpo(each, WEIGHTS), rtol=1e-4, atol=1e-5)
    other = each * np.array([1.0, 100.0])  # a reward's unit does not matter, but for eps
    again = baselines.decoupled(jnp.asarray(other, jnp.float32), WEIGHTS, jnp.ones(4))
    np.testing.assert_allclose(again, found, atol=1e-3)
    fewer = baselines.decoupled(jnp.asarray(each), WEIGHTS, jnp.array([1.0, 1.0, 0.0, 1.0]))
    np.testing.assert_allclose(
        np.asarray(fewer)[[0, 1, 3]], gdpo(each[[0, 1, 3]], WEIGHTS), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_mean_over_all_groups_of_k(k):
    """Chen et al. 2508.10751: a group's reward is its best; a response's advantage the mean of the
    normalized rewards of the groups that it is in."""
    size = 5
    for passed in range(size + 1):
        scores = np.array([1.0] * passed + [0.0] * (size - passed), np.float32)
        chosen = list(itertools.combinations(range(size), k))
        best = np.array([scores[list(group)].max() for group in chosen])
        std = best.std()
        expected = [
            (np.mean([x for x, group in zip(best, chosen) if i in group]) - best.mean()) / std
            if std
            else 0.0
            for i in range(size)
        ]
        found = baselines.pass_at_k(jnp.asarray(scores)[None], k=k)[0]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="from 1 to the 5"):
        baselines.pass_at_k(jnp.zeros((2, 5)), k=6)


@pytest.mark.parametrize(
    "options, kept",  # of each group, which are kept
    [
        ({"count": 2}, [[1, 2], [0, 2]]),  # a tie of lengths: the first
        ({"count": 3}, [[1, 2, 3], [0, 2, 3]]),  # one that bears no loss is kept last
        ({"count": 2, "by": "efficiency"}, [[0, 1], [2, 3]]),
        ({"count": 3, "scale": "batch"}, [[1, 2, 3], [0, 2, 3]]),
        ({"count": 2, "scale": "none"}, [[1, 2], [0, 2]]),
        ({"count": 4}, [[0, 1, 2, 3], [0, 1, 2, 3]]),
    ],
)
def test_gfpo_is_grpo_among_the_responses_that_are_kept(options, kept):
    """Shrivastava et al. 2508.09726, algorithm 1, with the deviation of TRL 1.5's GFPOTrainer:
    reward over tokens, (R - mean_S) / std_S in the kept set S, 0 outside it."""
    scores = np.array([[9.0, 2.0, 0.0, 1.0], [0.3, 5.0, 0.7, 0.7]])
    lengths = np.array([[6, 2, 2, 4], [3, 0, 3, 3]])  # a score a token: 1.5, 1, 0, 0.25; ...
    within = [scores[b, row] for b, row in enumerate(kept)]
    every = np.concatenate(within).std(ddof=1)
    expected = np.zeros_like(scores)
    for b, own in enumerate(within):
        std = {"group": own.std(ddof=1), "batch": every}.get(options.get("scale", "group"))
        expected[b, kept[b]] = (own - own.mean()) / (1.0 if std is None else std + 1e-4)
    arrays = jnp.asarray(scores, jnp.float32), jnp.asarray(lengths)
    found = baselines.filtered(*arrays, **options)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    for count in (1, 5):
        with pytest.raises(ValueError, match=f"from 2 to the 4 responses .*, got {count}"):
            baselines.filtered(*arrays, count=count)


def test_adaptive_gfpo_keeps_more_of_hard_groups():
    """Section 3.2: quarters of the groups by their mean reward keep 2, 3, 4, 4 from the easiest."""
    scores = np.array([[0, 1, 1, 2.0], [5, 5, 6, 4], [0, 0, 0, 1], [3, 2, 1, 4]])
    lengths = np.array([[1, 2, 3, 4]] * 4)
    found = np.asarray(
        baselines.filtered(jnp.float32(scores), jnp.asarray(lengths), count=2, hard=4)
    )
    for scored, k, row in zip(scores, (4, 2, 4, 3), found):
        own, std = scored[:k], scored[:k].std(ddof=1)
        np.testing.assert_allclose(row[:k], (own - own.mean()) / (std + 1e-4), atol=1e-5)
        assert not row[k:].any()


def by_hand(method, batch, totals, extras, options):
    """The papers' formulas, response by response: [B, R] of float64."""
    lengths = np.asarray(batch.lengths, np.float64)
    if method == "length_weighted":  # Hao et al. 2505.23585: E[l r] / E[l]
        return totals - ((lengths * totals).sum(1) / lengths.sum(1))[:, None]
    if method == "greedy":  # Li et al. 2310.10505: r(x, a) - r(x, greedy)
        return totals - np.asarray(extras.greedy_score)[:, None]
    if method == "group_global":  # Hu et al. 2501.03262 v9, REINFORCE++ with baseline
        gap = totals - totals.mean(1, keepdims=True)
        mean = (gap * lengths).sum() / lengths.sum()
        return (gap - mean) / np.sqrt((lengths * (gap - mean) ** 2).sum() / lengths.sum())
    if method == "filtered":  # the two shortest; see the test above
        kept = np.argsort(lengths, axis=1, kind="stable")[:, :2]
        own, found = np.take_along_axis(totals, kept, 1), np.zeros(totals.shape)
        gap = (own - own.mean(1, keepdims=True)) / (own.std(1, keepdims=True, ddof=1) + 1e-4)
        np.put_along_axis(found, kept, gap, 1)
        return found
    assert method == "pass_at_k"
    k, size = options["pass_k"], totals.shape[1]
    found = np.zeros(totals.shape)
    for b, row in enumerate(np.asarray(batch.scores)):
        failed = int((row < options["pass_score"]).sum())
        mean = 1 - math.comb(failed, k) / math.comb(size, k)
        if 0 < mean < 1:
            std = math.sqrt(mean * (1 - mean))
            other = math.comb(failed - 1, k - 1) / math.comb(size - 1, k - 1)
            found[b] = np.where(row < options["pass_score"], 1 - mean - other, 1 - mean) / std
    return found


@pytest.mark.parametrize(
    "method", ["length_weighted", "greedy", "group_global", "pass_at_k", "filtered"]
)
def test_a_rollouts_targets_are_the_papers(method):
    batch = cases.make_batch("rollout", 4)._replace(advantages=None, returns=None)
    extras = targets.Extras(greedy_score=jnp.array([0.5, -1.0, 0.0, 2.0]))
    options = {"pass_k": 2, "pass_score": 0.0} if method == "pass_at_k" else {"kl_coef": 0.1}
    options = {} if method == "filtered" else options
    reference = jnp.where(batch.loss_mask, batch.old_token_logps - 0.3, 0.0)
    found, metrics = targets.make_targets(
        batch, advantages=method, reference_token_logps=reference, extras=extras, **options
    )
    lengths = np.asarray(batch.lengths, np.float64)
    totals = np.asarray(batch.scores, np.float64) - options.get("kl_coef", 0.0) * 0.3 * lengths
    means = np.asarray(sum_by_slot(found.advantages, batch)) / lengths
    expected = by_hand(method, batch, totals, extras, options)
    np.testing.assert_allclose(means, expected, rtol=1e-4, atol=1e-5)
    assert float(metrics["objective/greedy_scores"][0]) == 1.5


def packed_rollout():
    """Two groups of three responses, in one row each, in rows of shared prompts."""
    lengths = np.array([[3, 1, 2], [2, 2, 4]])
    plain = cases.make_batch("rollout", 2, 5, lengths=lengths.reshape(-1))
    mask, slot = np.zeros((2, 12), bool), np.zeros((2, 12), np.int32)
    at = np.zeros((2, 12), np.int32)  # the token's index in the plain layout
    flat = np.asarray(plain.loss_mask)
    for b in range(2):
        t = 2
        for r, n in enumerate(lengths[b]):
            mask[b, t : t + n], slot[b, t : t + n] = True, r
            at[b, t : t + n] = (b * 3 + r) * 5 + np.flatnonzero(flat[b * 3 + r])
            t += n
    return plain, mask, slot, at


def test_the_optimal_token_baseline_is_a_loops_in_plain_and_in_packed_rows():
    """Li et al. 2602.07078: B_t = Σ G_t W_t / Σ W_t; verl's rule for a tail that is alone."""
    plain, mask, slot, at = packed_rollout()
    rng = np.random.default_rng(0)
    own = np.asarray(plain.loss_mask)
    p = rng.uniform(0.01, 0.99, own.shape)
    rest = (1 - p) ** 2 * rng.uniform(0.01, 1, own.shape)  # Σ p² of the other tokens
    logps, log_sum_sq = (np.where(own, np.log(x), 0) for x in (p, p**2 + rest))
    returns = np.where(own, rng.normal(size=own.shape), 0)
    expected = np.zeros(own.shape)
    for b in range(2):
        rows = [np.flatnonzero(own[b * 3 + r]) for r in range(3)]
        energy = [
            np.cumsum([1 - 2 * math.exp(logps[n, t]) + math.exp(log_sum_sq[n, t]) for t in row])
            for n, row in zip(range(b * 3, b * 3 + 3), rows)
        ]
        for place in range(max(map(len, rows))):
            here = [r for r in range(3) if place < len(rows[r])]
            g = np.array([returns[b * 3 + r, rows[r][place]] for r in here])
            w = np.array([energy[r][place] for r in here])
            base = (g * w).sum() / w.sum() if len(here) > 1 else 0.0
            for r, value in zip(here, g):
                expected[b * 3 + r, rows[r][place]] = value - base
    arrays = [jnp.asarray(x, jnp.float32) for x in (returns, logps, log_sum_sq)]
    found = baselines.optimal_token(*arrays, plain)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    packed = plain._replace(loss_mask=jnp.asarray(mask), slot=jnp.asarray(slot))
    laid = [jnp.where(mask, jnp.asarray(x).reshape(-1)[at], 0.0) for x in arrays]
    found = baselines.optimal_token(*laid, packed)
    np.testing.assert_allclose(
        found, np.where(mask, expected.reshape(-1)[at], 0), rtol=1e-4, atol=1e-5
    )


def test_beside_values_every_method_has_returns_for_the_critic():
    batch = cases.make_batch("rollout", 4)._replace(advantages=None, returns=None)
    found, _ = targets.make_targets(batch, advantages="batch")
    last = np.asarray(sum_by_slot(found.returns, batch)) / np.asarray(batch.lengths)
    np.testing.assert_allclose(last, batch.scores, rtol=1e-5)  # undiscounted: the score


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("grpo", {"pass_k": 3}, "pass_k = 3 has no effect with advantages = 'group'"),
        ("grpo", {"advantages": "pass_at_k", "pass_k": 0}, "at least 1"),
        ("rloo", {"advantages": "pass_at_k"}, "set kl_coef = 0"),
        ("rloo", {"advantages": "decoupled"}, "set kl_coef = 0"),
        ("grpo", {"advantages": "decoupled", "missing_eos_penalty": 1.0}, "has no effect"),
        ("grpo", {"advantages": "length_weighted", "scale": "none"}, "has no effect"),
        ("grpo", {"keep_count": 3}, "keep_count = 3 has no effect with advantages = 'group'"),
        ("rloo", {"advantages": "filtered"}, "set kl_coef = 0"),
        ("grpo", {"advantages": "filtered", "keep_count": 1}, "at least 2"),
        ("grpo", {"advantages": "filtered", "keep_hard": 2}, "more than keep_count = 2"),
    ],
)
def test_an_option_without_effect_is_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        losses.resolve(name, options)


@pytest.mark.parametrize("method, extra", targets.EXTRAS.items())
def test_targets_name_the_extra_that_is_missing(method, extra):
    batch = cases.make_batch("rollout", 2)
    with pytest.raises(ValueError, match=extra):
        targets.make_targets(batch, advantages=method)
