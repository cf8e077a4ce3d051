# SPDX-License-Identifier: Apache-2.0
"""GLM 4 (0414): norms before and after, neighboring features turn together (arXiv 2406.12793)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import llama, phi3
from align_jax.models.tensor_map import TensorMap, norm


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration."""
    return decoder_config(
        hf,
        complete(hf),
        partial_rotary=True,
        norm_outputs=True,
        rope_interleaved=True,
        output_bias=False,
    )


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """Return the tensor map."""
    name = "model.layers.{layer}"
    return [
        *llama.ends(config),
        *llama.norms(config),
        *llama.attention(config),
        *phi3.mlp(),
        *norm(f"{name}.post_self_attn_layernorm", "layers/attention_out_norm", config.norm),
        *norm(f"{name}.post_mlp_layernorm", "layers/mlp_out_norm", config.norm),
    ]
