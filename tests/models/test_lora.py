# SPDX-License-Identifier: Apache-2.0
"""Adapters: in the layer, beside it, and merged into it."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.core.tree import flatten
from align_jax.interop import hf
from align_jax.models.layers import Linear
from align_jax.models.lora import LoraConfig, fold, merge
from align_jax.models.model import build
from align_jax.models.quantize import quantize, quantized_shapes
from align_jax.models.roles import Role

V, LENGTH = 61, 9
SHAPE = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
VARIANTS = {
    "plain": LoraConfig(4, alpha=8.0),
    "rank-stabilized": LoraConfig(4, alpha=8.0, rank_stabilized=True),
    "dora": LoraConfig(4, alpha=8.0, dora=True),
    "two maps": LoraConfig(3, targets="attention/output|mlp/down", dora=True),
}


def fields(seed=0, rows=2):
    tokens = np.random.default_rng(seed).integers(0, V, (rows, LENGTH)).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    return tuple(map(jnp.asarray, (tokens, np.ones_like(tokens), positions)))


def models(lora, dtype="float32", **changes):
    config = hf.config_from({"model_type": "llama"} | SHAPE | changes)
    return (
        build(config, compute_dtype=dtype, remat="none"),
        build(config, compute_dtype=dtype, remat="none", lora=lora),
    )


def filled(model, dtype=jnp.float32):
    """Random parameters without running an initializer."""
    draw = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(draw.normal(size=x.shape) * 0.3, dtype), model.shapes()
    )


def shaken(tree, seed=5, size=0.1):
    """The same tree, each leaf with noise: an adapter that does something."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(draw.normal(size=x.shape) * size, x.dtype), tree)


def hidden(model, params):
    return jax.jit(lambda params: model.hidden(params, *fields())[0])(params)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_folded_adapter_computes_what_the_layer_does(name):
    lora = VARIANTS[name]
    plain, adapted = models(lora)
    base = filled(plain)
    params = merge(base, shaken(adapted.init_adapter(jax.random.key(1), base)))
    folded = fold(params, lora)
    assert jax.tree.structure(folded) == jax.tree.structure(base)
    got, expected = hidden(plain, folded), hidden(adapted, params)
    assert np.abs(expected - hidden(plain, base)).max() > 0.01
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_a_fresh_dora_adapter_is_bit_equal_in_bfloat16_and_when_folded():
    plain, adapted = models(VARIANTS["dora"], "bfloat16")
    base = filled(plain, jnp.bfloat16)
    fresh = adapted.init_adapter(jax.random.key(1), base)
    np.testing.assert_array_equal(hidden(adapted, merge(base, fresh)), hidden(plain, base))
    for got, kept in zip(
        jax.tree.leaves(fold(merge(base, fresh), VARIANTS["dora"])), jax.tree.leaves(base)
    ):
        assert got.dtype == jnp.bfloat16 and bool((got == kept).all())


def test_scales():
    assert LoraConfig(4, alpha=8.0).scale == 2.0
    assert LoraConfig(4, alpha=8.0, rank_stabilized=True).scale == 4.0


def linear(lora):
    """One layer's map [D, F] and its parameters."""
    role = Role("linear", inputs=1)
    module = Linear((32,), (40,), ("embed", "ffn"), jnp.dtype("float32"), role, lora=lora)
    draw = np.random.default_rng(3)
    shapes = {"kernel": (32, 40), "lora_a": (32, lora.rank), "lora_b": (lora.rank, 40)} | (
        {"lora_m": (40,)} if lora.dora else {}
    )
    return module, {
        name: jnp.asarray(draw.normal(size=shape), jnp.float32) for name, shape in shapes.items()
    }


