# SPDX-License-Identifier: Apache-2.0
"""Experts: the sorted products equal the dense computation, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from align_jax.interop import hf
from align_jax.models import moe
from align_jax.models.model import build
from align_jax.parallel.mesh import make_mesh
from align_jax.parallel.sharding import tree_shardings

N, T, D, F, E, K = 8, 6, 8, 12, 4, 2


def inputs(seed=0):
    draw = np.random.default_rng(seed)
    shapes = ((N, T, D), (N, T, E), (E, D, F), (E, D, F), (E, F, D), (E, F), (E, F), (E, D))
    x, logits, *kernels = (
        jnp.asarray(0.3 * draw.normal(size=shape), jnp.float32) for shape in shapes
    )
    return x, moe.Kernels(*kernels), logits


def act(gate, up):
    return jax.nn.silu(gate) * up


def dense(x, kernels, logits):
    """Every expert on every token, weighted: what the sorted products must equal."""
    _, weights, experts = moe.route(logits, K, True)
    gate = jnp.einsum("NTD,EDF->NTEF", x, kernels.gate) + kernels.gate_bias[None, None]
    up = jnp.einsum("NTD,EDF->NTEF", x, kernels.up) + kernels.up_bias[None, None]
    every = jnp.einsum("NTEF,EFD->NTED", act(gate, up), kernels.down)
    every = every + kernels.down_bias[None, None]
    shares = jnp.sum(jax.nn.one_hot(experts, E) * weights[..., None], axis=2)
    return jnp.einsum("NTED,NTE->NTD", every, shares)


def grouped(x, kernels, logits):
    _, weights, experts = moe.route(logits, K, True)
    return moe.sharded_products(x, weights, experts, kernels, act)


def results(function, args):
    value = jax.jit(
        lambda args: (
            function(*args),
            jax.grad(lambda args: jnp.sum(jnp.sin(function(*args))))(args),
        )
    )
    return jax.tree.map(np.asarray, value(args))


@pytest.mark.parametrize(
    "sizes",
    [
        None,
        {"expert": 4, "data": 2},
        {"expert": 2, "tensor": 2, "fsdp": 2},
        {"sequence": 2, "data": 4},
    ],
    ids=str,
)
def test_sorted_products_equal_the_dense_computation(sizes):
    args = inputs()
    expected = results(dense, args)
    if sizes is None:
        got = results(grouped, args)
    else:
        with jax.set_mesh(make_mesh(sizes)):
            got = results(grouped, args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, expected)


def test_one_expert_may_get_every_token():
    x, kernels, logits = inputs()
    logits = jnp.zeros_like(logits).at[..., 0].set(50.0).at[..., 2].set(40.0)
    np.testing.assert_allclose(grouped(x, kernels, logits), dense(x, kernels, logits), atol=1e-5)


def tiny():
    config = hf.config_from(
        dict(
            model_type="mixtral",
            vocab_size=48,
            hidden_size=16,
            intermediate_size=24,
            head_dim=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=E,
            num_experts_per_tok=K,
            initializer_range=0.3,
        )
    )
    return config, build(config, compute_dtype="float32")


def fields():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 48, (N, T)), jnp.int32)
    return (
        tokens,
        jnp.ones_like(tokens).at[:, 4:].set(0),
        jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (N, T)),
    )


def test_the_mixture_is_the_same_on_a_mesh():
    _, model = tiny()
    params = model.init(jax.random.key(0))
    run = jax.jit(lambda params, *fields: model.hidden(params, *fields))
    expected, aux = run(params, *fields())
    mesh = make_mesh({"expert": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        got, sharded_aux = run(
            jax.device_put(params, tree_shardings(mesh, model.axes())), *fields()
        )
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert set(aux) == {"chosen", "probability", "tokens"}
    for name, sums in aux.items():
        np.testing.assert_allclose(sharded_aux[name], sums, rtol=1e-6)


def test_load_balancing_equals_transformers():
    logits = np.random.default_rng(0).normal(size=(2, N, T, E)).astype(np.float32)  # two layers
    mask = np.asarray(fields()[1] > 0)
    expected = load_balancing_loss_func(
        tuple(torch.tensor(layer).reshape(-1, E) for layer in logits),
        E,
        K,
        torch.tensor(mask.astype(np.int64)),
    )
    sums = []
    for layer in logits:
        probabilities, _, experts = moe.route(jnp.asarray(layer), K, True)
        sums.append(moe.balance(probabilities, experts, jnp.asarray(mask)))
    whole = jax.tree.map(lambda *leaves: sum(leaves), *sums)
    got = sum(moe.load_balancing(layer, whole) for layer in sums)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6)
