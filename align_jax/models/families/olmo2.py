# SPDX-License-Identifier: Apache-2.0
"""OLMo 2: norms after attention and MLP, and over all of query and key (OLMo team 2024, arXiv
2501.00656)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import llama
from align_jax.models.tensor_map import TensorMap, norm


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration."""
    return decoder_config(hf, complete(hf), qk_norm="full", norm_inputs=False, norm_outputs=True)


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """Return the tensor map."""
    name = "model.layers.{layer}"
    return [
        *llama.ends(config),
        *llama.attention(config),
        *llama.mlp(config),
        *norm(f"{name}.post_attention_layernorm", "layers/attention_out_norm", "rms"),
        *norm(f"{name}.post_feedforward_layernorm", "layers/mlp_out_norm", "rms"),
    ]
