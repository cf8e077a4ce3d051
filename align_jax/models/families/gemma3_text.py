# SPDX-License-Identifier: Apache-2.0
"""Gemma 3's text decoder: local and global layers with rotary bases of their own (arXiv
2503.19786)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config, rope_from_hf
from align_jax.models.families import gemma2

tensor_maps = gemma2.tensor_maps


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration."""
    full = complete(hf)
    kinds = sorted(full["rope_parameters"])
    ropes = tuple(
        rope_from_hf(
            full["rope_parameters"][kind], full["head_dim"], full["max_position_embeddings"]
        )
        for kind in kinds
    )
    return decoder_config(
        hf,
        full,
        qk_norm="head",
        ropes=ropes,
        **gemma2.gemma2_fields(full),
        layer_ropes=tuple(kinds.index(kind) for kind in full["layer_types"]),
    )
