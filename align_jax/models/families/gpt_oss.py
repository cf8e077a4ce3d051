# SPDX-License-Identifier: Apache-2.0
"""gpt-oss: attention with sinks, windows on every second layer, experts with biases and a clipped
gate (OpenAI 2025, arXiv 2508.10925)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import llama
from align_jax.models.tensor_map import TensorMap


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration."""
    full = complete(hf)
    return decoder_config(
        hf,
        full,
        sinks=True,
        num_experts=full["num_local_experts"],
        experts_per_token=full["num_experts_per_tok"],
        expert_bias=True,
        glu_limit=float(full["swiglu_limit"]),
        glu_gain=float(full["swiglu_alpha"]),
    )


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """Return the tensor map: gate and up stand feature by feature in one tensor."""
    name = "model.layers.{layer}"
    experts, path = f"{name}.mlp.experts", "layers/moe"
    return [
        *llama.ends(config),
        *llama.norms(config),
        *llama.attention(config),
        TensorMap(f"{name}.self_attn.sinks", "layers/attention/sinks", "H -> H"),
        TensorMap(f"{name}.mlp.router.weight", f"{path}/router", "E D -> D E"),
        TensorMap(f"{name}.mlp.router.bias", f"{path}/router_bias", "E -> E"),
        TensorMap(f"{experts}.gate_up_proj", f"{path}/gate", "E D (F 2:0) -> E D F"),
        TensorMap(f"{experts}.gate_up_proj", f"{path}/up", "E D (F 2:1) -> E D F"),
        TensorMap(f"{experts}.gate_up_proj_bias", f"{path}/gate_bias", "E (F 2:0) -> E F"),
        TensorMap(f"{experts}.gate_up_proj_bias", f"{path}/up_bias", "E (F 2:1) -> E F"),
        TensorMap(f"{experts}.down_proj", f"{path}/down", "E F D -> E F D"),
        TensorMap(f"{experts}.down_proj_bias", f"{path}/down_bias", "E D -> E D"),
    ]
