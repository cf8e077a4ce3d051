# SPDX-License-Identifier: Apache-2.0
"""Seed-OSS: Llama with biases on query, key and value (ByteDance Seed 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import llama

tensor_maps = llama.tensor_maps


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration."""
    full = complete(hf)
    return decoder_config(hf, full, output_bias=bool(full["attention_out_bias"]))
