# SPDX-License-Identifier: Apache-2.0
"""Command R7B and A: attention and MLP side by side behind one norm, neighboring features turn
together where there is a window, none elsewhere (Cohere 2025, arXiv 2504.00698)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import llama
from align_jax.models.tensor_map import TensorMap, norm


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration."""
    full = complete(hf)
    return decoder_config(
        hf,
        full,
        norm="centered",
        norm_eps=full["layer_norm_eps"],
        parallel_residual=True,
        shared_norm=True,
        rope_interleaved=True,
        output_scale=float(full["logit_scale"]),
        layer_ropes=tuple(0 if kind == "sliding_attention" else -1 for kind in full["layer_types"]),
    )


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """Return the tensor map."""
    return [
        *llama.ends(config),
        *norm("model.layers.{layer}.input_layernorm", "layers/attention_norm", config.norm),
        *llama.attention(config),
        *llama.mlp(config),
    ]
