# SPDX-License-Identifier: Apache-2.0
"""Every family against transformers on tiny random models: logits, padding, packing, generation,
weights both ways."""

import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.gemma3n.configuration_gemma3n import Gemma3nVisionConfig

from align_jax.interop import hf
from align_jax.models import FAMILIES
from align_jax.models.families import towers
from align_jax.models.model import build

V, LENGTH, WINDOW = 67, 18, 5
SHAPE = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 64,
}
MIXED = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
LATENT = {
    "kv_lora_rank": 12,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 10,
    "num_key_value_heads": 4,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "n_group": 3,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "attention_bias": True,
}
# what sees images, of every family that does
EYES = {
    "hidden_size": 16,
    "embed_dim": 16,
    "out_hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
EARS = {
    "hidden_size": 16,
    "conf_num_attention_heads": 2,
    "conf_num_hidden_layers": 1,
    "sscp_conv_channel_size": [4, 4],
    "input_feat_size": 8,
}


class Timm(transformers.PreTrainedModel):
    """In place of what Gemma 3n sees with, which is timm's, and which text does not reach."""

    config_class = Gemma3nVisionConfig

    def __init__(self, config):
        super().__init__(config)
        self.stem = torch.nn.Linear(config.hidden_size, 1)
        self.post_init()


transformers.AutoModel.register(Gemma3nVisionConfig, Timm, exist_ok=True)
SECTIONS = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
}
# two values a key head, of another width
DELTA = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
}
# wide layers, with a window between them
WIDE = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "sliding_window": WINDOW,
    "head_dim": 8,
    "global_head_dim": 16,
    "vocab_size_per_layer_input": V,
    "hidden_size_per_layer_input": 0,
}
# two kinds of layers that share keys, sparse gates in some, a smaller table of the layers' inputs
NANO = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "sliding_window": WINDOW,
    "head_dim": 8,
    "vocab_size_per_layer_input": V - 7,
    "hidden_size_per_layer_input": 12,
    "num_kv_shared_layers": 2,
    "laurel_rank": 6,
    "altup_num_inputs": 3,
    "activation_sparsity_pattern": [0.6, 0.6, 0.0, 0.0, 0.0, 0.0],
}
CASES = {  # case -> (model_type, what differs from SHAPE)
    "llama": ("llama", {}),
    "llama, linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    ),
    "llama, dynamic": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
            "max_position_embeddings": 8,
        },
    ),
    "mistral": ("mistral", {"sliding_window": WINDOW, "head_dim": 12}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "qwen2": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    "gemma": ("gemma", {"head_dim": 12}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 5,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    # of the large model, of the small ones, of the mixture
    "gemma4_text": (
        "gemma4_text",
        WIDE
        | {
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma4_text, reused": (
        "gemma4_text",
        WIDE
        | {
            "hidden_size_per_layer_input": 12,
            "num_kv_shared_layers": 3,
            "use_double_wide_mlp": True,
        },
    ),
    "gemma4_text, experts": (
        "gemma4_text",
        WIDE
        | {
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
        },
    ),
    "gemma3n_text": ("gemma3n_text", NANO | {"final_logit_softcapping": 3.0}),
    # another stream than the first, no layer of one kind before the others
    "gemma3n_text, alike": (
        "gemma3n_text",
        NANO
        | {
            "layer_types": ["sliding_attention"] * 6,
            "altup_active_idx": 1,
            "altup_correct_scale": False,
            "attention_bias": True,
        },
    ),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5}),
    "gpt_neox, sequential": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    "gpt2": ("gpt2", {"n_inner": 40}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "phi3, longrope beyond": (
        "phi3",
        {
            "rope_parameters": LONG | {"original_max_position_embeddings": 8},
            "original_max_position_embeddings": 8,
        },
    ),
    "phi3, longrope": (
        "phi3",
        {
            "rope_parameters": LONG,
            "original_max_position_embeddings": 64,
            "max_position_embeddings": 256,
        },
    ),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "olmo3": (
        "olmo3",
        MIXED
        | {
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ),
    "exaone4": ("exaone4", MIXED),
    "seed_oss": ("seed_oss", {"head_dim": 12}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "cwm": ("cwm", MIXED | {"head_dim": 8}),
    "ministral": ("ministral", MIXED | {"head_dim": 12}),
    "ministral3": (
        "ministral3",
        {"head_dim": 12, "rope_parameters": YARN | {"mscale": 1.0, "llama_4_scaling_beta": 0.7}},
    ),
    "starcoder2": ("starcoder2", {"sliding_window": WINDOW, "tie_word_embeddings": False}),
    "arcee": ("arcee", {"head_dim": 8, "mlp_bias": True}),
    "nemotron": ("nemotron", {"head_dim": 8, "attention_bias": True}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.6,
            "logits_scaling": 2.0,
        },
    ),
    "cohere2": ("cohere2", MIXED | {"logit_scale": 0.5}),
    "glm4": ("glm4", {"head_dim": 8}),
    "phi": ("phi", {}),
    "hunyuan_v1_dense": (
        "hunyuan_v1_dense",
        {
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "dynamic",
                "rope_theta": 1e4,
                "factor": 1.0,
                "alpha": 50.0,
            },
        },
    ),
    "ernie4_5": ("ernie4_5", {"head_dim": 8, "use_bias": True}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 4,
            "moe_layer_interval": 2,
        },
    ),
    "gemma3": (
        "gemma3",
        {
            "text_config": SHAPE | MIXED | {"head_dim": 8, "query_pre_attn_scalar": 5},
            "vision_config": EYES,
            "mm_tokens_per_image": 4,
        },
    ),
    "gemma4": (
        "gemma4",
        {
            "text_config": SHAPE | WIDE | {"hidden_size_per_layer_input": 12},
            "vision_config": EYES,
            "audio_config": None,
        },
    ),
    "gemma3n": (
        "gemma3n",
        {"text_config": SHAPE | NANO, "vision_config": EYES, "audio_config": EARS},
    ),
    "mistral3": (
        "mistral3",
        {
            "text_config": SHAPE
            | {"model_type": "mistral", "head_dim": 8, "sliding_window": WINDOW},
            "vision_config": EYES | {"model_type": "pixtral"},
            "tie_word_embeddings": False,
        },
    ),
    "mistral3, ministral3": (
        "mistral3",
        {
            "text_config": SHAPE
            | {
                "model_type": "ministral3",
                "head_dim": 8,
                "rope_parameters": YARN | {"llama_4_scaling_beta": 0.7},
            },
            "vision_config": EYES | {"model_type": "pixtral"},
            "tie_word_embeddings": False,
        },
    ),
    "qwen2_vl": ("qwen2_vl", {"text_config": SHAPE | SECTIONS, "vision_config": EYES}),
    "qwen2_5_vl": ("qwen2_5_vl", {"text_config": SHAPE | SECTIONS, "vision_config": EYES}),
    "qwen3_vl": (
        "qwen3_vl",
        {"text_config": SHAPE | SECTIONS | {"head_dim": 8}, "vision_config": EYES},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 20,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        MIXED
        | {
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "swiglu_limit": 0.1,
            "swiglu_alpha": 1.3,
            "rope_parameters": YARN | {"truncate": False, "rope_theta": 15e4},
        },
    ),
    "minimax_m2": (
        "minimax_m2",
        {"head_dim": 8, "rotary_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    # patterns of dense layers: every second, and one in the middle
    "qwen3_moe, sparse steps": (
        "qwen3_moe",
        {
            "num_hidden_layers": 5,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "decoder_sparse_step": 2,
        },
    ),
    "qwen2_moe, dense layers": (
        "qwen2_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 20,
            "mlp_only_layers": [1],
        },
    ),
    "dots1": (
        "dots1",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
        },
    ),
    "deepseek_v2": (
        "deepseek_v2",
        LATENT | {"q_lora_rank": None, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        LATENT | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}},
    ),
    "glm4_moe": (
        "glm4_moe",
        {
            "head_dim": 8,
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_group": 3,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "use_qk_norm": True,
        },
    ),
    "glm4_moe_lite": (
        "glm4_moe_lite",
        LATENT | {"mlp_layer_types": ["dense", "dense", "sparse"], "first_k_dense_replace": 2},
    ),
    "solar_open": (
        "solar_open",
        {
            "head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "attention_bias": True,
        },
    ),
    "qwen3_next": ("qwen3_next", DELTA | EXPERTS | {"mlp_only_layers": [1]}),
    "qwen3_5_text": ("qwen3_5_text", DELTA),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", DELTA | EXPERTS),
    "qwen3_5": ("qwen3_5", {"text_config": SHAPE | DELTA, "vision_config": EYES}),
    "qwen3_5_moe": ("qwen3_5_moe", {"text_config": SHAPE | DELTA | EXPERTS, "vision_config": EYES}),
    "opt": ("opt", {"ffn_dim": 40, "word_embed_proj_dim": 32, "dropout": 0.0}),
}
# one of each kind
NOT_TRAINED = "correction_bias|layer_scalar"
GRADIENTS = """llama gemma2 gemma3_text gemma3n_text gemma4_text gpt_neox gpt2 olmo2 mixtral
qwen2_moe glm4_moe cohere2 granite phi gpt_oss deepseek_v3 qwen3_next qwen3_5_text""".split()
GRADIENTS += ["gemma4_text, reused", "gemma4_text, experts"]


