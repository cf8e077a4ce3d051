# SPDX-License-Identifier: Apache-2.0
"""DeepSeek V3 and R1: latent attention, GLM 4.5's kind of experts (DeepSeek-AI 2024, arXiv
2412.19437)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from align_jax.models.config import Latent, ModelConfig, complete, decoder_config, rope_from_hf
from align_jax.models.families import glm4_moe, llama, qwen3_moe
from align_jax.models.tensor_map import TensorMap, by_kind, linear, norm


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration.

    Raises:
        ValueError: another way to choose experts than the released models'.
    """
    full = complete(hf)
    check_routing(hf, scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1)
    fields = latent_fields(full) | glm4_moe.expert_fields(full)
    return decoder_config(hf, full, rope_interleaved=full["rope_interleave"], **fields)


def check_routing(hf: Mapping[str, Any], **computed: Any) -> None:
    """Refuse what the released configurations say of experts and transformers passes over, where
    it is not what is computed.

    Raises:
        ValueError: all such keys.
    """
    wrong = [
        f"{key}: expected {value!r}, which is what transformers computes; got {hf[key]!r}"
        for key, value in computed.items()
        if hf.get(key) not in (None, value)
    ]
    if wrong:
        raise ValueError("; ".join(wrong))


def latent_fields(full: Mapping[str, Any]) -> dict[str, Any]:
    """Return what latent attention has.

    Raises:
        ValueError: heads of another width, or fewer that have keys.
    """
    turning, width = full["qk_rope_head_dim"], full["qk_rope_head_dim"] + full["qk_nope_head_dim"]
    for key, known in (
        ("head_dim", (turning, width)),  # transformers writes the first, others what it is
        ("num_key_value_heads", (full["num_attention_heads"],)),
    ):
        if full.get(key) not in (None, *known):
            said = " or ".join(map(str, known))
            raise ValueError(f"{key}: expected {said}, as latent attention has; got {full[key]}")
    rope = rope_from_hf(full["rope_parameters"], turning, full["max_position_embeddings"])
    scale, all_dim = width**-0.5, rope.option("mscale_all_dim")
    if rope.kind != "default" and all_dim and (factor := rope.option("factor", 1)) > 1:
        scale *= (0.1 * all_dim * math.log(factor) + 1) ** 2
    rank, queries = full["kv_lora_rank"], full["q_lora_rank"] or 0
    return dict(
        latent=Latent(rank, queries, turning, full["v_head_dim"]),
        head_dim=width,
        num_kv_heads=full["num_attention_heads"],
        query_scale=scale,
        ropes=(rope,),
    )


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """Return the tensor map."""
    common = [*llama.norms(config), *attention(config)]
    experts, dense = glm4_moe.experts(config), qwen3_moe.dense(config)
    return [*llama.ends(config), *by_kind(config, common, experts, dense)]


def attention(config: ModelConfig) -> list[TensorMap]:
    """Return latent attention's tensors."""
    name, path = "model.layers.{layer}.self_attn", "layers/attention"
    bias = config.attention_bias

    def low(theirs: str, ours: str, width: str) -> list[TensorMap]:
        shift = f"{width} -> {width}" if bias else ""
        return linear(f"{name}.{theirs}", f"{path}/{ours}", f"{width} D -> D {width}", shift)

    queries = linear(f"{name}.q_proj", f"{path}/query", "(H h) D -> D H h")
    if config.latent and config.latent.query_rank:
        queries = [
            *low("q_a_proj", "query_a", "q"),
            *norm(f"{name}.q_a_layernorm", f"{path}/query_norm", "rms", "q"),
            *linear(f"{name}.q_b_proj", f"{path}/query_b", "(H h) q -> q H h"),
        ]
    return [
        *queries,
        *low("kv_a_proj_with_mqa", "key_value_a", "z"),
        *norm(f"{name}.kv_a_layernorm", f"{path}/latent_norm", "rms", "c"),
        *linear(f"{name}.kv_b_proj", f"{path}/key_value_b", "(H w) c -> c H w"),
        *linear(f"{name}.o_proj", f"{path}/output", "D (H v) -> H v D", "D -> D" if bias else ""),
    ]
