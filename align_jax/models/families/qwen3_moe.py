# SPDX-License-Identifier: Apache-2.0
"""Qwen 3's mixtures of experts (Yang et al. 2025, arXiv 2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import llama
from align_jax.models.tensor_map import TensorMap


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration.

    Raises:
        ValueError: some layers are dense.
    """
    full = complete(hf)
    check_every_layer(full)
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
    )


def check_every_layer(full: Mapping[str, Any]) -> None:
    """Refuse a mixture of which some layers are dense.

    Raises:
        ValueError: it is one.
    """
    if full["mlp_only_layers"] or full["decoder_sparse_step"] != 1:
        raise ValueError(
            f"{full['model_type']}: every layer must have experts (mlp_only_layers [], "
            f"decoder_sparse_step 1); got {full['mlp_only_layers']} and "
            f"{full['decoder_sparse_step']}"
        )


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """Return the tensor map."""
    return [
        *llama.ends(config),
        *llama.norms(config),
        *llama.attention(config),
        *experts("model.layers.{layer}.mlp"),
    ]


def experts(name: str) -> list[TensorMap]:
    """Return the tensors of a router and its experts."""
    return [
        TensorMap(f"{name}.gate.weight", "layers/moe/router", "E D -> D E"),
        TensorMap(name + ".experts.{expert}.gate_proj.weight", "layers/moe/gate", "F D -> D F"),
        TensorMap(name + ".experts.{expert}.up_proj.weight", "layers/moe/up", "F D -> D F"),
        TensorMap(name + ".experts.{expert}.down_proj.weight", "layers/moe/down", "D F -> F D"),
    ]
