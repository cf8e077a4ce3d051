# SPDX-License-Identifier: Apache-2.0
"""Gemma 3's text decoder: local and global layers with rotary bases of their own (arXiv
2503.19786)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config, ropes_by_kind
from align_jax.models.families import gemma2

tensor_maps = gemma2.tensor_maps


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration."""
    full = complete(hf)
    return decoder_config(
        hf,
        full,
        qk_norm="head",
        **gemma2.gemma2_fields(full),
        **ropes_by_kind(full, dict.fromkeys(full["layer_types"], full["head_dim"])),
    )
