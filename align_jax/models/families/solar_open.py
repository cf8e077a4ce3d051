# SPDX-License-Identifier: Apache-2.0
"""Solar Open: GLM 4.5's kind of experts in every layer (Upstage 2026)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import deepseek_v3, glm4_moe

tensor_maps = glm4_moe.tensor_maps


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration.

    Raises:
        ValueError: dense layers or norms on queries and keys, which transformers passes over.
    """
    full = complete(hf)
    deepseek_v3.check_routing(hf, first_k_dense_replace=0, use_qk_norm=False)
    parts = {**full, "first_k_dense_replace": 0, "intermediate_size": 0}
    return decoder_config(hf, full, output_bias=False, **glm4_moe.expert_fields(parts))
