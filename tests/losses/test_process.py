# SPDX-License-Identifier: Apache-2.0
"""Rewards at the ends of steps, by hand: GRPO's process form, rewards to go, token rewards."""

import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.losses import process, targets
from align_jax.losses.arrays import make_batch

NAN = float("nan")
# two groups of two responses: 2 steps and 1; 1 and none
REWARDS = np.float32([[[1.0, 0.0, NAN], [0.5, NAN, NAN]], [[0.25, NAN, NAN], [NAN, NAN, NAN]]])
# five tokens each: steps end at tokens 1 and 3; 2; 4; nowhere
ENDED = np.int32([[0, 0, 1, 1, 2], [0, 0, 0, 1, 1], [0] * 5, [0] * 5])
AT_ENDS = np.float32([[0, 1, 0, 0, 0], [0, 0, 0.5, 0, 0], [0, 0, 0, 0, 0.25], [0] * 5])
STEPS = process.Steps(REWARDS, ENDED, AT_ENDS)


def rollout(**fields):
    batch, _ = make_batch(jnp.zeros((4, 5)), responses=2)
    zeros = np.zeros((4, 5), np.float32)
    return batch._replace(scores=np.zeros((2, 2), np.float32), old_token_logps=zeros, **fields)


def found(method, scores=None, **options):
    batch = rollout(old_values=np.full((4, 5), 0.5, np.float32))
    if scores is not None:
        batch = batch._replace(scores=np.float32(scores))
    extras = targets.Extras(steps=STEPS, log_sum_sq=np.zeros((4, 5), np.float32))
    filled, metrics = targets.make_targets(batch, advantages=method, extras=extras, **options)
    return np.asarray(filled.advantages), np.asarray(filled.returns), metrics


def test_grpo_adds_up_the_normalized_rewards_of_the_steps_that_end_at_or_after_a_token():
    # of group 0: mean 0.5, sample std 0.5; group 1 has one step: equal to its mean
    one = 0.5 / (0.5 + 1e-4)
    expected = np.zeros((4, 5))
    expected[0] = [0, 0, -one, -one, 0]  # +one - one before the first end, then -one
    np.testing.assert_allclose(found("group")[0], expected, atol=1e-6)
    # all steps of the batch: 1, 0, 0.5, 0.25
    scaled = 0.5 / (np.std([1, 0, 0.5, 0.25], ddof=1) + 1e-4)
    got = found("group", scale="batch")[0]
    np.testing.assert_allclose(got[0], [0, 0, -scaled, -scaled, 0], atol=1e-6)
    np.testing.assert_allclose(found("group", scale="none")[0][0], [0, 0, -0.5, -0.5, 0], atol=1e-6)


def test_what_whole_responses_are_worth_is_added():
    together, _, metrics = found("group", scores=[[1, 0], [0, 0]], scale="none")
    np.testing.assert_allclose(together[0], [0.5, 0.5, 0, 0, 0.5], atol=1e-6)
    np.testing.assert_allclose(together[1], [-0.5] * 5, atol=1e-6)
    total, weight = metrics["objective/scores"]
    assert total / weight == pytest.approx((2 + 0.5 + 0.25 + 0) / 4)


@pytest.mark.parametrize(
    "method,expected",
    [
        # to go 1, 0 and 0.5, 0; 0.25, 0 and 0: less the other's after as many steps
        ("leave_one_out", [[0.5, 0.5, 0, 0, 0], [-0.5] * 3 + [0] * 2, [0.25] * 5, [-0.25] * 5]),
        # the batch's mean is 1.75 / 4 before the first step's end, 0 after it
        (
            "batch",
            [[0.5625, 0.5625, 0, 0, 0], [0.0625] * 3 + [0] * 2, [-0.1875] * 5, [-0.4375] * 5],
        ),
    ],
)
def test_other_methods_take_the_mean_after_as_many_steps_off_the_rewards_to_go(method, expected):
    np.testing.assert_allclose(found(method)[0], expected, atol=1e-6)


def test_reinforce_pp_with_baseline_normalizes_them_over_all_tokens():
    plain = np.asarray(process.less_mean(jnp.asarray(REWARDS), "group"))
    assert plain[0, :, 0].tolist() == [0.25, -0.25] and not plain[:, :, 1:].any()
    got = found("group_global")[0]
    assert abs(got.mean()) < 1e-6 and got.std() == pytest.approx(1.0, abs=1e-4)
    assert got[0, 0] > got[0, 4] > got[1, 0] and got[0, 4] == got[1, 4]


def test_methods_of_token_rewards_find_them_at_the_ends():
    advantages, returns, _ = found("gae", lam=1.0)
    togo = np.flip(np.cumsum(np.flip(AT_ENDS, 1), 1), 1)
    np.testing.assert_allclose(returns, togo, atol=1e-6)
    np.testing.assert_allclose(advantages, togo - 0.5, atol=1e-6)
    normal, togo_too, _ = found("global")
    np.testing.assert_allclose(togo_too, togo, atol=1e-6)
    np.testing.assert_allclose(normal, (togo - togo.mean()) / togo.std(), atol=1e-4)


def test_a_method_that_does_not_look_at_steps_refuses_them():
    with pytest.raises(ValueError, match="'greedy' do not look at steps.*gae"):
        targets.make_targets(
            rollout(),
            advantages="greedy",
            extras=targets.Extras(greedy_score=np.zeros(2, np.float32), steps=STEPS),
        )