def configured(family, changes):
    """Transformers' configuration of a case."""
    whole = changes if "text_config" in changes else SHAPE | changes
    return transformers.CONFIG_MAPPING[family](**whole)


TOWERS = [case for case, (family, _) in CASES.items() if FAMILIES[family].modules]
# what runs a decoder is compared on its text family: a tower's configuration is that one's
DECODERS = [case for case in CASES if case not in TOWERS]
OURS = {case: hf.config_from(configured(*of).to_dict()) for case, of in CASES.items()}
MIXTURES = [case for case, config in OURS.items() if config.num_experts]


def seen_by_decoding(case):
    """What of a case's configuration is read where a cache is: all else is in the layers, which are
    the same ones for whole rows and for a token."""
    c = OURS[case]
    windows, ropes = (
        {bool(window) for window in c.windows},
        {one.kind for one in c.ropes if one.limit},
    )
    kept = (
        c.latent and c.latent.query_rank > 0,
        c.wide and c.wide.key_is_value,
        c.delta and c.delta.fused,
    )
    places = c.learned_positions, c.position_offset, len(c.ropes), -1 in c.layer_ropes
    scores = c.attention_softcap > 0, c.sinks, c.attention_gate, bool(c.query_growth)
    layers = (
        c.reused > 0,
        c.token_inputs > 0,
        bool(c.streams),
        c.num_experts > 0,
        bool(c.dense_layers),
    )
    return sorted(windows), sorted(ropes), kept, places, scores, layers


