# SPDX-License-Identifier: Apache-2.0
"""Nemotron 3 and 4: layer norms stored minus one, squared rectifiers, partly rotary heads
(NVIDIA 2024, arXiv 2406.11704)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import arcee

tensor_maps = arcee.tensor_maps


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration."""
    full = complete(hf)
    return decoder_config(
        hf,
        full,
        partial_rotary=True,
        norm="layer",
        norm_offset=True,
        norm_eps=full["norm_eps"],
        gated=False,
    )
