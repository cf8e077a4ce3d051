# SPDX-License-Identifier: Apache-2.0
"""Gemma: norms' scales stored minus one, embeddings scaled by sqrt(D) (Gemma team 2024, arXiv
2403.08295)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import llama

tensor_maps = llama.tensor_maps


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration (transformers reads the first ones' "gelu" as the tanh form
    they meant)."""
    full = complete(hf)
    return decoder_config(hf, full, norm_offset=True, embed_scale=full["hidden_size"] ** 0.5)
