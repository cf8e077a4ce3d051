# SPDX-License-Identifier: Apache-2.0
"""Kimi K2: DeepSeek V3 under another name (Kimi team 2025, arXiv 2507.20534)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig
from align_jax.models.families import deepseek_v3

tensor_maps = deepseek_v3.tensor_maps


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration."""
    config = deepseek_v3.from_hf({**hf, "model_type": "deepseek_v3"})
    return dataclasses.replace(config, family="kimi_k2", hf=json.dumps(dict(hf), sort_keys=True))
