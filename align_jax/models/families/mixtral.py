# SPDX-License-Identifier: Apache-2.0
"""Mixtral: Mistral with a mixture of experts in every layer (Jiang et al. 2024, arXiv
2401.04088)."""

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
        num_experts=full["num_local_experts"],
        experts_per_token=full["num_experts_per_tok"],
    )


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """Return the tensor map."""
    name = "model.layers.{layer}.block_sparse_moe"
    return [
        *llama.ends(config),
        *llama.norms(config),
        *llama.attention(config),
        TensorMap(f"{name}.gate.weight", "layers/moe/router", "E D -> D E"),
        TensorMap(name + ".experts.{expert}.w1.weight", "layers/moe/gate", "F D -> D F"),
        TensorMap(name + ".experts.{expert}.w3.weight", "layers/moe/up", "F D -> D F"),
        TensorMap(name + ".experts.{expert}.w2.weight", "layers/moe/down", "D F -> F D"),
    ]
