# SPDX-License-Identifier: Apache-2.0
"""Configurations as they stand on the hub, old spellings included, and mistakes in them."""

import json

import pytest

from align_jax.core.tree import flatten
from align_jax.interop import hf
from align_jax.models import FAMILIES
from align_jax.models.model import build

LLAMA31 = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": False,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
}
PYTHIA = {
    "model_type": "gpt_neox",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "max_position_embeddings": 2048,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
    "vocab_size": 50304,
    "layer_norm_eps": 1e-5,
}
GEMMA2 = {
    "model_type": "gemma2",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "head_dim": 256,
    "num_key_value_heads": 4,
    "num_hidden_layers": 26,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "vocab_size": 256000,
    "rope_theta": 10000.0,
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_attention_heads": 4,
    "head_dim": 256,
    "num_key_value_heads": 1,
    "num_hidden_layers": 26,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 256,
    "rope_theta": 1000000,
    "rope_local_base_freq": 10000,
    "vocab_size": 262144,
}
GEMMA3N = {
    "model_type": "gemma3n_text",
    "vocab_size": 262400,
    "hidden_size": 2048,
    "intermediate_size": [16384] * 35,
    "num_hidden_layers": 35,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "query_pre_attn_scalar": 256,
    "altup_lr_multiplier": 1.0,
    "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 25,
}
QWEN3_NEXT = {
    "model_type": "qwen3_next",
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "num_hidden_layers": 48,
    "full_attention_interval": 4,
    "vocab_size": 151936,
}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_hidden_layers": 48,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rope_theta": 1000000.0,
    "vocab_size": 151936,
    "use_sliding_window": False,
    "sliding_window": None,
}
PHI3 = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 131072,
    "sliding_window": 262144,
    "original_max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "vocab_size": 32064,
    "pad_token_id": 32000,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
}
MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "rope_theta": 10000.0,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
}
QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "rope_theta": 1000000.0,
    "vocab_size": 152064,
}
SCALED = {"rope_type": "linear", "factor": 2.0, "llama_4_scaling_beta": 0.1}
GLM = {"model_type": "glm4_moe", "head_dim": 128, "num_hidden_layers": 2}
CASES = {  # case -> (configuration, parameters in all, what must be read)
    "Llama 3.1 8B": (
        LLAMA31,
        8_030_261_248,
        lambda c: (c.ropes[0].kind, c.ropes[0].theta, c.windows[0]) == ("llama3", 500000.0, 0),
    ),
    "Pythia 2.8B": (
        PYTHIA,
        2_775_208_960,
        lambda c: (c.ropes[0].rotary_dim, c.parallel_residual, c.norm) == (20, True, "layer"),
    ),
    "Gemma 2 2B": (
        GEMMA2,
        2_614_341_888,
        lambda c: (
            c.windows[:4] == (4096, 0, 4096, 0)
            and c.tied
            and (c.attention_softcap, c.final_softcap) == (50.0, 30.0)
        ),
    ),
    "Gemma 3 1B": (
        GEMMA3,
        999_885_952,
        lambda c: (
            c.windows[4:7] == (512, 0, 512)
            and c.ropes[c.layer_ropes[5]].theta == 1e6
            and c.ropes[c.layer_ropes[0]].theta == 1e4
        ),
    ),
    "Gemma 3n E4B": (
        GEMMA3N,
        6_835_235_568 + 256 * 35 * 256,  # rows that fill its layers' table
        lambda c: (
            c.windows[3:5] == (512, 0)
            and c.ropes[c.layer_ropes[4]].theta == 1e6
            and (c.reused, c.streams.count, c.sparsities[9:11]) == (15, 4, (0.95, 0.0))
            and [stack.count for stack in c.stacks] == [2, 2, 3]
        ),
    ),
    "Qwen 3 30B": (
        QWEN3_MOE,
        30_532_122_624,
        lambda c: (c.num_experts, c.intermediate_size, c.normalize_experts) == (128, 768, True),
    ),
    "Qwen 3 Next 80B": (
        QWEN3_NEXT,
        79_674_391_296,
        lambda c: (len(c.kinds), c.num_experts, c.experts_per_token) == (48, 512, 10),
    ),
    "Phi 3 mini 128k": (
        PHI3,
        3_821_079_552,
        lambda c: (
            c.ropes[0].kind == "longrope"
            and c.ropes[0].option("original_max_position_embeddings") == 4096
        ),
    ),
    "Mistral 7B": (MISTRAL, 7_241_732_096, lambda c: c.windows == (4096,) * 32),
    "Qwen 2.5 7B": (
        QWEN2,
        7_615_616_512,
        lambda c: c.attention_bias and not c.output_bias and not any(c.windows),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_published_models_have_their_published_sizes(name):
    raw, count, check = CASES[name]
    config = hf.config_from(raw)
    assert check(config), config
    shapes = flatten(build(config).shapes())
    assert sum(leaf.size for leaf in shapes.values()) == count
    assert {entry.path for entry in hf.tensor_maps(config)} == set(shapes)
    again = config.to_hf(dtype="bfloat16")
    assert hf.config_from(again) == hf.config_from(raw | {"dtype": "bfloat16"})
    json.dumps(again)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "mixtrall"}, "did you mean 'mixtral'"),
        ({"model_type": None}, "model_type: expected one of .*gemma, .*got null"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "spiral"),
        ({"num_key_value_heads": 5}, "not divisible"),
    ],
    ids=str,
)
def test_mistakes_name_what_is_known(change, message):
    with pytest.raises(ValueError, match=message):
        hf.config_from(LLAMA31 | change)


