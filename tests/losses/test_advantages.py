# SPDX-License-Identifier: Apache-2.0
"""Advantages, returns and targets against loops in NumPy, and their laws."""

import jax
import jax.numpy as jnp
import loss_cases as cases
import numpy as np
import pytest

from align_jax import losses
from align_jax.losses import advantages, pairs, targets
from align_jax.losses.logprobs import sum_by_slot
from align_jax.losses.options import declared
from align_jax.losses.sampler import SamplerOptions


def packed(seed=0, rows=3, length=12):
    """Rows with two responses, the first with a gap (a tool's turn) inside."""
    rng = np.random.default_rng(seed)
    mask, slot = np.zeros((rows, length), bool), np.zeros((rows, length), np.int32)
    mask[:, 1:3], mask[:, 4:6], mask[:, 8:11] = True, True, True
    slot[:, 7:] = 1

    def draw():
        return rng.normal(size=(rows, length)).astype(np.float32)

    return draw(), draw(), mask, slot


def loop(rewards, values, mask, slot, gamma, lam):
    """Schulman et al. 1506.02438, equation 16, response by response."""
    found = np.zeros(rewards.shape)
    for n in range(len(rewards)):
        for s in np.unique(slot[n]):
            at, advantage, following = np.nonzero(mask[n] & (slot[n] == s))[0], 0.0, 0.0
            for t in at[::-1]:
                delta = rewards[n, t] + gamma * following - values[n, t]
                advantage, following = delta + gamma * lam * advantage, values[n, t]
                found[n, t] = advantage
    return found


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_equals_a_loop_in_packed_rows_with_gaps(gamma, lam):
    rewards, values, mask, slot = packed()
    expected = loop(rewards, values, mask, slot, gamma, lam)
    found, returns = advantages.gae(
        *map(jnp.asarray, (rewards, values, mask, slot)), gamma=gamma, lam=lam
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(returns, np.where(mask, expected + values, 0), rtol=1e-5, atol=1e-6)


def test_gae_at_lambda_1_is_returns_less_values_and_at_0_the_td_error():
    rewards, values, mask, slot = map(jnp.asarray, packed(1))
    found, _ = advantages.gae(rewards, values, mask, slot, gamma=0.9, lam=1.0)
    togo = advantages.discounted_sum(rewards, mask, slot, 0.9)
    np.testing.assert_allclose(found, jnp.where(mask, togo - values, 0.0), rtol=1e-5, atol=1e-5)
    found, _ = advantages.gae(rewards, values, mask, slot, gamma=0.9, lam=0.0)
    np.testing.assert_allclose(
        found, loop(*map(np.asarray, (rewards, values, mask, slot)), 0.9, 0.0), rtol=1e-5, atol=1e-6
    )


def test_gae_passes_no_gradient():
    rewards, values, mask, slot = map(jnp.asarray, packed())
    grad = jax.grad(lambda v: advantages.gae(rewards, v, mask, slot)[1].sum())(values)
    assert not grad.any()


def test_group_advantages_sum_to_zero_and_equal_scores_give_none():
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
    scores = scores.at[0].set(0.1)  # 0.1 is not exact: its mean is rounded
    for scale in advantages.SCALES:
        found = advantages.group_advantages(scores, scale=scale)
        np.testing.assert_allclose(found.sum(1), 0.0, atol=2e-6)
        assert not found[0].any() and found[1:].all()
    expected = (scores - scores.mean(1, keepdims=True)) / (
        np.std(scores, axis=1, ddof=1, keepdims=True) + 1e-4
    )
    np.testing.assert_allclose(advantages.group_advantages(scores)[1:], expected[1:], rtol=1e-5)
    np.testing.assert_allclose(advantages.leave_one_out(scores).sum(1), 0.0, atol=2e-6)
    for r in range(4):
        others = np.delete(np.asarray(scores), r, axis=1).mean(1)
        np.testing.assert_allclose(
            advantages.leave_one_out(scores)[:, r], scores[:, r] - others, rtol=1e-5, atol=1e-6
        )
    with pytest.raises(ValueError, match="R >= 2"):
        advantages.group_advantages(jnp.zeros((3, 1)))


def test_kl_estimators_agree_in_the_mean():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
    ratio = jnp.asarray(np.log(p / q), jnp.float32)
    exact = (p * np.log(p / q)).sum()
    for kind in ("k1", "k3"):
        np.testing.assert_allclose(
            (p * np.asarray(advantages.kl_estimate(ratio, kind))).sum(), exact, rtol=1e-5
        )
    assert (advantages.kl_estimate(ratio, "k3") >= 0).all()


def test_adaptive_coefficient_moves_towards_the_target():
    def coef(kl):
        return float(
            advantages.adaptive_kl_coef(jnp.float32(0.1), jnp.float32(kl), 100, target=6.0)
        )

    assert (
        coef(12.0) > 0.1 > coef(3.0)
        and coef(6.0) == pytest.approx(0.1)
        and coef(1e6) == pytest.approx(0.1002)
    )


def test_running_moments_equal_those_of_all_scores():
    rng, running, seen = np.random.default_rng(0), advantages.FIRST_MOMENTS, []
    for size in (3, 5, 2):
        batch = rng.normal(2.0, 3.0, (size, 2)).astype(np.float32)
        seen.append(batch)
        found, running = advantages.normalize_scores(jnp.asarray(batch), running, clip=1.5)
        every = np.concatenate(seen)
        np.testing.assert_allclose(running["mean"], every.mean(), rtol=1e-5)
        np.testing.assert_allclose(running["variance"], every.var(), rtol=1e-5)
        expected = np.clip((batch - every.mean()) / np.sqrt(every.var() + 1e-8), -1.5, 1.5)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def rollout(groups=4):
    batch = cases.make_batch("rollout", groups)
    reference = jnp.where(batch.loss_mask, batch.old_token_logps - 0.3, 0.0)
    return batch._replace(advantages=None, returns=None), reference


def test_targets_of_each_method():
    batch, reference = rollout()
    counts, scores = np.asarray(batch.lengths, np.float32), np.asarray(batch.scores)
    totals = scores - 0.1 * 0.3 * counts  # the KL of every token is 0.3

    def per(batch):
        return sum_by_slot(batch.advantages, batch) / counts

    found, metrics = targets.make_targets(
        batch, reference_token_logps=reference, advantages="leave_one_out", kl_coef=0.1
    )
    np.testing.assert_allclose(
        per(found), advantages.leave_one_out(jnp.asarray(totals)), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        metrics["objective/kl"][0] / metrics["objective/kl"][1], 0.3 * counts.mean(), rtol=1e-5
    )
    np.testing.assert_allclose(metrics["objective/rlhf_reward"][0] / 4, totals.mean(), rtol=1e-4)
    found, _ = targets.make_targets(batch, advantages="group")
    np.testing.assert_allclose(
        per(found), advantages.group_advantages(batch.scores), rtol=1e-4, atol=1e-5
    )
    found, _ = targets.make_targets(batch, advantages="batch")
    np.testing.assert_allclose(per(found), scores - scores.mean(), rtol=1e-4, atol=1e-5)
    found, _ = targets.make_targets(
        batch, reference_token_logps=reference, advantages="global", kl_coef=0.1
    )
    np.testing.assert_allclose(found.advantages.sum() / counts.sum(), 0.0, atol=1e-5)
    np.testing.assert_allclose((found.advantages**2).sum() / counts.sum(), 1.0, rtol=1e-4)
    found, _ = targets.make_targets(
        batch, reference_token_logps=reference, advantages="gae", kl_coef=0.1
    )
    expected, returns = advantages.gae(
        advantages.token_rewards(
            batch.scores.reshape(-1, 1),
            jnp.where(batch.loss_mask, 0.3, 0.0),
            batch.loss_mask,
            batch.slot,
            kl_coef=0.1,
        ),
        batch.old_values,
        batch.loss_mask,
        batch.slot,
    )
    np.testing.assert_allclose(found.advantages, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.returns, returns, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"advantages": "gea"}, "advantages"),
        ({"kl_coef": 0.1}, "reference_token_logps"),
        (
            {"advantages": "group", "kl_coef": 0.1, "reference_token_logps": jnp.zeros((12, 7))},
            "beta",
        ),
    ],
)
def test_targets_name_what_is_missing(options, words):
    with pytest.raises(ValueError, match=words):
        targets.make_targets(rollout()[0], **options)


