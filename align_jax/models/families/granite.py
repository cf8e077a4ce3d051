# SPDX-License-Identifier: Apache-2.0
"""Granite 3: Llama with scalars on embeddings, attention, residuals and logits (IBM 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import llama

tensor_maps = llama.tensor_maps


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration."""
    full = complete(hf)
    return decoder_config(
        hf,
        full,
        embed_scale=float(full["embedding_multiplier"]),
        query_scale=float(full["attention_multiplier"]),
        residual_scale=float(full["residual_multiplier"]),
        output_scale=1 / full["logits_scaling"],
    )
