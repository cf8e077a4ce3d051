# SPDX-License-Identifier: Apache-2.0
"""GPT-NeoX and Pythia: parallel residual, partly rotary heads, layer norms, biases.

References:
    Black et al. 2022 (arXiv 2204.06745), Biderman et al. 2023 (arXiv 2304.01373).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.tensor_map import TensorMap, linear, norm


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration."""
    full = complete(hf)
    return decoder_config(
        hf,
        full,
        partial_rotary=True,
        norm="layer",
        norm_eps=full["layer_norm_eps"],
        gated=False,
        mlp_bias=True,
        num_kv_heads=full["num_attention_heads"],
        parallel_residual=full["use_parallel_residual"],
    )


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """Return the tensor map: the fused tensor holds each head's query, key and value in turn."""
    name = "gpt_neox.layers.{layer}"
    fused = [
        entry
        for i, part in enumerate(("query", "key", "value"))
        for entry in linear(
            f"{name}.attention.query_key_value",
            f"layers/attention/{part}",
            f"(H 3:{i} h) D -> D H h",
            f"(H 3:{i} h) -> H h" if config.attention_bias else "",
        )
    ]
    out = [
        TensorMap("gpt_neox.embed_in.weight", "embed/tokens", "V D -> V D"),
        *norm("gpt_neox.final_layer_norm", "final_norm", "layer"),
        *norm(f"{name}.input_layernorm", "layers/attention_norm", "layer"),
        *norm(f"{name}.post_attention_layernorm", "layers/mlp_norm", "layer"),
        *fused,
        *linear(
            f"{name}.attention.dense",
            "layers/attention/output",
            "D (H h) -> H h D",
            "D -> D" if config.output_bias else "",
        ),
        *linear(f"{name}.mlp.dense_h_to_4h", "layers/mlp/up", "F D -> D F", "F -> F"),
        *linear(f"{name}.mlp.dense_4h_to_h", "layers/mlp/down", "D F -> F D", "D -> D"),
    ]
    return out if config.tied else out + linear("embed_out", "output", "V D -> D V")
