# SPDX-License-Identifier: Apache-2.0
"""Llama 1 to 3.3, and the names that most families share with it.

References:
    Touvron et al. 2023 (arXiv 2302.13971), Grattafiori et al. 2024 (arXiv 2407.21783).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.tensor_map import TensorMap, linear, norm


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration."""
    return decoder_config(hf, complete(hf))


def attention(
    config: ModelConfig, name: str = "model.layers.{layer}.self_attn", output: str = "o_proj"
) -> list[TensorMap]:
    """Return the attention's tensors under Llama's names."""
    path = "layers/attention"
    bias = config.attention_bias
    query = "H t" if config.attention_gate else "H h"  # the gate is made with the query
    parts = (("query", "q_proj", query), ("key", "k_proj", "K h"), ("value", "v_proj", "K h"))
    out = [
        entry
        for ours, theirs, heads in parts
        for entry in linear(
            f"{name}.{theirs}",
            f"{path}/{ours}",
            f"({heads}) D -> D {heads}",
            f"({heads}) -> {heads}" if bias else "",
        )
    ]
    out += linear(
        f"{name}.{output}",
        f"{path}/output",
        "D (H h) -> H h D",
        "D -> D" if config.output_bias else "",
    )
    if config.qk_norm:
        axes = (
            ("h -> h", "h -> h") if config.qk_norm == "head" else ("(H h) -> H h", "(K h) -> K h")
        )
        out += [
            TensorMap(f"{name}.{part}_norm.weight", f"{path}/{ours}_norm/scale", order)
            for part, ours, order in zip("qk", ("query", "key"), axes)
        ]
    return out


def mlp(
    config: ModelConfig,
    name: str = "model.layers.{layer}.mlp",
    path: str = "layers/mlp",
    width: str = "F",
) -> list[TensorMap]:
    """Return a gated MLP's tensors under Llama's names."""
    up, down = (f"{width} -> {width}", "D -> D") if config.mlp_bias else ("", "")
    return [
        *linear(f"{name}.gate_proj", f"{path}/gate", f"{width} D -> D {width}", up),
        *linear(f"{name}.up_proj", f"{path}/up", f"{width} D -> D {width}", up),
        *linear(f"{name}.down_proj", f"{path}/down", f"D {width} -> {width} D", down),
    ]


def ends(config: ModelConfig) -> list[TensorMap]:
    """Return the tensors outside the layers."""
    out = [
        TensorMap("model.embed_tokens.weight", "embed/tokens", "V D -> V D"),
        *norm("model.norm", "final_norm", config.norm),
    ]
    return out if config.tied else out + linear("lm_head", "output", "V D -> D V")


def norms(config: ModelConfig) -> list[TensorMap]:
    """Return the two norms of a layer under Llama's names."""
    name = "model.layers.{layer}"
    return [
        *norm(f"{name}.input_layernorm", "layers/attention_norm", config.norm),
        *norm(f"{name}.post_attention_layernorm", "layers/mlp_norm", config.norm),
    ]


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """Return the tensor map."""
    return [*ends(config), *norms(config), *attention(config), *mlp(config)]
