# SPDX-License-Identifier: Apache-2.0
"""The product that linear maps are made of: its gradients, and how a CPU computes the kernel's."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.models.layers import contract

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


@pytest.mark.parametrize("platform, transposes", [("cpu", 0), ("tpu", 1)])
def test_a_cpu_transposes_no_gradient_wider_than_the_states(platform, transposes):
    sizes = (2, 7, 6), (6, 2, 5), (2, 7, 2, 5)
    arrays = [jnp.zeros(size) for size in sizes]
    gradients = jax.jit(functools.partial(_gradients, contract))
    text = gradients.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
    # the kernel's gradient comes as it is stored, not [*outputs, *inputs]
    assert text.count("stablehlo.transpose") == transposes
