# SPDX-License-Identifier: Apache-2.0
"""ERNIE 4.5's mixtures of experts, whose choice by a softmax has a correcting bias (Baidu 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import llama, qwen3_moe
from align_jax.models.tensor_map import TensorMap, by_kind

# the weights' least sum, which real ones do not reach
LEAST = 1e-6


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration.

    Raises:
        ValueError: biases; a bound on the weights' sum that they may reach.
    """
    full = complete(hf)
    if full["use_bias"]:
        raise ValueError("use_bias: expected false, as the released models have it; got true")
    if full["moe_norm_min"] > LEAST:
        raise ValueError(f"moe_norm_min: expected at most {LEAST}, got {full['moe_norm_min']}")
    width, step = full["moe_intermediate_size"], full["moe_layer_interval"]
    first, last = full["moe_layer_start_index"], full["moe_layer_end_index"]
    layers = range(full["num_hidden_layers"])
    return decoder_config(
        hf,
        full,
        rope_interleaved=True,
        intermediate_size=width,
        num_experts=full["moe_num_experts"],
        experts_per_token=full["moe_k"],
        routing="corrected",
        dense_layers=tuple(n for n in layers if (n + 1) % step or not first <= n <= last),
        dense_size=full["intermediate_size"],
        shared_size=width * full["moe_num_shared_experts"],
    )


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """Return the tensor map."""
    common = [*llama.norms(config), *llama.attention(config)]
    name = "model.layers.{layer}.mlp"
    bias = f"{name}.moe_statics.e_score_correction_bias"
    experts = [*qwen3_moe.experts(name), TensorMap(bias, "layers/moe/bias", "1:0 E -> E")]
    if config.shared_size:
        experts += llama.mlp(config, f"{name}.shared_experts", "layers/shared", "f")
    return [*llama.ends(config), *by_kind(config, common, experts, qwen3_moe.dense(config))]
