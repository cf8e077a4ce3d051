# SPDX-License-Identifier: Apache-2.0
"""Optimizers: what roles say of each parameter, and where each leaf of the state lies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from align_jax.core.options import CheckpointOptions, OptimizerOptions
from align_jax.core.tree import flatten
from align_jax.models.roles import Role
from align_jax.parallel.mesh import make_mesh
from align_jax.storage.checkpoint import Checkpoints
from align_jax.training import optim
from align_jax.training.partitioning import with_shardings

# two layers of a map [D, H, h], its bias and a norm; a table and a head at the ends
SHAPES = {
    "embed": {"tokens": (16, 8)},
    "layers": {"query": {"kernel": (2, 8, 4, 2), "bias": (2, 4, 2)}, "norm": {"scale": (2, 8)}},
    "score": {"kernel": (8, 1)},
}
ROLES = {
    "embed": {"tokens": Role("embedding")},
    "layers": {
        "query": {
            "kernel": Role("linear", inputs=1, leading=1),
            "bias": Role("linear", leading=1, matrix=False),
        },
        "norm": {"scale": Role("norm", leading=1, matrix=False)},
    },
    "score": {"kernel": Role("head", inputs=1)},
}
SPECS = {
    "embed": {"tokens": PartitionSpec("tensor", "fsdp")},
    "layers": {
        "query": {
            "kernel": PartitionSpec(None, "fsdp", "tensor"),
            "bias": PartitionSpec(None, "tensor"),
        },
        "norm": {"scale": PartitionSpec()},
    },
    "score": {"kernel": PartitionSpec("fsdp")},
}


def drawn(seed):
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(draw.normal(size=shape), jnp.float32),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def make(options, rate=0.1):
    return optim.make_optimizer(options, lambda step: rate, ROLES)


def updates(optimizer, params, steps=2):
    """The last of a few steps' updates, and the state behind them."""

    @jax.jit
    def step(gradients, state):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return optimizer.update(gradients, state, params)

    state = optimizer.init(params)
    for seed in range(steps):
        found, state = step(drawn(seed + 1), state)
    return found, state


@pytest.mark.parametrize("name", ["adamw", "lion", "rmsprop", "sgd", "muon"])
def test_decay_acts_on_matrices_and_spares_norms_and_biases(name):
    ones = jax.tree.map(jnp.ones_like, drawn(0))
    optimizer = make(OptimizerOptions(name=name, weight_decay=0.5))
    zeros = jax.tree.map(jnp.zeros_like, ones)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        moved, _ = optimizer.update(zeros, optimizer.init(ones), ones)
    for path, leaf in flatten(optax.apply_updates(ones, moved)).items():
        expected = 0.95 if flatten(ROLES)[path].matrix else 1.0
        np.testing.assert_allclose(leaf, expected, rtol=1e-6, err_msg=path)


def test_a_parameter_without_a_role_is_an_error():
    for name in ("adamw", "muon"):
        with pytest.raises(ValueError, match="parameter layers/gain has no role"):
            make(OptimizerOptions(name=name)).init({"layers": {"gain": jnp.ones(2)}})
    with pytest.raises(ValueError, match="unknown part of a model 'gain'"):
        Role("gain")


def test_an_option_that_an_optimizer_lacks_is_an_error():
    with pytest.raises(ValueError, match="'rmsprop' has no config.optimizer.b1"):
        make(OptimizerOptions(name="rmsprop", b1=0.5))


def test_an_unknown_optimizer_is_told_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'adamw'"):
        make(OptimizerOptions(name="adam"))


# --------------------------------------------------------------------------------------- muon

MUON = OptimizerOptions(name="muon", weight_decay=0.02, b1=0.8, eps=1e-6, clip_norm=0.0)


def test_muon_s_updates_of_matrices_are_optax_s_and_nearly_orthogonal():
    params = drawn(0)
    found = updates(make(MUON), params)[0]["layers"]["query"]["kernel"]
    plain = optax.contrib.muon(0.1, beta=0.95, weight_decay=0.02, consistent_rms=0.2)
    for layer in range(2):  # each layer is a matrix [D, H * h] of its own

        def matrix(tree, layer=layer):
            return {"w": tree["layers"]["query"]["kernel"][layer].reshape(8, 8)}

        state = plain.init(matrix(params))
        with jax.numpy_dtype_promotion("standard"):
            for seed in (1, 2):
                expected, state = plain.update(matrix(drawn(seed)), state, matrix(params))
        got = np.asarray(found[layer]).reshape(8, 8)
        np.testing.assert_allclose(got, expected["w"], rtol=1e-4, atol=1e-6)
        direction = -(got / 0.1 + 0.02 * matrix(params)["w"]) / (0.2 * np.sqrt(8))
        # five steps bring singular values to about 1, not further (Jordan 2024)
        values = np.linalg.svd(direction, compute_uv=False)
        assert 0.3 < values.min() and values.max() < 1.3


