# SPDX-License-Identifier: Apache-2.0
"""Qwen 2 and 2.5: Llama with biases on query, key and value (Yang et al. 2024, arXiv
2407.10671)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import llama

tensor_maps = llama.tensor_maps


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration."""
    return decoder_config(hf, complete(hf), attention_bias=True, output_bias=False)
