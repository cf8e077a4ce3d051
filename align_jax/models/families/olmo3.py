# SPDX-License-Identifier: Apache-2.0
"""OLMo 3: OLMo 2 with windows, and rotary positions of each kind of layer (Ai2 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config, ropes_by_kind
from align_jax.models.families import olmo2

tensor_maps = olmo2.tensor_maps


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration."""
    full = complete(hf)
    head_dim = full.get("head_dim") or full["hidden_size"] // full["num_attention_heads"]
    return decoder_config(
        hf,
        full,
        qk_norm="full",
        norm_inputs=False,
        norm_outputs=True,
        **ropes_by_kind(full, dict.fromkeys(full["layer_types"], head_dim)),
    )