# the first of each kind
DECODED = list({str(seen_by_decoding(case)): case for case in reversed(DECODERS)}.values())
FURTHER = {"glm4_moe": "model.layers.46.eh_proj.weight", "qwen3_next": "mtp.fc.weight"}


def only(cases):
    """Run a test on some of the cases alone."""
    return pytest.mark.parametrize("peer", cases, indirect=True)


def make_peer(family, changes, path):
    """A tiny random model of transformers, saved, and ours read from it, with its parameters."""
    torch.manual_seed(1)
    config = configured(family, changes)
    config._attn_implementation = "eager"
    auto = transformers.AutoModelForCausalLM
    if "text_config" in changes:
        auto = transformers.AutoModelForImageTextToText
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
        for name, buffer in model.named_buffers():
            if name.endswith(("correction_bias", "layer_scalar")):
                buffer.add_(torch.randn_like(buffer))
    model.save_pretrained(path)
    ours, params = hf.load(str(path), config=hf.load_config(str(path), LENGTH), dtype="float32")
    return model, build(ours, compute_dtype="float32", remat="none"), params


@pytest.fixture(scope="module", params=CASES)
def peer(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("peer")
    model, built, params = make_peer(*CASES[request.param], path)
    apply = jax.jit(lambda params, *fields: built.unembed(params, built.hidden(params, *fields)[0]))
    # one compilation for all tests of the case
    return request.param, path, model, built, params, apply


def padded_rows():
    """One full row, one padded on the right, one on the left."""
    tokens = np.random.default_rng(3).integers(3, V, (3, LENGTH)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[1, 11:] = 0
    segments[2, :7] = 0
    positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0).astype(np.int32) * segments
    return tokens * segments, segments, positions


def test_logits_equal_transformers(peer):
    _, _, theirs, _, params, apply = peer
    tokens, segments, positions = padded_rows()
    with torch.no_grad():
        extra = (
            {} if theirs.config.model_type == "opt" else {"position_ids": torch.tensor(positions)}
        )
        expected = theirs(
            torch.tensor(tokens), attention_mask=torch.tensor(segments), **extra
        ).logits.numpy()
    got = np.asarray(apply(params, tokens, segments, positions))
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(got[segments > 0], expected[segments > 0], atol=1e-4)


@only(DECODERS)
def test_packed_rows_equal_separate_ones(peer):
    _, _, _, model, params, apply = peer
    tokens, segments, positions = padded_rows()
    separate = np.asarray(apply(params, tokens, segments, positions))
    packed = [np.concatenate([x[1, :11], x[2, 11:]])[None] for x in (tokens, segments, positions)]
    packed[1] = np.where(np.arange(LENGTH) < 11, 1, 2).astype(np.int32)[None]
    packed[2] = np.concatenate([np.arange(11), np.arange(7)]).astype(np.int32)[None]
    second = np.concatenate([tokens[2, 11:], np.zeros(11, np.int32)])[None]
    alone = np.asarray(
        apply(
            params,
            *(
                np.repeat(x, 3, 0)
                for x in (
                    second,
                    (np.arange(LENGTH) < 7).astype(np.int32)[None],
                    np.minimum(np.arange(LENGTH), 6).astype(np.int32)[None],
                )
            ),
        )
    )
    got = np.asarray(apply(params, *(np.repeat(x, 3, 0) for x in packed)))[0]
    np.testing.assert_allclose(got[:11], separate[1, :11], atol=1e-5)
    np.testing.assert_allclose(got[11:], alone[0, :7], atol=1e-5)


@only(DECODED)
def test_prefill_and_decode_equal_the_full_forward(peer):
    _, _, theirs, model, params, apply = peer
    tokens, segments, positions = padded_rows()
    full = np.asarray(
        apply(
            params,
            np.where(segments > 0, tokens, 5),
            np.ones_like(segments),
            np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape),
        )
    )
    tokens = np.where(segments > 0, tokens, 5)
    prompts = np.array([8, 3, 1])  # rows of different lengths, padded on the right
    width = prompts.max()
    real = (np.arange(width)[None] < prompts[:, None]).astype(np.int32)
    places = np.broadcast_to(np.arange(width, dtype=np.int32), real.shape) * real
    cache = model.init_cache(3, LENGTH, jnp.float32)
    windows = model.config.windows
    # a ring where every layer has a window
    assert cache.held.keys.shape[2] == (WINDOW if all(windows) else LENGTH)
    hidden, cache = jax.jit(model.prefill)(params, tokens[:, :width] * real, real, places, cache)
    filled, first = cache, np.asarray(jax.jit(model.unembed)(params, hidden))
    decode = jax.jit(
        lambda *fields: (lambda h, c: (model.unembed(params, h), c))(*model.decode(params, *fields))
    )
    for row, count in enumerate(prompts):
        np.testing.assert_allclose(first[row, :count], full[row, :count], atol=1e-4)
    for step in range(LENGTH - width):
        at = prompts + step
        logits, cache = decode(tokens[np.arange(3), at], at.astype(np.int32), cache)
        np.testing.assert_allclose(np.asarray(logits), full[np.arange(3), at], atol=1e-4)
    greedy = [np.argmax(first[np.arange(3), prompts - 1], axis=-1).astype(np.int32)]
    cache = filled
    for step in range(LENGTH - width - 1):
        logits, cache = decode(greedy[-1], (prompts + step).astype(np.int32), cache)
        greedy.append(np.argmax(np.asarray(logits), axis=-1).astype(np.int32))
    if model.config.run_length > model.config.limit > 0:
        return  # transformers changes its angles on the way, and keeps the earlier keys
    theirs.generation_config.eos_token_id = None
    for row, count in enumerate(prompts):
        prompt = torch.tensor(tokens[row : row + 1, :count].astype(np.int64))
        text = theirs.generate(prompt, max_new_tokens=len(greedy), do_sample=False)
        assert text[0, count:].tolist() == [int(one[row]) for one in greedy]


