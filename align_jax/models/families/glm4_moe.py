# SPDX-License-Identifier: Apache-2.0
"""GLM 4.5 and 4.6: dense layers first, then experts chosen by sigmoids from groups, and one that
every token passes (GLM-4.5 team 2025, arXiv 2508.06471)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import llama, qwen3_moe
from align_jax.models.tensor_map import TensorMap, by_kind


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration."""
    full = complete(hf)
    return decoder_config(
        hf,
        full,
        partial_rotary=True,
        output_bias=False,
        qk_norm="head" if full["use_qk_norm"] else "",
        **expert_fields(full),
    )


def expert_fields(full: Mapping[str, Any]) -> dict[str, Any]:
    """Return what DeepSeek V3's kind of mixture has: dense layers first, experts in groups.

    Raises:
        ValueError: a number that has no default is not there.
    """
    needed = ("n_routed_experts", "num_experts_per_tok", "n_shared_experts")
    if missing := [name for name in needed if full[name] is None]:
        raise ValueError(f"{full['model_type']}: expected {', '.join(missing)}, got none")
    width = full["moe_intermediate_size"]
    return dict(
        intermediate_size=width,
        num_experts=full["n_routed_experts"],
        experts_per_token=full["num_experts_per_tok"],
        normalize_experts=full["norm_topk_prob"],
        routing="sigmoid",
        expert_groups=full["n_group"] or 1,
        groups_per_token=full["topk_group"] or 1,
        routed_scale=float(full["routed_scaling_factor"]),
        dense_layers=tuple(range(full["first_k_dense_replace"])),
        dense_size=full["intermediate_size"],
        shared_size=width * full["n_shared_experts"],
    )


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """Return the tensor map."""
    common = [*llama.norms(config), *llama.attention(config)]
    return [*llama.ends(config), *by_kind(config, common, experts(config), qwen3_moe.dense(config))]


def experts(config: ModelConfig) -> list[TensorMap]:
    """Return the tensors of a mixture's layer behind its attention."""
    name = "model.layers.{layer}.mlp"
    out = qwen3_moe.experts(name)
    if config.routing == "sigmoid":
        out += [TensorMap(f"{name}.gate.e_score_correction_bias", "layers/moe/bias", "E -> E")]
    if config.shared_size:
        out += llama.mlp(config, f"{name}.shared_experts", "layers/shared", "f")
    return out
