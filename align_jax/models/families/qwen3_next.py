# SPDX-License-Identifier: Apache-2.0
"""Qwen3-Next: of four layers three keep a state by the gated delta rule and one attends, its output
gated; Qwen 2's kind of experts (Qwen team 2025).

The convolution's weights stand in one tensor: the queries' of all heads, the keys', the values'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align_jax.models.config import Delta, ModelConfig, complete, decoder_config
from align_jax.models.families import llama, qwen2_moe, qwen3_moe
from align_jax.models.tensor_map import TensorMap, by_kind, linear, norm


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration."""
    full = complete(hf)
    fields = delta_fields(full, fused=True) | qwen2_moe.expert_fields(full)
    fields["normalize_experts"] = full["norm_topk_prob"]
    return decoder_config(hf, full, partial_rotary=True, **fields, **qwen3_moe.dense_fields(full))


def delta_fields(full: Mapping[str, Any], *, fused: bool) -> dict[str, Any]:
    """Return what the layers have that keep a state, and those between them.

    Raises:
        ValueError: windows, which these models have none of.
    """
    types = full["layer_types"]
    if "sliding_attention" in types:
        raise ValueError(
            "layer_types: expected 'linear_attention' or 'full_attention', got 'sliding_attention'"
        )
    layers = tuple(n for n, kind in enumerate(types) if kind == "linear_attention")
    delta = Delta(
        full["linear_num_key_heads"],
        full["linear_num_value_heads"],
        full["linear_key_head_dim"],
        full["linear_value_head_dim"],
        full["linear_conv_kernel_dim"],
        fused,
    )
    return dict(
        delta=delta if layers else None,
        delta_layers=layers,
        attention_gate=True,
        qk_norm="head",
        norm_offset=True,
    )


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """Return the tensor map."""
    name, path = "model.layers.{layer}.linear_attn", "layers/delta"
    maps = [
        *linear(f"{name}.in_proj_qkvz", f"{path}/mixed", "(g m) D -> D g m"),
        *linear(f"{name}.in_proj_ba", f"{path}/gates", "(g p) D -> D g p"),
    ]
    experts, dense = qwen2_moe.experts(config), qwen3_moe.dense(config)
    return layers(config, maps, experts, dense)


def layers(
    config: ModelConfig, maps: list[TensorMap], experts: list[TensorMap], dense: list[TensorMap]
) -> list[TensorMap]:
    """Return the tensors of all layers and both ends, given what makes a state's inputs and what
    stands behind it."""
    name, path = "model.layers.{layer}.linear_attn", "layers/delta"
    delta = [
        *maps,
        *linear(f"{name}.out_proj", f"{path}/output", "D (u o) -> u o D"),
        *norm(f"{name}.norm", f"{path}/norm", "rms", "o"),
        TensorMap(f"{name}.A_log", f"{path}/speed", "u -> u"),
        TensorMap(f"{name}.dt_bias", f"{path}/shift", "u -> u"),
    ]
    for part, heads, span in spans(config):
        axes = f"({heads}) 1:0 s -> s {heads}"
        delta.append(TensorMap(f"{name}.conv1d.weight", f"{path}/{part}_taps", axes, span))
    common, attention = llama.norms(config), llama.attention(config)
    parts = by_kind(config, common, experts, dense, attention, delta)
    return [*llama.ends(config), *parts]


def spans(config: ModelConfig) -> list[tuple[str, str, tuple[int, int]]]:
    """Return how query, key and value stand one after the other: the part, its letters, its
    rows."""
    if config.delta is None:
        return []
    d = config.delta
    keys, values = d.key_heads * d.key_dim, d.value_heads * d.value_dim
    return [
        ("query", "g n", (0, keys)),
        ("key", "g n", (keys, keys)),
        ("value", "u o", (2 * keys, values)),
    ]
