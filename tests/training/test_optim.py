# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from align_jax.training import optim

PARAMS = {
    "layers": {
        "mlp": {"up": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}},
        "norm": {"scale": jnp.ones(3)},
    }
}


def one_update(**options):
    optimizer = optim.make_optimizer(lambda step: 0.1, **options)
    zeros = {
        "layers": {
            "mlp": {"up": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}},
            "norm": {"scale": jnp.zeros(3)},
        }
    }
    import jax

    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(zeros, optimizer.init(PARAMS), PARAMS)
    return optax.apply_updates(PARAMS, updates)


@pytest.mark.parametrize("name", ["adamw", "lion", "rmsprop", "sgd"])
def test_decay_acts_on_matrices_and_spares_norms_and_biases(name):
    moved = one_update(name=name, weight_decay=0.5)
    np.testing.assert_allclose(moved["layers"]["mlp"]["up"]["kernel"], 0.95, rtol=1e-6)
    np.testing.assert_array_equal(moved["layers"]["mlp"]["up"]["bias"], 1.0)
    np.testing.assert_array_equal(moved["layers"]["norm"]["scale"], 1.0)


def test_a_parameter_of_unknown_name_is_an_error():
    optimizer = optim.make_optimizer(lambda step: 0.1, name="adamw", weight_decay=0.1)
    with pytest.raises(ValueError, match="'gain' must be in exactly one of"):
        optimizer.init({"gain": jnp.ones(2)})


def test_a_setting_that_an_optimizer_lacks_is_an_error():
    with pytest.raises(ValueError, match="'rmsprop' has no config.optimizer.b1"):
        optim.make_optimizer(lambda step: 0.1, name="rmsprop", b1=0.5)


def test_an_unknown_optimizer_is_told_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'adamw'"):
        optim.make_optimizer(lambda step: 0.1, name="adam")


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]),
    ],
)
def test_the_warm_up_reaches_the_peak_in_its_last_step(schedule, expected):
    rate = optim.make_schedule(learning_rate=1.0, schedule=schedule, total_steps=8, warmup_steps=4)
    np.testing.assert_allclose([float(rate(step)) for step in range(8)], expected, rtol=1e-6)


def test_a_warm_up_longer_than_the_run_is_an_error():
    with pytest.raises(ValueError, match="longer than the run"):
        optim.make_schedule(learning_rate=1.0, schedule="linear", total_steps=8, warmup_steps=9)
