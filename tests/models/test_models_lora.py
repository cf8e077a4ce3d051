# SPDX-License-Identifier: Apache-2.0
"""Adapters: in the layer, beside it, and merged into it."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.models import hf
from align_jax.models.lora import LoraConfig, fold, merge
from align_jax.models.model import build

V, LENGTH = 61, 9
SHAPE = dict(vocab_size=V, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)
VARIANTS = {
    "plain": LoraConfig(4, alpha=8.0),
    "rank-stabilised": LoraConfig(4, alpha=8.0, rank_stabilised=True),
    "dora": LoraConfig(4, alpha=8.0, dora=True),
    "attention alone": LoraConfig(2, targets="attention/.*"),
    "two maps": LoraConfig(3, targets="attention/output|mlp/down", dora=True),
}


def fields(seed=0, rows=2):
    tokens = np.random.default_rng(seed).integers(0, V, (rows, LENGTH)).astype(np.int32)
    return tokens, np.ones_like(tokens), np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)


def logits(model, params):
    return jax.jit(lambda params, *x: model.unembed(params, model.hidden(params, *x)[0]))(params, *fields())


def models(lora, dtype="float32", **changes):
    config = hf.config_from({"model_type": "llama"} | SHAPE | changes)
    return (build(config, compute_dtype=dtype, remat="none"),
            build(config, compute_dtype=dtype, remat="none", lora=lora))


def shaken(tree, seed=5, size=0.1):
    """The same tree, each leaf with noise: an adapter that does something."""
    leaves, form = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(form, [x + size * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys)])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_folded_adapter_computes_what_the_layer_does(name):
    lora = VARIANTS[name]
    plain, adapted = models(lora)
    base = plain.init(jax.random.key(0))
    params = merge(base, shaken(adapted.init_adapter(jax.random.key(1), base)))
    folded = fold(params, lora)
    assert jax.tree.structure(folded) == jax.tree.structure(base)
    got, expected = logits(plain, folded), logits(adapted, params)
    assert np.abs(expected - logits(plain, base)).max() > 0.01
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_folding_keeps_the_kernels_type(name="plain"):
    plain, adapted = models(VARIANTS[name])
    base = plain.init(jax.random.key(0), jnp.bfloat16)
    folded = fold(merge(base, adapted.init_adapter(jax.random.key(1), base)), VARIANTS[name])
    for got, expected in zip(jax.tree.leaves(folded), jax.tree.leaves(base)):
        assert got.dtype == jnp.bfloat16 and bool((got == expected).all())
