# SPDX-License-Identifier: Apache-2.0
"""What the fields of a Hugging Face configuration may be: of those that we read, every one."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from align_jax.core.fields import (
    Kind,
    faults,
    is_above_zero,
    is_bool,
    is_count,
    is_integer,
    is_list_of,
    is_not_below_zero,
    is_number,
    is_object,
    is_text,
    or_null,
)
from align_jax.core.files import json_kind

MOST = 10_000  # layers or experts: more is a damaged number, and would be counted through


def _is_few(value: Any) -> bool:
    return is_count(value) and value <= MOST


def _is_some(value: Any) -> bool:
    return value == 0 or _is_few(value)


def _is_part(value: Any) -> bool:
    return is_number(value) and 0 < value <= 1


def _is_small(value: Any) -> bool:
    return is_number(value) and 0 < value < 1


def _is_rest(value: Any) -> bool:
    return is_number(value) and 0 <= value < 1


def _is_base(value: Any) -> bool:
    return is_number(value) and value > 1


def _is_attention(value: Any) -> bool:
    return value in ("full_attention", "sliding_attention", "linear_attention")


def _is_flag(value: Any) -> bool:
    return value in (0, 1)


def _is_dtype(value: Any) -> bool:
    return value in ("float32", "bfloat16", "float16", "float64")


def _is_ids(value: Any) -> bool:
    return value is None or is_integer(value) or is_list_of(is_integer)(value)


# of every family's configuration, the fields that we read
FIELDS = (
    Kind(
        "a positive integer",
        is_count,
        tuple(
            """vocab_size hidden_size num_attention_heads max_position_embeddings n_embd
            n_head n_positions ffn_dim word_embed_proj_dim num_experts_per_tok kv_lora_rank
            qk_rope_head_dim qk_nope_head_dim v_head_dim
            shared_expert_intermediate_size linear_num_key_heads linear_num_value_heads
            linear_key_head_dim linear_value_head_dim linear_conv_kernel_dim
            vocab_size_per_layer_input full_attention_interval decoder_sparse_step
            altup_num_inputs laurel_rank moe_k moe_num_experts moe_layer_interval""".split()
        ),
    ),
    Kind(
        "a positive integer, or in some families a list with one for each layer",
        lambda value: is_count(value) or is_list_of(is_count)(value),
        ("intermediate_size",),
    ),
    Kind(
        f"an integer from 1 to {MOST}",
        _is_few,
        ("num_hidden_layers", "n_layer", "num_local_experts", "n_routed_experts"),
    ),
    Kind(f"an integer from 1 to {MOST} or null", or_null(_is_few), ("num_experts",)),
    Kind(
        "a positive integer or null",
        or_null(is_count),
        tuple(
            """num_key_value_heads head_dim n_inner sliding_window align_jax_run_length n_group
            topk_group q_lora_rank moe_intermediate_size top_k_experts global_head_dim
            num_global_key_value_heads""".split()
        ),
    ),
    Kind(
        "a number between 0 and 1",
        _is_small,
        ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    ),
    Kind(
        "a number above 0",
        is_above_zero,
        tuple(
            """query_pre_attn_scalar logit_scale logits_scaling embedding_multiplier
            attention_multiplier residual_multiplier routed_scaling_factor swiglu_limit
            swiglu_alpha altup_coef_clip""".split()
        ),
    ),
    Kind(
        "a number above 0 or null",
        or_null(is_above_zero),
        ("attn_logit_softcapping", "final_logit_softcapping"),
    ),
    Kind("a number above 1", _is_base, ("rope_theta", "rope_local_base_freq", "rotary_emb_base")),
    Kind("a number above 0, at most 1", _is_part, ("partial_rotary_factor", "rotary_pct")),
    Kind(
        "a number, at least 0", is_not_below_zero, ("initializer_range", "init_std", "moe_norm_min")
    ),
    Kind("an integer", is_integer, ("moe_layer_end_index",)),
    Kind(
        "an integer, at least 0",
        _is_some,
        tuple(
            """first_k_dense_replace n_shared_experts num_kv_shared_layers
            hidden_size_per_layer_input altup_active_idx moe_num_shared_experts
            moe_layer_start_index""".split()
        ),
    ),
    Kind(
        "true or false",
        is_bool,
        tuple(
            """attention_bias mlp_bias tie_word_embeddings use_parallel_residual
            do_layer_norm_before enable_bias layer_norm_elementwise_affine scale_attn_weights
            scale_attn_by_inverse_layer_idx add_cross_attention norm_topk_prob
            use_sliding_window attention_out_bias qk_layernorm qkv_bias use_qk_norm
            rope_interleave attention_k_eq_v enable_moe_block use_double_wide_mlp
            altup_correct_scale""".split()
        ),
    ),
    Kind("true, false or null", or_null(is_bool), ("use_bias",)),
    Kind(
        "true, false, 'vision', 'all' or null",
        lambda value: value in (None, True, False, "vision", "all") and not is_number(value),
        ("use_bidirectional_attention",),
    ),
    Kind("the name of an activation", is_text, ("hidden_act", "activation_function")),
    Kind("the name of an activation or null", or_null(is_text), ("hidden_activation",)),
    Kind(
        "an object or null",
        or_null(is_object),
        ("rope_parameters", "rope_scaling", "id2label", "label2id", "per_layer_config"),
    ),
    Kind(
        "a list with 'full_attention', 'sliding_attention' or 'linear_attention' for each layer, "
        "or null",
        or_null(is_list_of(_is_attention)),
        ("layer_types",),
    ),
    Kind(
        "a list with 0 or 1 for each layer, or null",
        or_null(is_list_of(_is_flag)),
        ("no_rope_layers",),
    ),
    Kind(
        "a list with a number from 0 to below 1 for each layer, or null",
        or_null(is_list_of(_is_rest)),
        ("activation_sparsity_pattern",),
    ),
    Kind("an integer or null", or_null(is_integer), ("bos_token_id", "pad_token_id")),
    Kind("an integer, a list of them or null", _is_ids, ("eos_token_id",)),
    Kind("a list of integers, or null", or_null(is_list_of(is_integer)), ("mlp_only_layers",)),
    Kind("a list of text, or null", or_null(is_list_of(is_text)), ("architectures",)),
    Kind(
        "a list with 'dense' or 'sparse' for each layer, or null",
        or_null(is_list_of(lambda value: value in ("dense", "sparse"))),
        ("mlp_layer_types",),
    ),
    Kind(
        "'float32', 'bfloat16', 'float16', 'float64' or null",
        or_null(_is_dtype),
        ("dtype", "torch_dtype"),
    ),
)
# of a rotary embedding's scaling
ROPE_FIELDS = (
    Kind("a number above 1", _is_base, ("rope_theta",)),
    Kind("a number above 0, at most 1", _is_part, ("partial_rotary_factor",)),
    Kind("a name", is_text, ("rope_type", "type")),
    Kind(
        "a number above 0 or null",
        or_null(is_above_zero),
        tuple(
            """factor alpha low_freq_factor high_freq_factor attention_factor beta_fast
            beta_slow""".split()
        ),
    ),
    Kind(
        "a number, at least 0, or null",
        or_null(is_not_below_zero),
        ("mscale", "mscale_all_dim", "llama_4_scaling_beta"),
    ),
    Kind(
        "a positive integer or null",
        or_null(is_count),
        ("original_max_position_embeddings", "max_position_embeddings"),
    ),
    Kind("a list of numbers above 0", is_list_of(is_above_zero), ("short_factor", "long_factor")),
    Kind("true or false", is_bool, ("truncate",)),
)
# kind of scaling -> what it cannot do without
ROPE_KINDS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"),
    "proportional": (),
}
# and what it reads beside that
_ROPE_MORE: Mapping[str, tuple[str, ...]] = {
    "yarn": tuple("attention_factor beta_fast beta_slow mscale mscale_all_dim truncate".split()),
    "longrope": ("factor", "attention_factor"),
    "proportional": ("factor", "partial_rotary_factor"),
}
# what no scaling reads as a number of its own: images' positions, where a model came from, the
# context before it was stretched
_ROPE_HARMLESS = frozenset(
    """mrope_section mrope_interleaved finetuned original_max_position_embeddings""".split()
)


def rope_unread(kind: str, options: Mapping[str, Any], positions: int) -> list[str]:
    """Return the keys of a rotary embedding that its kind passes over, and that say something.

    Args:
        kind: one of ``ROPE_KINDS``.
        options: its keys, but for kind and base.
        positions: the model's, which is what these are though the keys say otherwise.
    """
    read = {*ROPE_KINDS[kind], *_ROPE_MORE.get(kind, ()), *_ROPE_HARMLESS}
    # what it has where it is not given, and what changes nothing
    neutral = {"beta_fast": 32, "max_position_embeddings": positions}
    return [
        key
        for key, value in options.items()
        if key not in read and value not in (None, False, neutral.get(key, 1))
    ]


def _quantized(found: Any, family: str) -> list[str]:
    """Return what is wrong with a ``quantization_config``: fp8 is read, and gpt-oss' own MXFP4."""
    if not is_object(found):
        return [f"quantization_config: expected an object, got {json_kind(found)}"]
    method, form = found.get("quant_method", "an unnamed method"), found.get("format")
    block = found.get("weight_block_size")
    if method == "fp8" and not (block is None or is_list_of(is_count)(block) and len(block) == 2):
        return [f"weight_block_size: expected two positive integers or null, got {block!r}"]
    if method == "fp8" or (method, family) == ("mxfp4", "gpt_oss"):
        return []
    if (method, form) == ("compressed-tensors", "float-quantized"):
        return []
    return [
        "quantization_config: expected float weights, fp8, or compressed-tensors' float-quantized, "
        f"got ones quantized by {method}{f' as {form}' if form else ''} (transformers' "
        "model.dequantize() and save_pretrained write floats)"
    ]


