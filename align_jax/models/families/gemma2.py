# SPDX-License-Identifier: Apache-2.0
"""Gemma 2: soft caps, alternating windows, norms before and after (Gemma team 2024, arXiv
2408.00118)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import llama
from align_jax.models.tensor_map import TensorMap, norm


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration."""
    full = complete(hf)
    return decoder_config(hf, full, **gemma2_fields(full))


def gemma2_fields(full: Mapping[str, Any]) -> dict[str, Any]:
    """Return what Gemma 2 and 3 have in common beside Llama.

    Raises:
        ValueError: attention in both directions (an encoder).
    """
    if full.get("use_bidirectional_attention"):
        raise ValueError(
            f"{full['model_type']}: use_bidirectional_attention is not supported: a decoder is "
            "expected"
        )
    return dict(
        norm_offset=True,
        norm_outputs=True,
        embed_scale=full["hidden_size"] ** 0.5,
        activation=full["hidden_activation"],
        query_scale=full["query_pre_attn_scalar"] ** -0.5,
        attention_softcap=full["attn_logit_softcapping"] or 0.0,
        final_softcap=full["final_logit_softcapping"] or 0.0,
    )


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """Return the tensor map."""
    name = "model.layers.{layer}"
    return [
        *llama.ends(config),
        *llama.attention(config),
        *llama.mlp(config),
        *norm(f"{name}.input_layernorm", "layers/attention_norm", "rms"),
        *norm(f"{name}.post_attention_layernorm", "layers/attention_out_norm", "rms"),
        *norm(f"{name}.pre_feedforward_layernorm", "layers/mlp_norm", "rms"),
        *norm(f"{name}.post_feedforward_layernorm", "layers/mlp_out_norm", "rms"),
    ]
