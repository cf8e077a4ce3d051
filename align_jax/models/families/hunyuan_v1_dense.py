# SPDX-License-Identifier: Apache-2.0
"""Hunyuan's dense models: norms on each head behind the rotation (Tencent 2025)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import llama
from align_jax.models.tensor_map import TensorMap, norm


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration; a "dynamic" scaling with an ``alpha`` is a larger base."""
    full = complete(hf)
    parts = dict(full["rope_parameters"])
    width = full["head_dim"] or full["hidden_size"] // full["num_attention_heads"]
    if parts.get("rope_type") == "dynamic" and parts.get("alpha"):
        theta = parts["rope_theta"] * parts.pop("alpha") ** (width / (width - 2))
        parts |= {"rope_type": "default", "rope_theta": theta}
    full = full | {"rope_parameters": parts}
    return decoder_config(hf, full, qk_norm="head", qk_norm_turned=True)


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """Return the tensor map."""
    name, plain = "model.layers.{layer}.self_attn", dataclasses.replace(config, qk_norm="")
    return [
        *llama.ends(config),
        *llama.norms(config),
        *llama.attention(plain),
        *llama.mlp(config),
        *norm(f"{name}.query_layernorm", "layers/attention/query_norm", "rms", "h"),
        *norm(f"{name}.key_layernorm", "layers/attention/key_norm", "rms", "h"),
    ]