def test_unsupported_variants_are_errors():
    for raw, message in (
        ({"model_type": "opt", "do_layer_norm_before": False}, "opt-350m"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx"),
        (GLM | {"first_k_dense_replace": 2}, "fewer dense layers than num_hidden_layers, 2"),
        (GLM | {"n_group": 3}, "n_group, topk_group: expected a divisor of the 128 experts"),
        (QWEN3_MOE | {"mlp_only_layers": [48]}, r"expected layers from 0 to 47, got \[48\]"),
        (QWEN3_MOE | {"decoder_sparse_step": 49}, "fewer dense layers than .*, 48, got 48"),
        ({"model_type": "deepseek_v3", "scoring_func": "softmax"}, "expected 'sigmoid', .* got 's"),
        ({"model_type": "deepseek_v2", "moe_layer_freq": 2}, "moe_layer_freq: expected 1"),
        ({"model_type": "deepseek_v2", "topk_method": "noaux_tc"}, "'group_limited_greedy'"),
        ({"model_type": "dots1"}, "dots1: expected n_routed_experts, num_experts_per_tok, n_shar"),
        (GEMMA2 | {"use_bidirectional_attention": True}, "bidirectional"),
        (GEMMA3N | {"intermediate_size": [8, 16384, *[8] * 33]}, r"one width .*\[8, 16384\]"),
        (GEMMA3N | {"hidden_size_per_layer_input": 0}, "per_layer_input: expected a width above 0"),
        (GEMMA3N | {"vocab_size_per_layer_input": 262401}, "at most vocab_size, 262400"),
        (GEMMA3N | {"altup_active_idx": 4}, "one below altup_num_inputs, 4; got 4"),
        (GEMMA3N | {"altup_coef_clip": 2.0}, "altup_coef_clip: expected at least 100"),
        (GEMMA3N | {"activation_sparsity_pattern": [1.0] * 35}, "from 0 to below 1 for each layer"),
        *(
            (raw | {"num_kv_shared_layers": count}, f"num_kv_shared_layers: expected .*{said}")
            for raw in (GEMMA3N, {"model_type": "gemma4_text", "num_hidden_layers": 35})
            for count, said in ((35, "fewer than num_hidden_layers, 35"), (31, "of full_attention"))
        ),
        (MISTRAL | {"rope_scaling": SCALED}, "llama_4_scaling_beta: expected 0"),
    ):
        with pytest.raises(ValueError, match=message):
            hf.config_from(raw)


def test_every_family_reads_its_defaults():
    for family in FAMILIES:
        raw = {"model_type": family}
        if family == "glm4_moe":
            raw["head_dim"] = 128  # its defaults make no whole number of it
        if family in ("deepseek_v2", "dots1"):
            raw |= {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1}
        assert hf.config_from(raw).family == family