def quantization(hf: Mapping[str, Any]) -> Any:
    """Return what a configuration says of codes for weights, in any of the places where it may."""
    text = hf.get("text_config")
    for part in (hf, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            if part.get(key) is not None:
                return part[key]
    return None


def _declared(family: Any) -> set[str]:
    """Return the fields that transformers' class has."""
    from transformers import CONFIG_MAPPING  # here, because importing it takes seconds

    if family not in CONFIG_MAPPING:
        return set()
    return {field.name for field in dataclasses.fields(CONFIG_MAPPING[family])}


def check(hf: Mapping[str, Any]) -> None:
    """Refuse a Hugging Face configuration with a field of a wrong type or an impossible value.

    Raises:
        ValueError: all such fields; weights that are not floats; a key that a known one was
            probably meant by.
    """
    read = dict(hf)
    if hf.get("use_sliding_window") is False and hf.get("sliding_window") == 0:
        del read["sliding_window"]  # as transformers writes it where there is none
    wrong = faults(read, FIELDS)
    for key in ("rope_parameters", "rope_scaling"):
        rope = hf.get(key)
        if isinstance(rope, Mapping):
            wrong += faults(rope, ROPE_FIELDS, f"{key}.")
            for kind, part in rope.items():  # where each kind of layer has its own
                if isinstance(part, Mapping):
                    wrong += faults(part, ROPE_FIELDS, f"{key}.{kind}.")
    known = [name for kind in FIELDS for name in kind.names]
    absent = [name for name in known if name not in hf]
    for key in hf.keys() - set(known) - _declared(hf.get("model_type")):
        if close := difflib.get_close_matches(key, absent, n=1, cutoff=0.9):
            wrong.append(f"{key} is no field; did you mean {close[0]}?")
    if (found := quantization(hf)) is not None:
        wrong += _quantized(found, hf.get("model_type", ""))
    if wrong:
        raise ValueError("; ".join(wrong))
