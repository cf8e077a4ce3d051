# SPDX-License-Identifier: Apache-2.0
"""The decoder's own promises: causality, precision, meshes, dropout, adapters and freezing in the
layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.core.tree import flatten
from align_jax.interop import hf
from align_jax.models.lora import LoraConfig, merge
from align_jax.models.model import build
from align_jax.parallel.mesh import make_mesh
from align_jax.parallel.sharding import tree_shardings

V, N, LENGTH = 64, 8, 8
CONFIG = hf.config_from(
    dict(
        model_type="llama",
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
)


def fields(seed=0):
    tokens = jnp.asarray(np.random.default_rng(seed).integers(0, V, (N, LENGTH)), jnp.int32)
    return (
        tokens,
        jnp.ones_like(tokens),
        jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), tokens.shape),
    )


def logits(model, params, *args, **keywords):
    return model.unembed(params, model.hidden(params, *args, **keywords)[0])


@pytest.fixture(scope="module")
def base():
    model = build(CONFIG, compute_dtype="float32", remat="none")
    return model, model.init(jax.random.key(0))


def test_no_token_sees_what_follows_or_another_segment(base):
    model, params = base
    tokens, segments, positions = (x[:1] for x in fields())
    segments = jnp.where(jnp.arange(LENGTH)[None] < 5, 1, 2)

    def probe(table):
        return model.hidden(
            merge(params, {"embed": {"tokens": table}}), tokens, segments, positions
        )[0][0, :, 0]

    tokens = jnp.arange(LENGTH, dtype=jnp.int32)[None]  # one row of the table a token
    seen = np.abs(jax.jit(jax.jacobian(probe))(params["embed"]["tokens"])).max(-1)[:, :LENGTH] > 0
    expected = np.tril(np.ones((LENGTH, LENGTH), bool)) & (
        segments[0][:, None] == segments[0][None]
    )
    np.testing.assert_array_equal(seen, expected)


def test_a_shared_prompt_gives_what_each_response_alone_gives(base):
    model, params = base
    tokens = fields()[0][:1]
    shared = (
        tokens,
        jnp.asarray([[1, 1, 1, 2, 2, 3, 3, 3]]),
        jnp.asarray([[0, 1, 2, 3, 4, 3, 4, 5]]),
        jnp.asarray([[0, 0, 0, 1, 1, 1, 1, 1]]),
    )
    run = jax.jit(lambda *args: logits(model, params, *args))
    got = run(*shared)[0]
    order = [0, 1, 2, 5, 6, 7]  # the prompt with the second response
    alone = run(
        tokens[:, order], jnp.ones((1, 6), jnp.int32), jnp.arange(6, dtype=jnp.int32)[None]
    )[0]
    np.testing.assert_allclose(got[jnp.asarray(order)], alone, atol=1e-5)


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 2, "tensor": 2, "sequence": 2}, {"data": 2, "fsdp": 4}], ids=str
)
def test_a_mesh_changes_neither_logits_nor_gradients(base, sizes):
    model, params = base
    args = fields()

    def both(params):
        return logits(model, params, *args), jax.grad(
            lambda p: jnp.mean(jnp.square(logits(model, p, *args)))
        )(params)

    expected = jax.jit(both)(params)
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        got = jax.jit(both)(jax.device_put(params, tree_shardings(mesh, model.axes())))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


def test_bfloat16_stays_close_to_float32(base):
    _, params = base
    low, high = (
        logits(model, params, *fields()) for model in (build(CONFIG, remat="none"), base[0])
    )
    assert low.dtype == jnp.float32
    rounded = low.astype(jnp.bfloat16).astype(jnp.float32)
    # the logits themselves are summed and kept in float32
    assert float(jnp.mean(rounded == low)) < 0.1
    assert float(jnp.mean(jnp.abs(jax.nn.log_softmax(low) - jax.nn.log_softmax(high)))) < 0.05


def test_dropout_acts_only_with_a_key(base):
    plain, params = base
    model = build(CONFIG, compute_dtype="float32", dropout=0.3)
    still = logits(model, params, *fields())
    np.testing.assert_array_equal(still, logits(plain, params, *fields()))
    one, other = (
        logits(model, params, *fields(), dropout_key=jax.random.key(seed)) for seed in (1, 2)
    )
    assert float(jnp.abs(one - still).max()) > 1e-3 and float(jnp.abs(one - other).max()) > 1e-3
    np.testing.assert_array_equal(
        one, logits(model, params, *fields(), dropout_key=jax.random.key(1))
    )


@pytest.mark.parametrize(
    "lora, compute",
    [
        (LoraConfig(4), "float32"),
        (LoraConfig(4), "bfloat16"),
        (LoraConfig(4, rank_stabilized=True), "float32"),
        (LoraConfig(2, dropout=0.5, targets="attention/(query|value)"), "float32"),
    ],
    ids=str,
)
def test_an_untrained_adapter_changes_no_bit(lora, compute):
    plain = build(CONFIG, compute_dtype=compute, remat="none", beside=lora)
    model = build(CONFIG, compute_dtype=compute, remat="none", lora=lora)
    params = plain.init(jax.random.key(0))
    adapter = model.init_adapter(jax.random.key(1), params)
    merged = merge(params, adapter)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(lambda x: x.shape, model.shapes())
    run = jax.jit(lambda model, params: logits(model, params, *fields()), static_argnums=0)
    np.testing.assert_array_equal(run(model, merged), run(plain, params))
    gradient = jax.grad(lambda adapter: jnp.sum(jnp.sin(run(model, merge(params, adapter)))))(
        adapter
    )
    moved = {path for path, leaf in flatten(gradient).items() if bool((leaf != 0).any())}
    assert moved == {path for path in flatten(adapter) if path.endswith("lora_b")}


def test_an_untrained_dora_adapter_changes_nothing_beyond_rounding(base):
    plain, params = base
    model = build(CONFIG, compute_dtype="float32", remat="none", lora=LoraConfig(4, dora=True))
    merged = merge(params, model.init_adapter(jax.random.key(1), params))
    np.testing.assert_allclose(
        logits(model, merged, *fields()), logits(plain, params, *fields()), atol=2e-5
    )


def test_adapter_dropout_acts_only_with_a_key(base):
    _, params = base
    model = build(CONFIG, compute_dtype="float32", remat="none", lora=LoraConfig(4, dropout=0.5))
    adapter = jax.tree.map(lambda x: x + 0.1, model.init_adapter(jax.random.key(1), params))
    still = logits(model, merge(params, adapter), *fields())
    moved = logits(model, merge(params, adapter), *fields(), dropout_key=jax.random.key(3))
    assert float(jnp.abs(moved - still).max()) > 1e-3


@pytest.mark.parametrize(
    "mistake, message",
    [
        (dict(rank=0), "rank must be at least 1"),
        (dict(rank=2, dropout=1.0), "dropout must be in"),
        (dict(rank=2, targets="q_proj"), "match none of"),
    ],
)
def test_adapter_mistakes_are_errors(mistake, message):
    with pytest.raises(ValueError, match=message):
        build(CONFIG, lora=LoraConfig(**mistake))
