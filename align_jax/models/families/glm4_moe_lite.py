# SPDX-License-Identifier: Apache-2.0
"""GLM 4.7 Flash: DeepSeek V3's latent attention, GLM 4.5's kind of experts (Z.ai 2026)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import deepseek_v3, glm4_moe

tensor_maps = deepseek_v3.tensor_maps


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration.

    Raises:
        ValueError: kinds of layers for another number of them; what transformers passes over, where
            it is not what is computed.
    """
    full = complete(hf)
    types, layers = full["mlp_layer_types"], full["num_hidden_layers"]
    if len(types) != layers:
        raise ValueError(f"mlp_layer_types: expected {layers} entries, got {len(types)}")
    dense = tuple(n for n, kind in enumerate(types) if kind == "dense")
    first = len(dense) if dense == tuple(range(len(dense))) else None
    said = dict(scoring_func="sigmoid", topk_method="noaux_tc", first_k_dense_replace=first)
    deepseek_v3.check_routing(hf, **said)
    fields = deepseek_v3.latent_fields(full)
    fields |= glm4_moe.expert_fields({**full, "first_k_dense_replace": 0})
    fields["dense_layers"] = dense
    return decoder_config(hf, full, rope_interleaved=full["rope_interleave"], **fields)
