# SPDX-License-Identifier: Apache-2.0
"""dots.llm1: GLM 4.5's layers with norms on each query's and key's head (rednote-hilab 2025, arXiv
2506.05767)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import glm4_moe

tensor_maps = glm4_moe.tensor_maps


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration."""
    full = complete(hf)
    return decoder_config(hf, full, qk_norm="head", **glm4_moe.expert_fields(full))
