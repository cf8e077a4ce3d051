# SPDX-License-Identifier: Apache-2.0
"""Qwen 3.5: Qwen3-Next's layers without experts; what makes a state's inputs stands in tensors of
its own (Qwen team 2026)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import llama, qwen3_next
from align_jax.models.tensor_map import TensorMap, linear


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration."""
    full = complete(hf)
    fields = qwen3_next.delta_fields(full, fused=False)
    return decoder_config(hf, full, partial_rotary=True, **fields)


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """Return the tensor map."""
    return qwen3_next.layers(config, delta_maps(config), llama.mlp(config), [])


def delta_maps(config: ModelConfig) -> list[TensorMap]:
    """Return the tensors of what makes a state's inputs."""
    name, path = "model.layers.{layer}.linear_attn", "layers/delta"
    out = []
    for part, heads, span in qwen3_next.spans(config):
        axes = f"({heads}) D -> D {heads}"
        out += linear(f"{name}.in_proj_qkv", f"{path}/{part}", axes, span=span)
    return [
        *out,
        *linear(f"{name}.in_proj_z", f"{path}/output_gate", "(u o) D -> D u o"),
        *linear(f"{name}.in_proj_b", f"{path}/rate", "u D -> D u"),
        *linear(f"{name}.in_proj_a", f"{path}/fade", "u D -> D u"),
    ]
