# SPDX-License-Identifier: Apache-2.0
"""Latent attention and sinks: decoding, with codes and an adapter too, is what whole rows give, and
a mesh changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.core.tree import flatten, unflatten
from align_jax.interop import hf
from align_jax.models.lora import LoraConfig, merge
from align_jax.models.model import build
from align_jax.models.quantize import Quantized, quantize, quantized_shapes
from align_jax.parallel.mesh import make_mesh
from align_jax.parallel.sharding import tree_shardings

DEEPSEEK = {
    "model_type": "deepseek_v3",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "initializer_range": 0.3,
}

GPT_OSS = {
    "model_type": "gpt_oss",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 3,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
}


@pytest.mark.parametrize("raw", [DEEPSEEK, GPT_OSS], ids=["deepseek_v3", "gpt_oss"])
def test_a_mesh_changes_nothing(raw):
    model = build(hf.config_from(raw), compute_dtype="float32", remat="none")
    params = jax.jit(model.init)(jax.random.key(0))
    # biases and sinks begin as zeros
    params = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), params)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (8, 6)), jnp.int32)
    fields = tokens, jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(6), tokens.shape)
    run = jax.jit(lambda params, *fields: model.hidden(params, *fields)[0])
    expected = run(params, *fields)
    mesh = make_mesh({"expert": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        got = run(jax.device_put(params, tree_shardings(mesh, model.axes())), *fields)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_decoding_from_latents_equals_whole_rows_with_codes_and_an_adapter():
    config = hf.config_from(DEEPSEEK)
    lora = LoraConfig(2, targets="attention/.*", dora=True)
    model = build(config, compute_dtype="float32", remat="none", lora=lora)
    plain = build(config, compute_dtype="float32")
    base = jax.jit(plain.init)(jax.random.key(0))
    adapter = jax.jit(model.init_adapter)(jax.random.key(1), base)
    adapter = jax.tree.map(
        lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), adapter
    )
    like = flatten(quantized_shapes(plain.shapes(), "int8", plain.roles()))
    base = {
        path: quantize(x, like[path]) if isinstance(like[path], Quantized) else x
        for path, x in flatten(base).items()
    }
    params = merge(unflatten(base), adapter)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 7)), jnp.int32)
    places = jnp.broadcast_to(jnp.arange(7, dtype=jnp.int32), tokens.shape)
    whole, _ = jax.jit(model.hidden)(params, tokens, jnp.ones_like(tokens), places)
    cache = model.init_cache(2, 7)
    # a token's latent and the key that heads share, nothing by head
    assert (cache.keys.shape, cache.values.shape) == ((2, 2, 7, 1, 64), (2, 2, 7, 1, 4))
    ones = jnp.ones_like(tokens[:, :4])
    _, cache = jax.jit(model.prefill)(params, tokens[:, :4], ones, places[:, :4], cache)
    decode = jax.jit(model.decode)
    for at in range(4, 7):
        hidden, cache = decode(params, tokens[:, at], places[:, at], cache)
        np.testing.assert_allclose(hidden, whole[:, at], atol=1e-4)
    assert "layers1/attention/key_value_b/lora_m" in flatten(adapter)
