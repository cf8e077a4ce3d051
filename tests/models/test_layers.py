# SPDX-License-Identifier: Apache-2.0
"""The product that linear maps are made of: its gradients, and how a CPU computes the kernel's."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.interop import hf
from align_jax.models.layers import contract
from align_jax.models.model import build

# inputs, outputs of maps [N, T, *inputs] -> [N, T, *outputs]
SHAPES = {"wider": ((6,), (2, 5)), "narrower": ((3, 4), (5,)), "as wide": ((4,), (4,))}


def _gradients(product, x, kernel, dy):
    count = x.ndim - 2
    y, pull = jax.vjp(lambda x, kernel: product(x, kernel, count), x, kernel)
    return y, *pull(dy)


def _plain(x, kernel, count):
    return jnp.tensordot(x, kernel, axes=count)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_gradients_are_those_of_the_product(shapes):
    inputs, outputs = shapes
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = (2, 7, *inputs), (*inputs, *outputs), (2, 7, *outputs)
    arrays = [jax.random.normal(key, size) for key, size in zip(keys, sizes)]
    for mine, plain in zip(_gradients(contract, *arrays), _gradients(_plain, *arrays)):
        np.testing.assert_allclose(mine, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_heads_gradient_is_rounded_to_the_compute_type_before_its_products(tied):
    sizes = dict(vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    shape = dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=8)
    config = hf.config_from(dict(model_type="llama", tie_word_embeddings=tied, **sizes, **shape))
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, dy = (jax.random.normal(key, (2, 7, n)) for key, n in zip(keys, (16, 40)))
    found = {}
    for dtype in ("float32", "bfloat16"):
        model = build(config, compute_dtype=dtype, remat="none", attention="xla")
        params = jax.tree.map(lambda x: x.astype("bfloat16").astype(x.dtype), model.init(keys[2]))
        arguments = params, hidden.astype("bfloat16").astype(dtype), dy.astype("bfloat16")

        def pull(params, hidden, dy, model=model):
            return jax.vjp(model.unembed, params, hidden)[1](dy.astype(jnp.float32))

        found[dtype] = jax.tree.leaves(pull(*arguments))
        text = jax.jit(pull).lower(*arguments).as_text()
        products = [line for line in text.splitlines() if "dot_general" in line]
        assert len(products) == 2
        assert dtype == "float32" or not any("xf32>, " in line for line in products)
    for mine, plain in zip(found["bfloat16"], found["float32"]):
        np.testing.assert_allclose(mine.astype(jnp.float32), plain, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("platform, transposes", [("cpu", 0), ("tpu", 1)])
def test_a_cpu_transposes_no_gradient_wider_than_the_states(platform, transposes):
    sizes = (2, 7, 6), (6, 2, 5), (2, 7, 2, 5)
    arrays = [jnp.zeros(size) for size in sizes]
    gradients = jax.jit(functools.partial(_gradients, contract))
    text = gradients.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
    # the kernel's gradient comes as it is stored, not [*outputs, *inputs]
    assert text.count("stablehlo.transpose") == transposes
