# SPDX-License-Identifier: Apache-2.0
"""OLMoE: experts in every layer, norms over all heads (Muennighoff et al. 2024, arXiv
2409.02060)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import qwen3_moe

tensor_maps = qwen3_moe.tensor_maps


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration.

    Raises:
        ValueError: clipped queries, keys and values.
    """
    full = complete(hf)
    if full["clip_qkv"] is not None:
        raise ValueError(f"olmoe: clip_qkv: expected null, got {full['clip_qkv']}")
    return decoder_config(
        hf,
        full,
        qk_norm="full",
        num_experts=full["num_experts"],
        experts_per_token=full["num_experts_per_tok"],
        normalize_experts=full["norm_topk_prob"],
    )
