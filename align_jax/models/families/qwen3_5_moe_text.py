# SPDX-License-Identifier: Apache-2.0
"""Qwen 3.5's mixtures of experts, in every layer (Qwen team 2026)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import qwen2_moe, qwen3_5_text, qwen3_next
from align_jax.models.tensor_map import TensorMap


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration."""
    full = complete(hf)
    fields = qwen3_next.delta_fields(full, fused=False) | qwen2_moe.expert_fields(full)
    return decoder_config(hf, full, partial_rotary=True, **fields)


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """Return the tensor map."""
    maps, experts = qwen3_5_text.delta_maps(config), qwen2_moe.experts(config)
    return qwen3_next.layers(config, maps, experts, [])
