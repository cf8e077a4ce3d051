# SPDX-License-Identifier: Apache-2.0
"""Latent attention, sinks and layers with states: decoding, with codes and an adapter too, is what
whole rows give, a mesh changes nothing, nor do layouts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.core.tree import flatten, unflatten
from align_jax.data.layout import BatchShape, TokenizedGroup, make_batch
from align_jax.interop import hf
from align_jax.models import transformer
from align_jax.models.delta_rule import past
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


NEXT = {
    "model_type": "qwen3_next",
    "vocab_size": 40,
    "hidden_size": 32,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 6,
    "full_attention_interval": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
}


@pytest.mark.parametrize(
    "raw, axes",
    [
        (DEEPSEEK, ("expert", "fsdp", "tensor")),
        (GPT_OSS, ("expert", "fsdp", "tensor")),
        (NEXT, ("expert", "sequence", "tensor")),
    ],
    ids=["deepseek_v3", "gpt_oss", "qwen3_next"],
)
def test_a_mesh_changes_nothing(raw, axes):
    model = build(hf.config_from(raw), compute_dtype="float32", remat="none")
    params = jax.jit(model.init)(jax.random.key(0))
    # biases and sinks begin as zeros
    params = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), params)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (8, 6)), jnp.int32)
    fields = tokens, jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(6), tokens.shape)
    run = jax.jit(lambda params, *fields: model.hidden(params, *fields)[0])
    expected = run(params, *fields)
    mesh = make_mesh(dict.fromkeys(axes, 2))
    with jax.set_mesh(mesh):
        got = run(jax.device_put(params, tree_shardings(mesh, model.axes())), *fields)
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize(
    "raw, shapes, adapted",
    [
        # a token's latent and the key that heads share, nothing by head
        (DEEPSEEK, ((2, 2, 7, 1, 64), (2, 2, 7, 1, 4)), "layers1/attention/key_value_b/lora_m"),
        # keys and values of one layer, state and inputs of the other
        (
            NEXT,
            ((1, 2, 7, 2, 8), (1, 2, 7, 2, 8), (1, 2, 2, 2, 4, 6), (1, 2, 3, 2, 20)),
            "layers0/delta/mixed/lora_m",
        ),
    ],
    ids=["deepseek_v3", "qwen3_next"],
)
def test_decoding_equals_whole_rows_with_codes_and_an_adapter(raw, shapes, adapted):
    config = hf.config_from(raw)
    lora = LoraConfig(2, targets="attention/.*|delta/.*", dora=True)
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
    assert tuple(x.shape for x in cache.held if x is not None) == shapes
    ones = jnp.ones_like(tokens[:, :4])
    _, cache = jax.jit(model.prefill)(params, tokens[:, :4], ones, places[:, :4], cache)
    decode = jax.jit(model.decode)
    for at in range(4, 7):
        hidden, cache = decode(params, tokens[:, at], places[:, at], cache)
        np.testing.assert_allclose(hidden, whole[:, at], atol=1e-4)
    assert adapted in flatten(adapter)


def test_layouts_give_the_same_log_probabilities_and_gradients(monkeypatch):
    # rows longer than a chunk: prompts that go on into the next, responses far behind their prompt
    monkeypatch.setattr(transformer, "past", functools.partial(past, chunk=8))
    config = hf.config_from(NEXT | {"initializer_range": 0.1})
    model = build(config, compute_dtype="float32", remat="none")
    params = jax.jit(model.init)(jax.random.key(0))
    draw = np.random.default_rng(0)
    groups = []
    for prompt, *answers in ((11, 6, 3), (2, 9, 1), (13, 5, 12), (1, 2, 2)):
        texts = [draw.integers(0, 40, n).astype(np.int32) for n in (prompt, *answers)]
        responses = tuple((text, np.ones(len(text), bool)) for text in texts[1:])
        groups.append(TokenizedGroup(texts[0], responses))

    def sums(params, batch):
        fields = batch.tokens, batch.segment_ids, batch.positions, batch.prefix_ids
        states = model.hidden(params, *fields)[0]
        before = jnp.take_along_axis(states, batch.source_index[..., None], axis=1)
        logps = jax.nn.log_softmax(model.unembed(params, before))
        logps = jnp.take_along_axis(logps, batch.tokens[..., None], axis=-1)[..., 0]
        slots = batch.lengths.size // len(batch.tokens)
        at = batch.slot + slots * jnp.arange(len(batch.tokens))[:, None]
        found = jnp.zeros(batch.lengths.size).at[at].add(jnp.where(batch.loss_mask, logps, 0))
        return jnp.sum(found * jnp.cos(jnp.arange(8.0))), found

    found = {}
    for layout, bins, length in (
        ("plain", [[group] for group in groups], 32),
        ("packed", [groups[:2], groups[2:]], 64),
        ("shared_prefix", [groups[:2], groups[2:]], 48),
    ):
        rows = 8 if layout == "plain" else 2
        shape = BatchShape(rows, length, length, slots=8 // rows, groups=4, responses=2)
        batch = make_batch(bins, shape, layout, pad=0, weight=np.ones(4, np.float32))
        found[layout] = jax.jit(jax.grad(sums, has_aux=True))(params, batch)
    for layout in ("packed", "shared_prefix"):
        for one, other in zip(jax.tree.leaves(found[layout]), jax.tree.leaves(found["plain"])):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())
        np.testing.assert_allclose(found[layout][1], found["plain"][1], atol=1e-5)
