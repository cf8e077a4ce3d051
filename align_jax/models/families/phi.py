# SPDX-License-Identifier: Apache-2.0
"""Phi 1, 1.5 and 2: attention and MLP side by side behind one norm, biases everywhere (Gunasekar
et al. 2023, arXiv 2306.11644)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import llama
from align_jax.models.tensor_map import TensorMap, linear, norm


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration.

    Raises:
        ValueError: norms of queries and keys, which no published model has.
    """
    full = complete(hf)
    if full["qk_layernorm"]:
        raise ValueError("phi: qk_layernorm: expected false, got true")
    return decoder_config(
        hf,
        full,
        partial_rotary=True,
        norm="layer",
        norm_eps=full["layer_norm_eps"],
        gated=False,
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        head_bias=True,
        parallel_residual=True,
        shared_norm=True,
    )


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """Return the tensor map."""
    name = "model.layers.{layer}"
    out = [
        TensorMap("model.embed_tokens.weight", "embed/tokens", "V D -> V D"),
        *norm("model.final_layernorm", "final_norm", "layer"),
        *norm(f"{name}.input_layernorm", "layers/attention_norm", "layer"),
        *llama.attention(config, output="dense"),
        *linear(f"{name}.mlp.fc1", "layers/mlp/up", "F D -> D F", "F -> F"),
        *linear(f"{name}.mlp.fc2", "layers/mlp/down", "D F -> F D", "D -> D"),
    ]
    return out if config.tied else out + linear("lm_head", "output", "V D -> D V", "V -> V")
