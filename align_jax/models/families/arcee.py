# SPDX-License-Identifier: Apache-2.0
"""Arcee: Llama with a plain MLP of squared rectifiers (Arcee AI 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import llama
from align_jax.models.tensor_map import TensorMap


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration."""
    return decoder_config(hf, complete(hf), gated=False)


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """Return the tensor map."""
    plain = [entry for entry in llama.mlp(config) if "/gate/" not in entry.path]
    return [*llama.ends(config), *llama.norms(config), *llama.attention(config), *plain]
