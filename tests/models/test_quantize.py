# SPDX-License-Identifier: Apache-2.0
"""The base in few bits: the numbers, the bytes, the places, and the model that runs from it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from align_jax.core.tree import flatten, unflatten
from align_jax.interop import hf
from align_jax.models.lora import LoraConfig, fold, merge
from align_jax.models.model import build
from align_jax.models.quantize import (
    BLOCK,
    METHODS,
    NF4,
    Quantized,
    product,
    quantize,
    quantized_shapes,
)
from align_jax.models.roles import Role
from align_jax.parallel.mesh import make_mesh
from align_jax.parallel.sharding import tree_shardings

SHAPE = dict(
    vocab_size=61,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


QUERY = Role("linear", inputs=1, leading=1)


def entry(kernel, method, role=QUERY, path="kernel"):
    """What quantized_shapes says of one kernel."""
    shapes, roles = unflatten({path: kernel}), unflatten({path: role})
    return flatten(quantized_shapes(shapes, method, roles))[path]


def packed(kernel, method):
    like = entry(jax.ShapeDtypeStruct(kernel.shape, kernel.dtype), method)
    return jax.jit(lambda kernel: quantize(kernel, like))(kernel)


def random(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def full(quantized):
    return np.asarray(jax.jit(lambda q: q.astype(jnp.float32))(quantized))


def filled(model, seed=0):
    """Random parameters without running an initializer."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(draw.normal(size=x.shape) * 0.3, x.dtype), model.shapes(jnp.float32)
    )


def quantized(model, base, method):
    """A base with its kernels quantized, and the same with the kernels that the codes stand for."""
    likes = flatten(quantized_shapes(jax.eval_shape(lambda: base), method, model.roles()))
    few = {
        path: packed(leaf, method) if isinstance(likes[path], Quantized) else leaf
        for path, leaf in flatten(base).items()
    }
    many = {
        path: jnp.asarray(full(leaf)) if isinstance(leaf, Quantized) else leaf
        for path, leaf in few.items()
    }
    return unflatten(few), unflatten(many)


@pytest.mark.parametrize("method, error, bits", [("int8", 0.009, 8.01), ("nf4", 0.093, 4.14)])
def test_errors_and_bytes_of_normal_weights(method, error, bits):
    kernel = random((1, 4096, 2, 8))
    few = packed(kernel, method)
    assert (
        few.shape == kernel.shape
        and few.size == kernel.size
        and few.ndim == 4
        and few.dtype == jnp.float32
    )
    assert np.sqrt(np.mean(np.square(full(few) - kernel))) < error
    assert 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(few)) / kernel.size < bits


def test_weights_that_are_nf4_values_come_back_exactly():
    draw = np.random.default_rng(1)
    values = np.asarray(NF4, np.float32)[draw.integers(0, 16, (2, 3 * BLOCK, 5))]
    values[:, ::BLOCK] = 1.0  # each block's largest
    kernel = jnp.asarray(values * np.float32(0.37))[:, :, None]
    np.testing.assert_allclose(full(packed(kernel, "nf4")), kernel, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_column_stays_zero_and_the_largest_is_kept(method):
    kernel = random((1, 2 * BLOCK, 1, 3)).at[..., 1].set(0.0)
    got = full(packed(kernel, method))
    assert (got[..., 1] == 0).all()
    np.testing.assert_allclose(np.abs(got).max(axis=1), np.abs(kernel).max(axis=1), rtol=1e-6)


def test_what_cannot_be_blocked_is_named():
    with pytest.raises(ValueError, match=r"(?s)multiple of 64.*layers/mlp/up/kernel \(2, 32, 80\)"):
        entry(jax.ShapeDtypeStruct((2, 32, 80), jnp.float32), "nf4", path="layers/mlp/up/kernel")
    with pytest.raises(ValueError, match="'int4' is unknown; did you mean 'int8'"):
        quantized_shapes({}, "int4", {})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 2])
