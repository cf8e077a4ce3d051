# SPDX-License-Identifier: Apache-2.0
"""Starcoder 2: layer norms, biases and a plain MLP (Lozhkov et al. 2024, arXiv 2402.19173)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import llama
from align_jax.models.tensor_map import TensorMap, linear


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration."""
    full = complete(hf)
    bias = bool(full["use_bias"])
    return decoder_config(
        hf,
        full,
        norm="layer",
        norm_eps=full["norm_epsilon"],
        gated=False,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
    )


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """Return the tensor map."""
    name = "model.layers.{layer}.mlp"
    up, down = ("F -> F", "D -> D") if config.mlp_bias else ("", "")
    return [
        *llama.ends(config),
        *llama.norms(config),
        *llama.attention(config),
        *linear(f"{name}.c_fc", "layers/mlp/up", "F D -> D F", up),
        *linear(f"{name}.c_proj", "layers/mlp/down", "D F -> F D", down),
    ]
