# SPDX-License-Identifier: Apache-2.0
"""EXAONE 4: norms on each head and on outputs; full attention has no positions (LG AI 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import olmo2

tensor_maps = olmo2.tensor_maps


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration; without windows every layer has rotary positions."""
    full = complete(hf)
    every = full["sliding_window"] is None
    turned = (every or kind == "sliding_attention" for kind in full["layer_types"])
    return decoder_config(
        hf,
        full,
        qk_norm="head",
        norm_inputs=False,
        norm_outputs=True,
        layer_ropes=tuple(0 if on else -1 for on in turned),
    )
