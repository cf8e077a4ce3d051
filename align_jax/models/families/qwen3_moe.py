# SPDX-License-Identifier: Apache-2.0
"""Qwen 3's mixtures of experts (Yang et al. 2025, arXiv 2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import llama
from align_jax.models.tensor_map import TensorMap, by_kind


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration."""
    full = complete(hf)
    return decoder_config(
        hf,
        full,
        qk_norm="head",
        intermediate_size=full["moe_intermediate_size"],
        num_experts=full["num_local_experts"],
        experts_per_token=full["num_experts_per_tok"],
        normalize_experts=full["norm_topk_prob"],
        windows=((full["sliding_window"] or 0) * full["use_sliding_window"],)
        * full["num_hidden_layers"],
        **dense_fields(full),
    )


def dense_fields(full: Mapping[str, Any]) -> dict[str, Any]:
    """Return which layers are dense, and how wide.

    Raises:
        ValueError: a layer that is not there.
    """
    named, step = full["mlp_only_layers"], full["decoder_sparse_step"]
    layers = range(full["num_hidden_layers"])
    if not set(named) <= set(layers):
        raise ValueError(
            f"mlp_only_layers: expected layers from 0 to {layers[-1]}, got {sorted(named)}"
        )
    return dict(
        dense_layers=tuple(n for n in layers if n in named or (n + 1) % step),
        dense_size=full["intermediate_size"],
    )


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """Return the tensor map."""
    common = [*llama.norms(config), *llama.attention(config)]
    parts = experts("model.layers.{layer}.mlp")
    return [*llama.ends(config), *by_kind(config, common, parts, dense(config))]


def dense(config: ModelConfig) -> list[TensorMap]:
    """Return the tensors of a dense layer's MLP."""
    return llama.mlp(config, width="G")


def experts(name: str) -> list[TensorMap]:
    """Return the tensors of a router and its experts."""
    return [
        TensorMap(f"{name}.gate.weight", "layers/moe/router", "E D -> D E"),
        TensorMap(name + ".experts.{expert}.gate_proj.weight", "layers/moe/gate", "F D -> D F"),
        TensorMap(name + ".experts.{expert}.up_proj.weight", "layers/moe/up", "F D -> D F"),
        TensorMap(name + ".experts.{expert}.down_proj.weight", "layers/moe/down", "D F -> F D"),
    ]
