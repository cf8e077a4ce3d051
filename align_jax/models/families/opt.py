# SPDX-License-Identifier: Apache-2.0
"""OPT: learned positions from row 2 on, layer norms, biases, ReLU (Zhang et al. 2022, arXiv
2205.01068)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import llama
from align_jax.models.tensor_map import TensorMap, linear, norm


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration.

    Raises:
        ValueError: the 350M variant's norms after the residual and narrower embeddings.
    """
    full = complete(hf)
    if (
        not full["do_layer_norm_before"]
        or full["word_embed_proj_dim"] != full["hidden_size"]
        or not (full["enable_bias"] and full["layer_norm_elementwise_affine"])
        or full["_remove_final_layer_norm"]
    ):
        raise ValueError(
            "opt: do_layer_norm_before, enable_bias and layer_norm_elementwise_affine must be true "
            "and word_embed_proj_dim equal to hidden_size (opt-350m is not supported), "
            "_remove_final_layer_norm false"
        )
    return decoder_config(
        hf,
        full | {"intermediate_size": full["ffn_dim"]},
        norm="layer",
        norm_eps=1e-5,
        gated=False,
        activation=full["activation_function"],
        attention_bias=True,
        output_bias=True,
        mlp_bias=True,
        num_kv_heads=full["num_attention_heads"],
        learned_positions=True,
        position_offset=2,
        ropes=(),
        layer_ropes=(-1,) * full["num_hidden_layers"],
        init_std=full["init_std"],
    )


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """Return the tensor map."""
    name = "model.decoder.layers.{layer}"
    out = [
        TensorMap("model.decoder.embed_tokens.weight", "embed/tokens", "V D -> V D"),
        TensorMap("model.decoder.embed_positions.weight", "embed/positions", "X D -> X D"),
        *norm("model.decoder.final_layer_norm", "final_norm", "layer"),
        *norm(f"{name}.self_attn_layer_norm", "layers/attention_norm", "layer"),
        *norm(f"{name}.final_layer_norm", "layers/mlp_norm", "layer"),
        *llama.attention(config, f"{name}.self_attn", "out_proj"),
        *linear(f"{name}.fc1", "layers/mlp/up", "F D -> D F", "F -> F"),
        *linear(f"{name}.fc2", "layers/mlp/down", "D F -> F D", "D -> D"),
    ]
    return out if config.tied else out + linear("lm_head", "output", "V D -> D V")