def test_muon_leaves_all_else_to_adamw():
    params = drawn(0)
    found, expected = (
        flatten(updates(make(options), params)[0])
        for options in (
            MUON,
            OptimizerOptions(name="adamw", weight_decay=0.02, b1=0.8, eps=1e-6, clip_norm=0.0),
        )
    )
    for path in found:
        same = bool(jnp.allclose(found[path], expected[path], rtol=1e-6, atol=0))
        assert same == (path != "layers/query/kernel"), path


# ------------------------------------------------------------------------------------- its state


def labels(params):
    return {"embed": "slow", "layers": "fast", "score": "slow"}


TRANSFORMATIONS = {
    "muon": make(MUON),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=4),
    "masked": optax.masked(optax.adam(0.1), {"embed": True, "layers": False, "score": False}),
    "partitioned": optax.partition({"slow": optax.adam(0.1), "fast": optax.sgd(1.0, 0.9)}, labels),
    "injected": optax.inject_hyperparams(optax.adamw)(learning_rate=0.1, weight_decay=0.01),
    "accumulated": optax.MultiSteps(optax.adamw(0.1), 2).gradient_transformation(),
    "averaged": optax.contrib.schedule_free_adamw(0.1, warmup_steps=2),
    "noisy": optax.chain(optax.add_noise(0.1, 0.9, 0), optax.ema(0.9), optax.scale(-0.1)),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_the_state_of_any_transformation_lies_as_its_parameters(name):
    optimizer, mesh = TRANSFORMATIONS[name], make_mesh({"fsdp": 4, "tensor": 2})
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    params = jax.eval_shape(lambda: drawn(0))
    state = jax.eval_shape(optimizer.init, params)
    found = optim.state_shardings(optimizer, params, shardings, mesh)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    split = 0
    for (path, sharding), leaf in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(state)
    ):
        ends = [
            end
            for end in flatten(SPECS)
            if jax.tree_util.keystr(path, simple=True, separator="/").endswith(f"/{end}")
        ]
        own = ends and leaf.shape == flatten(params)[ends[0]].shape
        expected = flatten(shardings)[ends[0]] if own else NamedSharding(mesh, PartitionSpec())
        assert sharding == expected, path
        split += sharding.spec != PartitionSpec()
    assert split >= 1
    placed = jax.jit(optimizer.init, out_shardings=found)(jax.device_put(drawn(0), shardings))
    assert jax.tree.map(lambda x: x.sharding, placed) == found


@pytest.mark.parametrize("name", ["muon", "masked"])
def test_masked_and_partitioned_states_are_checkpointed(name, tmp_path):
    optimizer, mesh = TRANSFORMATIONS[name], make_mesh({"fsdp": 4, "tensor": 2})
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    specs = optim.state_shardings(optimizer, drawn(0), shardings, mesh)
    state = jax.device_put(updates(optimizer, drawn(0))[1], specs)
    wanted = {"opt_state": with_shardings(jax.eval_shape(lambda: state), specs)}
    with Checkpoints(tmp_path, CheckpointOptions()) as checkpoints:
        assert checkpoints.save(2, {"opt_state": state})
    with Checkpoints(tmp_path, CheckpointOptions()) as checkpoints:
        again = checkpoints.restore(wanted).state["opt_state"]
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert jax.tree.map(lambda x: x.sharding, again) == specs


# ------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]),
    ],
)
def test_the_warm_up_reaches_the_peak_in_its_last_step(schedule, expected):
    options = OptimizerOptions(learning_rate=1.0, schedule=schedule, warmup_steps=4)
    rate = optim.make_schedule(options, total_steps=8)
    np.testing.assert_allclose([float(rate(step)) for step in range(8)], expected, rtol=1e-6)


def test_a_warm_up_longer_than_the_run_is_an_error():
    with pytest.raises(ValueError, match="longer than the run"):
        optim.make_schedule(OptimizerOptions(warmup_steps=9), total_steps=8)