@pytest.mark.parametrize("name", [name for name, row in losses.OBJECTIVES.items() if row.rollout])
def test_rollout_options_are_what_make_targets_takes(name):
    term = losses.resolve(name)[0]
    # the rollout source's own
    others = {"epochs", "minibatches", "missing_eos_penalty", "kl_target", "kl_horizon"}
    others |= declared(SamplerOptions).keys()
    batch, reference = rollout()
    options = {key: value for key, value in term.rollout.items() if key not in others}
    found, _ = targets.make_targets(batch, reference_token_logps=reference, **options)
    assert np.isfinite(found.advantages).all() and found.advantages.any()


def test_on_policy_the_first_step_of_every_ratio_loss_has_reinforces_gradient():
    problem = cases.make_problem("ppo")
    batch = problem.batch._replace(old_token_logps=problem.policy.token_logps, label=None)
    problem = problem._replace(batch=batch)
    _, plain = cases.value_and_grad(losses.resolve("reinforce"), problem)
    for name, options in (
        ("ppo", {}),
        ("reinforce_pp", {}),
        ("grpo", {"loss_type": "dapo"}),
        ("cispo", {}),
    ):
        _, grads = cases.value_and_grad(losses.resolve(name, options), problem)
        np.testing.assert_allclose(grads["token_logps"], plain["token_logps"], rtol=1e-5, atol=1e-7)


