# SPDX-License-Identifier: Apache-2.0
"""GPT-2: learned positions, layer norms, biases, kernels stored as [inputs, outputs] (Radford et
al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.tensor_map import TensorMap, linear, norm


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration.

    Raises:
        ValueError: attention scaled by the layer's index, unscaled, or with cross-attention.
    """
    full = complete(hf)
    if (
        full["scale_attn_by_inverse_layer_idx"]
        or full["add_cross_attention"]
        or not full["scale_attn_weights"]
    ):
        raise ValueError(
            "gpt2: scale_attn_by_inverse_layer_idx and add_cross_attention must be false and "
            "scale_attn_weights true; other variants are not supported"
        )
    hidden_size = full["n_embd"]
    llama = full | {
        "hidden_size": hidden_size,
        "num_hidden_layers": full["n_layer"],
        "num_attention_heads": full["n_head"],
        "max_position_embeddings": full["n_positions"],
        "intermediate_size": full["n_inner"] or 4 * hidden_size,
    }
    return decoder_config(
        hf,
        llama,
        norm="layer",
        norm_eps=full["layer_norm_epsilon"],
        gated=False,
        activation=full["activation_function"],
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        num_kv_heads=full["n_head"],
        learned_positions=True,
        ropes=(),
        layer_ropes=(-1,) * full["n_layer"],
    )


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """Return the tensor map."""
    name = "transformer.h.{layer}"
    fused = [
        entry
        for i, part in enumerate(("query", "key", "value"))
        for entry in linear(
            f"{name}.attn.c_attn",
            f"layers/attention/{part}",
            f"D (3:{i} H h) -> D H h",
            f"(3:{i} H h) -> H h",
        )
    ]
    out = [
        TensorMap("transformer.wte.weight", "embed/tokens", "V D -> V D"),
        TensorMap("transformer.wpe.weight", "embed/positions", "X D -> X D"),
        *norm("transformer.ln_f", "final_norm", "layer"),
        *norm(f"{name}.ln_1", "layers/attention_norm", "layer"),
        *norm(f"{name}.ln_2", "layers/mlp_norm", "layer"),
        *fused,
        *linear(f"{name}.attn.c_proj", "layers/attention/output", "(H h) D -> H h D", "D -> D"),
        *linear(f"{name}.mlp.c_fc", "layers/mlp/up", "D F -> D F", "F -> F"),
        *linear(f"{name}.mlp.c_proj", "layers/mlp/down", "F D -> F D", "D -> D"),
    ]
    return out if config.tied else out + linear("lm_head", "output", "V D -> D V")
