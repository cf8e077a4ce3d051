# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a rollout bear the loss: how many, and the same however the batch is split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases import in_microbatches, make_problem, total, value_and_grad

from align_jax import losses
from align_jax.losses import covariance, token_choice
from align_jax.losses.token_choice import quantile

CHOICES = {
    "grpo": {"top_entropy_quantile": 0.3},
    "ppo": {"top_entropy_quantile": 0.3, "entropy_coef": 0.1},
    "clip_cov": {"cov_share": 0.2, "cov_low": 0.01},
    "kl_cov": {"cov_share": 0.2},
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_choice_is_the_whole_batch_s(name):
    terms, problem = losses.resolve(name, CHOICES[name]), make_problem(name)
    weight = jnp.array([1.0, 0.0, 1.0, 1.0])  # a filler has no say
    problem = problem._replace(batch=problem.batch._replace(weight=weight))
    problem = problem._replace(reference=problem.policy)  # not read, but split
    whole = total(terms, problem)
    np.testing.assert_allclose(whole, in_microbatches(terms, problem, 4), rtol=1e-5)
    filler = jax.tree.map(jnp.asarray, problem.batch.advantages).at[3:6].set(9.0)
    other = problem._replace(batch=problem.batch._replace(advantages=filler))
    np.testing.assert_allclose(total(terms, other), whole, rtol=1e-5)


def test_those_of_the_highest_entropy_alone_have_a_gradient():
    problem = make_problem("reinforce")
    terms = losses.resolve("reinforce", {"top_entropy_quantile": 0.25})
    grads = np.asarray(value_and_grad(terms, problem)[1]["token_logps"])
    mask, entropy = np.asarray(problem.batch.loss_mask), np.asarray(problem.policy.entropy)
    chosen = mask & (entropy >= np.quantile(entropy[mask], 0.75))
    np.testing.assert_array_equal(grads != 0, chosen)
    assert not losses.needs_statistics(losses.resolve("reinforce"))
    assert losses.resolve("reinforce")[0].needs == ()


def test_clip_cov_draws_so_many_of_those_within_its_bounds():
    problem = make_problem("clip_cov", groups=32)
    loss = covariance.ClipCov(cov_share=0.03, cov_low=0.05, cov_high=2.0)
    found = {name: x[None] for name, x in loss.batch_statistics(problem).items()}
    chosen = np.asarray(loss.reduce_statistics(found, problem.batch.weight[None], {})[0]) > 0
    counted = np.asarray(token_choice.counted_tokens(problem.batch))
    a, b = (np.where(counted, x, 0) for x in (problem.policy.token_logps, problem.batch.advantages))
    cov = (a - a.sum() / counted.sum()) * (b - b.sum() / counted.sum())
    assert chosen.sum() == int(0.03 * counted.sum())
    able = np.asarray(found["able"][0]) & (cov >= 0.05) & (cov <= 2.0)
    assert not (chosen[0] & ~able).any() and able.sum() > 2 * chosen.sum()
    # by chance: neither the first ones nor the greatest
    draws = np.asarray(found["draws"][0])[counted] / 2**24
    assert abs(draws.mean() - 0.5) < 0.05 and abs(draws.std() - 12**-0.5) < 0.05


def test_quantiles_are_those_of_what_is_counted():
    x = np.random.default_rng(0).normal(size=40).astype(np.float32)
    counted = np.arange(40) % 3 > 0
    for q in (0.0, 0.2, 0.5, 0.77, 1.0):
        found = quantile(jnp.asarray(x), jnp.asarray(counted), q)
        np.testing.assert_allclose(found, np.quantile(x[counted], q), rtol=1e-6)
