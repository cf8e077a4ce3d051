# SPDX-License-Identifier: Apache-2.0
"""Qwen 3: Llama with norms on each query's and key's head (Yang et al. 2025, arXiv 2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import llama

tensor_maps = llama.tensor_maps


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration."""
    return decoder_config(hf, complete(hf), qk_norm="head")
