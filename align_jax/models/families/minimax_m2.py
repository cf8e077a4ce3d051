# SPDX-License-Identifier: Apache-2.0
"""MiniMax M2: experts chosen by sigmoids, norms over all heads (MiniMax 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import mixtral
from align_jax.models.tensor_map import TensorMap


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration."""
    full = complete(hf)
    return decoder_config(
        hf,
        full,
        partial_rotary=True,
        qk_norm="full",
        num_experts=full["num_local_experts"],
        experts_per_token=full["num_experts_per_tok"],
        routing="sigmoid",
    )


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """Return the tensor map."""
    name = "model.layers.{layer}.block_sparse_moe.e_score_correction_bias"
    return [*mixtral.tensor_maps(config), TensorMap(name, "layers/moe/bias", "E -> E")]
