# SPDX-License-Identifier: Apache-2.0
"""Ministral 3: Mistral whose queries grow with every context that lies behind them (Mistral AI
2025; transformers 5, ``Ministral3Attention``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import llama

tensor_maps = llama.tensor_maps


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration.

    Raises:
        ValueError: queries that grow, and no context by which they do.
    """
    full = complete(hf)
    parts = dict(full["rope_parameters"])
    rate, every = parts.pop("llama_4_scaling_beta", None), "original_max_position_embeddings"
    if rate and not parts.get(every):
        raise ValueError(f"rope_parameters.llama_4_scaling_beta: expected {every} too, got none")
    growth = (float(rate), parts[every]) if rate else None
    return decoder_config(hf, full | {"rope_parameters": parts}, query_growth=growth)
