# SPDX-License-Identifier: Apache-2.0
"""DeepSeek V2: latent attention, experts chosen by a softmax (DeepSeek-AI 2024, arXiv
2405.04434)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import ModelConfig, complete, decoder_config
from align_jax.models.families import deepseek_v3, glm4_moe

tensor_maps = deepseek_v3.tensor_maps


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration.

    Raises:
        ValueError: another way to choose experts than the released models'.
    """
    full = complete(hf)
    deepseek_v3.check_routing(hf, scoring_func="softmax", moe_layer_freq=1)
    method, groups = full["topk_method"], full["topk_method"] == "group_limited_greedy"
    if not groups and method != "greedy" or full["norm_topk_prob"]:
        raise ValueError(
            "deepseek_v2: topk_method, norm_topk_prob: expected 'greedy' or 'group_limited_greedy' "
            f"and false, got {method!r} and {full['norm_topk_prob']}"
        )
    fields = deepseek_v3.latent_fields(full) | glm4_moe.expert_fields(full)
    fields |= dict(routing="softmax", rope_interleaved=True)
    if not groups:
        fields |= dict(expert_groups=1, groups_per_token=1)
    return decoder_config(hf, full, **fields)
