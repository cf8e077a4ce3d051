# SPDX-License-Identifier: Apache-2.0
"""Phi 3 and 4: Llama with query, key and value in one tensor, gate and up in another (arXiv
2404.14219)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import llama
from align_jax.models.tensor_map import TensorMap


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration."""
    return decoder_config(hf, complete(hf), partial_rotary=True)


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """Return the tensor map."""
    name = "model.layers.{layer}"
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    fused = f"{name}.self_attn.qkv_proj.weight"
    return [
        *llama.ends(config),
        *llama.norms(config),
        TensorMap(fused, "layers/attention/query/kernel", "(H h) D -> D H h", span=(0, queries)),
        TensorMap(fused, "layers/attention/key/kernel", "(K h) D -> D K h", span=(queries, keys)),
        TensorMap(
            fused, "layers/attention/value/kernel", "(K h) D -> D K h", span=(queries + keys, keys)
        ),
        TensorMap(
            f"{name}.self_attn.o_proj.weight", "layers/attention/output/kernel", "D (H h) -> H h D"
        ),
        *mlp(),
    ]


def mlp(name: str = "model.layers.{layer}.mlp") -> list[TensorMap]:
    """Return the tensors of a gated MLP whose gate and up are one."""
    return [
        TensorMap(f"{name}.gate_up_proj.weight", "layers/mlp/gate/kernel", "(2:0 F) D -> D F"),
        TensorMap(f"{name}.gate_up_proj.weight", "layers/mlp/up/kernel", "(2:1 F) D -> D F"),
        TensorMap(f"{name}.down_proj.weight", "layers/mlp/down/kernel", "D F -> F D"),
    ]