def test_export_of_import_is_byte_identical(peer, tmp_path):
    _, path, theirs, model, params, _ = peer
    hf.save(str(tmp_path), model.config, params, beside=str(path))
    before, after = load_file(path / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        type(theirs).__name__
    ]
    with torch.no_grad():
        again = type(theirs).from_pretrained(tmp_path, attn_implementation="eager")
        tokens = torch.tensor(padded_rows()[0][:1])
        # the same weights, by the lines above; how they lie in memory moves a product's last bits
        torch.testing.assert_close(again(tokens).logits, theirs(tokens).logits)


@only([case for case in MIXTURES if case != "gpt_oss"])  # whose files are like its modules
def test_experts_are_read_as_modules_of_transformers_hold_them(peer, tmp_path):
    _, _, theirs, _, params, _ = peer
    theirs.save_pretrained(tmp_path, save_original_format=False)
    assert any(
        ".experts.gate_up_proj" in name for name in load_file(tmp_path / "model.safetensors")
    )
    _, again = hf.load(str(tmp_path), dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, again, params)


@only(TOWERS)
def test_a_tower_is_configured_as_its_text_family(peer):
    _, _, theirs, model, _, _ = peer
    text = theirs.config.text_config.to_dict()
    kind = towers.TEXT[text["model_type"]][0]
    alone = hf.config_from(text | {"model_type": kind})
    names = ("family", "hf", "tied", "run_length", "end_tokens")
    own = {name: getattr(model.config, name) for name in names}
    assert dataclasses.replace(alone, **own) == model.config
    assert kind in {family for family, _ in CASES.values()}


