# SPDX-License-Identifier: Apache-2.0
"""What the step spec asks for is what the step does: temperature, dropout, load balancing, the
reference's mix."""

import functools
import math

import jax
import numpy as np
import pytest

from align_jax.parallel.sharding import put_batch
from align_jax.training import initialize, steps

# one compiled step serves the tests of dropout, load balancing and mix
EVERYTHING = dict(
    model="experts", rank=2, microbatches=2, dropout=0.5, sync_every_steps=2, mix=0.25, steps=1
)


def shaken(tree, seed):
    """The same weights with noise, so that an adapter does something."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (x + 0.1 * draw.normal(size=x.shape)).astype(x.dtype), tree)


def twins(batch, weights):
    """Each group twice: with two microbatches once in each, of these weights."""

    def twice(x):
        groups = x.reshape(batch.weight.size, -1, *x.shape[1:])
        return np.repeat(groups, 2, axis=0).reshape(-1, *x.shape[1:])

    weight = np.tile(np.asarray(weights, np.float32), batch.weight.size)
    return jax.tree.map(twice, batch)._replace(weight=weight)


@pytest.fixture(scope="module")
def take_step(train_steps, drawn_weights, make_batch, put_as):
    """Take the step of this number on a batch of twins; return the next state and the metrics."""
    _, _, step, (specs, spec, mesh, _) = train_steps("dpo", **EVERYTHING)
    options = {key: EVERYTHING[key] for key in ("dropout", "sync_every_steps", "mix")}
    frozen, trained = drawn_weights("dpo", "experts", 2, options=(), **options)
    trained = shaken(trained, 0)

    def take(number, weights):
        with jax.set_mesh(mesh):
            state = initialize.first_state(spec, specs, put_as(trained, specs.trained))
            at = {"step": np.int32(number), "reference": shaken(trained, 1)}
            at = put_as(at, {name: specs.state[name] for name in at})
            batch = put_batch(mesh, twins(make_batch(0, groups=8), weights))
            state, metrics = step(state | at, put_as(frozen, specs.frozen), batch)
            return jax.device_get((state, metrics))

    return take


def test_every_microbatch_draws_its_own_dropout(take_step):
    first, again, second = (
        take_step(0, weights)[1]["logps/chosen"] for weights in ((1, 0), (1, 0), (0, 1))
    )
    assert first == again and abs(first - second) > 1e-3


def test_every_step_draws_its_own_dropout(take_step):
    first, second = (take_step(number, (1, 1))[1]["logps/chosen"] for number in (0, 1))
    assert abs(first - second) > 1e-3


def test_the_reference_takes_mix_of_the_policy(take_step):
    before = take_step(0, (1, 1))[0]["reference"]  # the next step is not one of the second ones
    state = take_step(1, (1, 1))[0]
    expected = jax.tree.map(lambda p, r: 0.25 * p + 0.75 * r, state["params"], before)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7),
        state["reference"],
        expected,
    )


def test_microbatches_share_the_auxiliary_loss(train_steps):
    first = train_steps("dpo", **EVERYTHING)[0][0]  # policy = reference: dpo is log 2
    expected = math.log(2) + 0.02 * first["loss/load_balancing"]
    assert first["loss"] == pytest.approx(expected, abs=1e-6)


def test_the_temperature_divides_the_logits_of_policy_and_reference(
    make_step_spec, drawn_weights, make_batch
):
    spec = make_step_spec("tdpo")  # which compares whole distributions too
    frozen, trained = drawn_weights("tdpo", options=())
    trained = shaken(trained, 0)
    batch = make_batch(0)

    def measure(temperature, factor):
        def scaled(params):  # the logits are linear in this scale
            scale = params["final_norm"]["scale"] * np.float32(factor)
            return {**params, "final_norm": {"scale": scale}}

        state = steps.init_state(spec, scaled(trained))
        step = functools.partial(steps.eval_step, spec._replace(temperature=temperature))
        return jax.jit(step)(state, {"base": scaled(frozen["base"])}, batch)

    got, expected = measure(2.0, 1.0), measure(1.0, 0.5)
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, err_msg=name)
    # text beside a rollout is none of its samples
    beside = batch._replace(text=make_batch(1, responses=1))

    def of_text(temperature):
        state = steps.init_state(spec, trained)
        forwards = steps.forwards_of(spec._replace(temperature=temperature), state, frozen)
        return jax.jit(forwards.text)(trained, beside).token_logps

    np.testing.assert_array_equal(of_text(2.0), of_text(1.0))
