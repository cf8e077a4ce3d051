# SPDX-License-Identifier: Apache-2.0
"""Qwen 1.5's and 2's mixtures of experts, one of which every token passes (Yang et al. 2024, arXiv
2407.10671)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import llama, qwen3_moe
from align_jax.models.tensor_map import TensorMap, by_kind


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration."""
    full = complete(hf)
    return decoder_config(
        hf,
        full,
        attention_bias=full["qkv_bias"],
        output_bias=False,
        normalize_experts=full["norm_topk_prob"],
        **expert_fields(full),
        **qwen3_moe.dense_fields(full),
    )


def expert_fields(full: Mapping[str, Any]) -> dict[str, Any]:
    """Return what experts have one of which every token passes, scaled by a sigmoid."""
    return dict(
        intermediate_size=full["moe_intermediate_size"],
        num_experts=full["num_experts"],
        experts_per_token=full["num_experts_per_tok"],
        shared_size=full["shared_expert_intermediate_size"],
        shared_gate=True,
    )


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """Return the tensor map."""
    common = [*llama.norms(config), *llama.attention(config)]
    parts = by_kind(config, common, experts(config), qwen3_moe.dense(config))
    return [*llama.ends(config), *parts]


def experts(config: ModelConfig) -> list[TensorMap]:
    """Return the tensors of a layer behind its attention."""
    name = "model.layers.{layer}.mlp"
    return [
        *qwen3_moe.experts(name),
        *llama.mlp(config, f"{name}.shared_expert", "layers/shared", "f"),
        TensorMap(f"{name}.shared_expert_gate.weight", "layers/shared_gate", "1 D -> D 1"),
    ]