@only([case for case in TOWERS if case not in ("gemma3n", "gemma4")])  # of one spelling
def test_newer_names_of_a_text_tower_are_read(peer, tmp_path):
    _, path, _, model, params, _ = peer
    family = model.config.family
    row = FAMILIES[family]
    tensors = load_file(path / "model.safetensors")
    renamed = {
        name
        if name.startswith("model.visual")
        else "model." + name
        if re.search(row.carried, name)
        else hf.as_module(name, family): tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, tmp_path / "model.safetensors")
    # a head that another flag denies is used all the same
    said = json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(said))
    config, again = hf.load(str(tmp_path), dtype="float32")
    assert config.tied == model.config.tied
    jax.tree.map(np.testing.assert_array_equal, again, params)


@only(FURTHER)
def test_what_is_beside_the_decoder_is_carried_and_never_over_it(peer, tmp_path):
    case, path, *_ = peer
    tensors = load_file(path / "model.safetensors")
    more = {FURTHER[case]: torch.arange(6.0)}
    save_file(tensors | more, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    config, again = hf.load(str(tmp_path), dtype="float32")
    halves = jax.tree.map(lambda x: x / 2, again)
    hf.save(str(tmp_path / "out"), config, halves, beside=str(tmp_path))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == (tensors | more).keys()
    for name, tensor in (tensors | more).items():
        assert torch.equal(written[name], tensor if name in more else tensor / 2), name


@only(["deepseek_v3"])
def test_kimi_k2_is_deepseek_v3(peer, tmp_path):
    case, path, _, model, params, _ = peer
    said = json.loads((path / "config.json").read_text()) | {"model_type": "kimi_k2"}
    (tmp_path / "config.json").write_text(json.dumps(said))
    (tmp_path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    config, again = hf.load(str(tmp_path), dtype="float32")
    own = dict(family=case, hf=model.config.hf, run_length=model.config.run_length)
    assert dataclasses.replace(config, **own) == model.config
    assert config.to_hf()["model_type"] == "kimi_k2"
    jax.tree.map(np.testing.assert_array_equal, again, params)


@only(GRADIENTS)
def test_gradients_equal_transformers(peer, tmp_path):
    case, _, theirs, model, params, _ = peer
    large = case.startswith("gemma4")
    tokens, segments, positions = (jnp.asarray(x[:1]) for x in padded_rows())
    theirs.zero_grad()
    torch.nn.functional.cross_entropy(
        theirs(torch.tensor(tokens.tolist())).logits[0, :-1], torch.tensor(tokens[0, 1:].tolist())
    ).backward()

    def loss(params):
        logits = model.unembed(params, model.hidden(params, tokens, segments, positions)[0])[0, :-1]
        return -jnp.mean(
            jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[0, 1:, None], axis=-1)
        )

    hf.save(str(tmp_path), model.config, jax.jit(jax.grad(loss))(params))
    ours = load_file(tmp_path / "model.safetensors")
    theirs.save_pretrained(
        tmp_path / "peer",
        state_dict={name: parameter.grad for name, parameter in theirs.named_parameters()}
        | {name: x * 0 for name, x in theirs.named_buffers() if re.search(NOT_TRAINED, name)},
    )
    expected = load_file(tmp_path / "peer" / "model.safetensors")
    assert ours.keys() == expected.keys()
    # Gemma 4's reach 7 here, the others' 1: the bound is a share of the largest one
    near = 1e-4 * max(float(x.abs().max()) for x in expected.values()) if large else 1e-4
    for name, gradient in expected.items():
        np.testing.assert_allclose(ours[name].numpy(), gradient.numpy(), atol=near, err_msg=name)


def test_every_family_is_compared_with_transformers():
    # transformers has kimi_k2 as remote code alone
    assert {family for family, _ in CASES.values()} == set(FAMILIES) - {"kimi_k2"}
    listed = (pathlib.Path(__file__).parents[2] / "docs/families.md").read_text()
    assert not [family for family in FAMILIES if f"`{family}`" not in listed]


def test_what_the_page_calls_not_there_is_refused_by_its_name():
    page = (pathlib.Path(__file__).parents[2] / "docs/families.md").read_text()
    rows = re.findall(r"^\| (`.*?) \| ", page.split("**Not there**")[1], re.MULTILINE)
    names = [
        name for row in rows[1:] for name in re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", row))
    ]
    assert {"llama4", "mistral4", "mellum"} < set(names)
    for name in names:
        with pytest.raises(ValueError, match=f"^model_type = '{name}' is unknown"):
            hf.config_from({"model_type": name})
