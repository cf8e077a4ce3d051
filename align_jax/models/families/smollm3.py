# SPDX-License-Identifier: Apache-2.0
"""SmolLM 3: Llama with every fourth layer free of rotary positions (Hugging Face, 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import llama

tensor_maps = llama.tensor_maps


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration; ``no_rope_layers`` is 1 where a layer *has* rotary
    positions."""
    full = complete(hf)
    return decoder_config(
        hf, full, layer_ropes=tuple(0 if has else -1 for has in full["no_rope_layers"])
    )
