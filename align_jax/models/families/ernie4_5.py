# SPDX-License-Identifier: Apache-2.0
"""ERNIE 4.5's dense models: Llama whose neighboring features turn together (Baidu 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import llama

tensor_maps = llama.tensor_maps


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration."""
    full = complete(hf)
    bias = bool(full["use_bias"])
    return decoder_config(
        hf, full, rope_interleaved=True, attention_bias=bias, output_bias=bias, mlp_bias=bias
    )
