# SPDX-License-Identifier: Apache-2.0
"""Keys that change logits are read as transformers reads them, or refused by name."""

import copy
import dataclasses
import json
import pathlib
import re
import sys

import numpy as np
import pytest
from transformers import CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from align_jax.interop import hf
from align_jax.models import FAMILIES
from align_jax.models.rope import frequencies
from align_jax.models.unread import DECLARED_ONLY, IMPLIED, OF_TENSORS

SHAPE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
MIXED = ["full_attention", "sliding_attention", "full_attention"]
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
BY_KIND = {
    "full_attention": YARN | {"truncate": False},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
LATENT = {
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 10,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
}
NANO = {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 60}


def read(family, **more):
    return hf.config_from(SHAPE | {"model_type": family} | more)


@pytest.mark.parametrize(
    "family, more, words",
    [
        *(
            (family, {"sliding_window": 5}, "sliding_window: .*null")
            for family in ("llama", "olmo2")
        ),
        (
            "minimax_m2",
            {"sliding_window": 5, "num_experts_per_tok": 2, "num_local_experts": 4},
            "sliding_window: .*null",
        ),
        *(
            (family, {"layer_types": MIXED, "sliding_window": 5}, "layer_types: expected")
            for family in ("phi3", "mistral", "starcoder2")
        ),
        ("llama", {"attn_logit_softcapping": 2.0}, "attn_logit_softcapping: .*null"),
        ("gemma3_text", {"attn_logit_softcapping": 2.0}, "attn_logit_softcapping: .*null"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention: .*false"),
        ("gemma", {"final_logit_softcapping": 2.0}, "final_logit_softcapping: .*null"),
        ("llama", {"query_pre_attn_scalar": 3}, r"query_pre_attn_scalar: expected 8.0, .*got 3"),
        ("gemma3n_text", NANO | {"query_pre_attn_scalar": 255}, "attn_scalar: expected 1.0"),
        ("qwen3", {"logits_scaling": 3.0}, "logits_scaling: expected 1.0"),
        ("mistral", {"embedding_multiplier": 3.0}, "embedding_multiplier: expected 1.0"),
        ("llama", {"no_rope_layers": [1, 0, 1]}, "no_rope_layers: expected"),
        ("llama", {"attention_chunk_size": 4}, "attention_chunk_size: expected null"),
        ("llama", {"rope_interleave": True}, "rope_interleave: expected false"),
        ("qwen3", {"use_parallel_residual": True}, "use_parallel_residual: expected false"),
        ("mixtral", {"swiglu_limit": 7.0}, "swiglu_limit: expected null"),
        ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob: expected true"),
        *(
            (family, {"is_causal": False}, "is_causal: expected true")
            for family in ("llama", "gemma2", "opt")
        ),
        *(
            (family, {"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1")
            for family in ("llama", "qwen2", "cohere2")
        ),
        *(
            (family, {"rope_parameters": BY_KIND}, "full_attention.truncate: expected true")
            for family in ("olmo3", "gemma3_text")
        ),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm false"),
        ("deepseek_v3", LATENT, "num_key_value_heads: expected 4, .*got 2"),
        ("deepseek_v3", LATENT | {"num_key_value_heads": 4, "head_dim": 2}, "expected 4 or 10"),
        *(
            (family, {"rope_scaling": scaling}, words)
            for family, scaling, words in (
                ("llama", {"factor": 2.0}, "'default': expected no factor"),
                ("phi", {"rope_type": "linear", "factor": 2.0, "attn_factor": 3}, "no attn_factor"),
                ("mistral", YARN | {"original_max_position_embedding": 8}, "no original_max"),
                (
                    "qwen2",
                    {"type": "dynamic", "factor": 2.0, "max_position_embeddings": 8},
                    "no max_position",
                ),
                (
                    "hunyuan_v1_dense",
                    {"type": "dynamic", "factor": 2.0, "alpha": 3.0},
                    "expected no factor",
                ),
            )
        ),
        *(
            (family, {"rope_parameters": YARN}, "kind of layer and nothing beside .*got factor,")
            for family in ("olmo3", "gemma3_text")
        ),
    ],
)
def test_a_key_that_would_be_passed_over_is_refused_by_name(family, more, words):
    with pytest.raises(ValueError, match=words):
        read(family, **more)


@pytest.mark.parametrize(
    "family, more",
    [
        ("llama", {"sliding_window": 5, "use_sliding_window": False}),
        ("llama", {"sliding_window": 64}),  # all positions
        ("llama", {"layer_types": ["full_attention"] * 3, "query_pre_attn_scalar": 8}),
        ("llama", {"is_causal": True, "partial_rotary_factor": 1.0, "logit_scale": 1}),
        ("mistral", {"sliding_window": 5, "layer_types": ["sliding_attention"] * 3}),
        # the tensors decide, and transformers reads no such key
        ("mistral", {"attention_bias": True, "mlp_bias": True}),
        ("phi3", {"attention_bias": True, "pad_token_id": 0}),
        ("qwen2", {"attention_bias": False}),
        ("ernie4_5", {"rope_interleave": True, "use_parallel_residual": False}),
        ("hunyuan_v1_dense", {"use_qk_norm": True, "head_dim": 8}),
        (
            "llama",
            {"rope_scaling": {"rope_type": "default", "factor": 1, "beta_fast": 32, "mscale": 1.0}},
        ),
    ],
)
def test_a_key_that_says_what_is_computed_anyway_is_none(family, more):
    with_it, without = (
        read(family, **more),
        read(family, **{} if "head_dim" not in more else {"head_dim": 8}),
    )
    fields = {field.name: getattr(without, field.name) for field in dataclasses.fields(without)}
    changed = {name for name, value in fields.items() if getattr(with_it, name) != value}
    assert changed <= ({"hf", "windows"} if family == "mistral" else {"hf"})


def test_what_a_class_declares_its_modules_read():
    """Else a key that changes logits elsewhere could be set, and pass unread."""
    passed = {
        (family, key)
        for family in FAMILIES.keys() & set(CONFIG_MAPPING)
        for key in (*IMPLIED, *OF_TENSORS)
        if key not in DECLARED_ONLY.get(family, ())
        and key in {field.name for field in dataclasses.fields(CONFIG_MAPPING[family])}
        and not re.search(rf"\b{key}\b", _modules(family))
    }
    assert passed == {("deepseek_v2", "norm_topk_prob")}  # which its file refuses


def _modules(family):
    file = pathlib.Path(sys.modules[CONFIG_MAPPING[family].__module__].__file__)
    return file.with_name(file.name.replace("configuration_", "modeling_")).read_text()


def test_the_original_context_beside_the_scaling_is_its_own():
    (rope,) = read("llama", rope_parameters=YARN, original_max_position_embeddings=16).ropes
    assert rope.option("original_max_position_embeddings") == 16
    (rope,) = read("llama", rope_parameters=YARN).ropes
    assert rope.option("original_max_position_embeddings") == 64


@pytest.mark.parametrize("original", [2, 6, 40])  # of the first two the ramp runs backwards
def test_yarns_frequencies_equal_transformers(original):
    given = YARN | {"original_max_position_embeddings": original}
    (rope,) = read("llama", rope_parameters=given, head_dim=64).ropes
    theirs = CONFIG_MAPPING["llama"](**SHAPE, rope_parameters=given, head_dim=64)
    expected, attention = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    found, factor = frequencies(rope)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)
    assert factor == pytest.approx(attention)


def test_the_configuration_that_was_read_stays_as_read():
    text = SHAPE | {"model_type": "gemma3_text", "head_dim": 8}
    text["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    for given in (
        SHAPE | {"model_type": "llama", "rope_scaling": dict(YARN, type="yarn")},
        SHAPE
        | {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 16}},
    ):
        before = copy.deepcopy(given)
        config = hf.config_from(given)
        assert given == before == json.loads(config.hf)
        assert "quantization_config" not in json.dumps(config.to_hf())
        assert config.to_hf(num_labels=1) is not given and given == before == json.loads(config.hf)