@pytest.mark.parametrize("name", ["plain", "rank-stabilized", "dora"])
def test_the_layer_is_the_papers_formula(name):
    lora = VARIANTS[name]
    module, leaves = linear(lora)
    x = np.random.default_rng(4).normal(size=(3, 32)).astype(np.float32)
    merged = leaves["kernel"] + lora.scale * leaves["lora_a"] @ leaves["lora_b"]
    if lora.dora:
        merged = merged / np.linalg.norm(merged, axis=0)[None] * leaves["lora_m"][None]
    np.testing.assert_allclose(
        module.apply({"params": leaves}, jnp.asarray(x)), x @ merged, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("quantized", ["", "nf4"])
@pytest.mark.parametrize("name", ["plain", "dora"])
def test_an_adapter_outlives_rounding_to_bfloat16_and_untrained_changes_no_bit(name, quantized):
    """What it adds is a tenth of the rounding's step: on the mean none of it is lost."""
    lora, draw = LoraConfig(4, dora=name == "dora"), np.random.default_rng(4)
    x = jnp.asarray(draw.normal(size=(1024, 64)), jnp.bfloat16)
    leaves = {
        "kernel": jnp.asarray(draw.normal(size=(64, 64)), jnp.bfloat16),
        "lora_a": jnp.asarray(draw.normal(size=(64, 4)), jnp.float32),
        "lora_b": jnp.asarray(draw.normal(size=(4, 64)) * 5e-5, jnp.float32),
    }
    if quantized:
        (like,) = quantized_shapes(
            {"kernel": leaves["kernel"]}, quantized, {"kernel": Role("linear", inputs=1)}
        ).values()
        leaves["kernel"] = quantize(leaves["kernel"], like)
    if lora.dora:
        kernel = leaves["kernel"].astype(jnp.float32)
        factor = 1 + draw.normal(size=64) * 3e-4
        leaves["lora_m"] = jnp.linalg.norm(kernel, axis=0) * jnp.asarray(factor, jnp.float32)

    def change(dtype, leaves=leaves):
        """What the adapter changes of y."""
        args = (64,), (64,), ("embed", "ffn"), jnp.dtype(dtype), Role("linear", inputs=1)
        base, adapted = (
            jax.jit(lambda leaves, x, one=one: Linear(*args, **one).apply({"params": leaves}, x))(
                leaves, x.astype(dtype)
            )
            for one in ({"exact": True}, {"lora": lora})
        )
        return np.asarray(adapted, np.float64) - np.asarray(base, np.float64)

    untrained = leaves | {"lora_b": jnp.zeros((4, 64))}
    if lora.dora:
        untrained["lora_m"] = jnp.linalg.norm(kernel, axis=0)
    assert not change("bfloat16", untrained).any()
    expected, got = change("float32"), change("bfloat16")
    assert 0.05 < np.abs(expected).mean() / 2**-5 < 0.2  # y is about 8: its step is 1 / 32
    assert np.sum(got * expected) / np.sum(expected**2) == pytest.approx(1, abs=0.05)


def test_no_gradient_flows_through_doras_norm():
    module, leaves = linear(VARIANTS["dora"])
    x = jnp.asarray(np.random.default_rng(4).normal(size=(3, 32)), jnp.float32)
    adapter = {name: leaf for name, leaf in leaves.items() if name != "kernel"}

    def merged(adapter):
        return leaves["kernel"] + VARIANTS["dora"].scale * adapter["lora_a"] @ adapter["lora_b"]

    norm = jnp.linalg.norm(merged(adapter), axis=0)  # a constant: of the adapter as it stands

    def formula(adapter):
        return jnp.sum(jnp.sin(x @ merged(adapter) * (adapter["lora_m"] / norm)[None]))

    def layer(adapter):
        return jnp.sum(jnp.sin(module.apply({"params": leaves | adapter}, x)))

    expected, got = jax.grad(formula)(adapter), jax.grad(layer)(adapter)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, expected)


@pytest.mark.parametrize("name", ["plain", "dora"])
def test_no_product_as_large_as_the_kernel_is_made(name):
    module, leaves = linear(VARIANTS[name])

    def products(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield from (tuple(out.aval.shape) for out in equation.outvars)
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from products(inner)

    def loss(adapter, x):
        return jnp.sum(module.apply({"params": leaves | adapter}, x))

    adapter = {name: leaf for name, leaf in leaves.items() if name != "kernel"}
    found = set(
        products(jax.make_jaxpr(jax.value_and_grad(loss))(adapter, jnp.ones((7, 32))).jaxpr)
    )
    assert (7, 40) in found and (32, 40) not in found


def test_a_fresh_adapters_gradient_is_in_b_and_in_doras_magnitudes():
    plain, adapted = models(VARIANTS["dora"])
    base = filled(plain)

    def loss(adapter):
        return jnp.sum(jnp.square(adapted.hidden(merge(base, adapter), *fields())[0][..., :3]))

    gradient = jax.jit(jax.grad(loss))(adapted.init_adapter(jax.random.key(1), base))
    for path, leaf in flatten(gradient).items():
        assert (np.abs(leaf).max() > 1e-5) == (not path.endswith("lora_a")), path


def test_experts_take_no_adapter():
    config = hf.config_from({"model_type": "mixtral", "num_local_experts": 4} | SHAPE)
    with pytest.raises(
        ValueError, match="match mlp/down, mlp/gate, mlp/up, but experts take no adapter"
    ):
        build(config, lora=LoraConfig(2))
    build(config, lora=LoraConfig(2, targets="attention/.*"))