def test_ptx_is_the_texts_own_mean_beside_the_rollouts():
    problem = cases.make_problem("ppo")
    both = cases.total(losses.resolve("ppo", {"ptx_coef": 0.5}), problem)
    alone, text = (cases.total(losses.resolve(name), problem) for name in ("ppo", "ptx"))
    np.testing.assert_allclose(both, alone + 0.5 * text, rtol=1e-5)
    mask = np.asarray(problem.batch.text.loss_mask)
    expected = -np.asarray(problem.text.token_logps)[mask].mean()
    np.testing.assert_allclose(text, expected, rtol=1e-5)
    without = problem._replace(batch=problem.batch._replace(text=None), text=None)
    np.testing.assert_array_equal(alone, cases.total(losses.resolve("ppo"), without))


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_a_kl_never_pushes_away_from_the_reference(kind):
    grid = jnp.asarray([-1e4, -100.0, -21.0, -19.0, -1.0, 0.0, 1.0, 19.0, 21.0, 100.0])
    slopes = jax.vmap(jax.grad(lambda x: advantages.kl_estimate(x, kind)))(grid)
    assert (slopes * jnp.sign(grid) >= 0).all() and jnp.isfinite(slopes).all()


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "js", "alpha"])
def test_a_clipped_divergence_never_turns_round(kind):
    grid = jnp.asarray([-1e4, -200.0, -81.0, -1.0, 0.0, 1.0, 81.0, 200.0, 1e4])
    for alpha in (0.5, 2.0):
        _, slopes = jax.jvp(
            lambda x, a=alpha: pairs.transform(x, kind, a), (grid,), (grid * 0 + 1,)
        )
        assert (slopes >= 0).all() and jnp.isfinite(slopes).all()


@pytest.mark.parametrize("method", ["leave_one_out", "batch"])
def test_a_response_that_bears_no_loss_counts_with_its_score(method):
    problem = cases.make_problem("rloo", groups=2, lengths=3)
    mask = np.asarray(problem.batch.loss_mask).copy()
    mask[0] = False  # cut off, and not kept
    lengths = np.asarray(problem.batch.lengths).copy()
    lengths[0, 0] = 0
    batch = problem.batch._replace(loss_mask=jnp.asarray(mask), lengths=jnp.asarray(lengths))
    filled, found = targets.make_targets(batch, advantages=method)
    scores = np.asarray(batch.scores)
    others = (scores[0].sum() - scores[0, 1]) / 2 if method == "leave_one_out" else scores.mean()
    np.testing.assert_allclose(
        np.asarray(filled.advantages)[1][mask[1]], scores[0, 1] - others, rtol=1e-5
    )
    mean = found["objective/rlhf_reward"]
    np.testing.assert_allclose(mean[0] / mean[1], scores.mean(), rtol=1e-5)
