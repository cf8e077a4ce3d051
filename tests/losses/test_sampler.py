# SPDX-License-Identifier: Apache-2.0
"""The correction for the sampler reaches every policy gradient's loss, and nothing else."""

import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases import make_problem, value_and_grad

from align_jax import losses

POLICY_GRADIENTS = [name for name, row in losses.OBJECTIVES.items() if row.rollout]


def gradients(name, ratio):
    problem = make_problem(name)
    if ratio is not None:
        ratio = jnp.where(problem.batch.loss_mask, jnp.float32(ratio), 0.0)
    problem = problem._replace(batch=problem.batch._replace(sampler_ratio=ratio))
    options = {"cov_coef": 1e-9} if name == "kl_cov" else {}  # as any KL, it is not weighed
    return value_and_grad(losses.resolve(name, options), problem)[1]


@pytest.mark.parametrize("name", POLICY_GRADIENTS)
def test_the_ratio_weighs_the_policy_s_loss(name):
    plain, twice, masked = (gradients(name, ratio) for ratio in (None, 2.0, 0.0))
    found = np.asarray(twice["token_logps"])
    if name == "vespo":  # its ratio is within a weight of the whole sequence
        assert not np.allclose(found, plain["token_logps"])
        assert np.abs(masked["token_logps"]).max() < 1e-6 < np.abs(found).max()
        return
    np.testing.assert_allclose(found, 2 * plain["token_logps"], rtol=1e-6)
    np.testing.assert_allclose(masked["token_logps"], 0, atol=1e-9)
    if "values" in plain:  # the value head learns from all of them
        np.testing.assert_array_equal(masked["values"], plain["values"])