def test_a_product_has_the_dense_gradient_and_keeps_the_codes_alone(method, count):
    shape = (BLOCK, 2, 3) if count == 1 else (2, BLOCK, 3)
    kernel = random((1, *shape))
    role = Role("linear", inputs=count, leading=1)
    like = entry(jax.ShapeDtypeStruct(kernel.shape, kernel.dtype), method, role)
    layer = jax.tree.map(lambda x: x[0], quantize(kernel, like))
    x = random((2, 5, *shape[:count]), 3)
    y, back = jax.vjp(lambda x: product(x, layer, count), x)
    dense, dense_back = jax.vjp(
        lambda x: jnp.tensordot(x, layer.astype(jnp.float32), axes=count), x
    )
    np.testing.assert_allclose(y, dense, atol=1e-5)
    np.testing.assert_allclose(back(jnp.sin(y))[0], dense_back(jnp.sin(y))[0], atol=1e-5)
    assert shape in [leaf.shape for leaf in jax.tree.leaves(dense_back)]  # what is not to happen
    assert all(leaf.shape != shape or leaf.dtype.itemsize == 1 for leaf in jax.tree.leaves(back))


@functools.cache
def models(remat="none", dora=False):
    config = hf.config_from({"model_type": "llama"} | SHAPE)
    shared = dict(compute_dtype="float32", remat=remat)
    return build(config, **shared), build(config, lora=LoraConfig(2, dora=dora), **shared)


def fields():
    tokens = np.random.default_rng(0).integers(0, 61, (8, 9)).astype(np.int32)
    positions = np.broadcast_to(np.arange(9, dtype=np.int32), tokens.shape)
    return tuple(map(jnp.asarray, (tokens, np.ones_like(tokens), positions)))


@pytest.mark.parametrize("method", METHODS)
def test_policy_and_reference_run_from_the_codes(method):
    plain, adapted = models(dora=method == "int8")
    base, stood_for = quantized(plain, filled(plain), method)
    adapter = jax.tree.map(lambda x: x + 0.05, adapted.init_adapter(jax.random.key(1), base))

    @jax.jit
    def run(base, adapter):
        def loss(adapter):
            hidden = adapted.hidden(merge(base, adapter), *fields())[0]
            return jnp.mean(jnp.square(hidden)), hidden

        gradient, hidden = jax.grad(loss, has_aux=True)(adapter)
        return plain.hidden(base, *fields())[0], hidden, gradient

    got, expected = run(base, adapter), run(stood_for, adapter)
    assert np.abs(got[0] - got[1]).max() > 0.01  # the adapter does something
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)
    folded = fold(merge(base, adapter), adapted.options.lora)
    assert not any(isinstance(leaf, Quantized) for leaf in flatten(folded).values())
    np.testing.assert_allclose(jax.jit(plain.hidden)(folded, *fields())[0], got[1], atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_codes_lie_as_the_kernel_and_are_used_where_they_lie(method):
    mesh = make_mesh({"data": 1, "fsdp": 4, "expert": 1, "sequence": 1, "tensor": 2})
    kernel = random((2, 4 * BLOCK, 2, 8))
    place = tree_shardings(mesh, {"x": ("layers", "embed", "heads", "head")})["x"]
    like = entry(jax.ShapeDtypeStruct(kernel.shape, kernel.dtype, sharding=place), method)
    assert like.codes.sharding.spec == place.spec
    shardings = jax.tree.map(lambda x: x.sharding, like)
    few = jax.jit(lambda x: quantize(x, like), out_shardings=shardings)(
        jax.device_put(kernel, place)
    )
    back = (
        jax.jit(lambda q: q.astype(jnp.float32), in_shardings=(shardings,), out_shardings=place)
        .lower(few)
        .compile()
    )
    assert not any(
        word in back.as_text() for word in ("all-gather", "all-reduce", "all-to-all", "permute")
    )
    np.testing.assert_array_equal(np.asarray(back(few)), full(packed(kernel, method)))
    wrong = NamedSharding(mesh, PartitionSpec(None, ("fsdp", "tensor")))
    if method == "nf4":
        with pytest.raises(ValueError, match=r"on a device \(2, 32, 2, 8\)"):
            entry(jax.ShapeDtypeStruct(kernel.shape, kernel.dtype, sharding=wrong), method)
