# SPDX-License-Identifier: Apache-2.0
"""Gemma 4's text decoder: global layers with heads of another shape; in the small models inputs of
each layer's own and keys that later layers reuse, in one experts beside a dense MLP (Gemma team
2026; transformers 5, ``Gemma4TextModel``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from align_jax.models.config import ModelConfig, Wide, complete, decoder_config, ropes_by_kind
from align_jax.models.families import llama
from align_jax.models.tensor_map import TensorMap, by_layer, linear, norm

GLOBAL = "full_attention"
# letters of a wide layer's, and of an MLP behind reused keys
WIDE, DOUBLE = str.maketrans("Kh", "kl"), str.maketrans("Ff", "jj")


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration.

    Raises:
        ValueError: attention in both directions (an encoder), a vocabulary of its own for the
            layers' inputs, layers of further shapes.
    """
    full = complete(hf)
    types, heads = full["layer_types"], _heads(full)
    double = 1 + full["use_double_wide_mlp"]
    return decoder_config(
        hf,
        full,
        activation=full["hidden_activation"],
        qk_norm="head",
        value_norm=True,
        norm_outputs=True,
        layer_scale=True,
        embed_scale=full["hidden_size"] ** 0.5,
        query_scale=1.0,
        final_softcap=full["final_logit_softcapping"] or 0.0,
        **ropes_by_kind(full, {kind: heads[kind]["head_dim"] for kind in types}),
        wide=Wide(
            heads[GLOBAL]["head_dim"],
            heads[GLOBAL]["num_key_value_heads"],
            full["attention_k_eq_v"],
        ),
        wide_layers=tuple(n for n, kind in enumerate(types) if kind == GLOBAL),
        reused=reused(full),
        reused_size=double * full["intermediate_size"],
        token_inputs=_token_inputs(full),
        **_expert_fields(full),
    )


def _heads(full: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Return width and key-value heads of each kind of layer."""
    plain = {"head_dim": full["head_dim"], "num_key_value_heads": full["num_key_value_heads"]}
    own = {int(layer): of for layer, of in (full.get("per_layer_config") or {}).items()}
    found: dict[str, dict[str, int]] = {}
    for layer, kind in enumerate(full["layer_types"]):
        heads = plain | own.get(layer, {})
        if heads.keys() != plain.keys() or found.setdefault(kind, heads) != heads:
            raise ValueError(
                "per_layer_config: expected one head_dim and one num_key_value_heads for all "
                f"layers of {kind}, and nothing else; got {own}"
            )
    if found.get("sliding_attention", plain) != plain:
        raise ValueError(
            f"per_layer_config: expected {plain} in layers of sliding_attention, got "
            f"{found['sliding_attention']}"
        )
    return found


def reused(full: Mapping[str, Any]) -> int:
    """Return how many of the last layers attend to keys and values of earlier ones.

    Raises:
        ValueError: all of them; a kind of layers that has none before them.
    """
    count, types = full["num_kv_shared_layers"], full["layer_types"]
    if not 0 <= count < len(types):
        raise ValueError(
            f"num_kv_shared_layers: expected fewer than num_hidden_layers, {len(types)}; got "
            f"{count}"
        )
    if missing := set(types[len(types) - count :]) - set(types[: len(types) - count]):
        raise ValueError(
            f"num_kv_shared_layers: expected so few that layers of {', '.join(sorted(missing))} "
            f"are among those before them, whose keys and values they share; got {count}"
        )
    return int(count)


def _token_inputs(full: Mapping[str, Any]) -> int:
    width, rows = full["hidden_size_per_layer_input"], full["vocab_size_per_layer_input"]
    if full["use_bidirectional_attention"] == "all":
        raise ValueError(
            "use_bidirectional_attention: expected null or 'vision', as a decoder has it; got 'all'"
        )
    if width and rows != full["vocab_size"]:
        raise ValueError(
            f"vocab_size_per_layer_input: expected vocab_size, {full['vocab_size']}; got {rows}"
        )
    return int(width)


def _expert_fields(full: Mapping[str, Any]) -> dict[str, Any]:
    if not full["enable_moe_block"]:
        return {}
    named = ("num_experts", "top_k_experts", "moe_intermediate_size")
    if missing := [name for name in named if not full[name]]:
        raise ValueError(f"enable_moe_block: expected {', '.join(missing)} too")
    return dict(
        num_experts=full["num_experts"],
        experts_per_token=full["top_k_experts"],
        intermediate_size=full["moe_intermediate_size"],
        shared_size=full["intermediate_size"],
        branch_norms=True,
    )


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """Return the tensor map."""
    return [*ends(config), *by_layer(config, lambda words: _layer(config, words))]


def ends(config: ModelConfig, rows: str = "V") -> list[TensorMap]:
    """Return the tensors outside the layers; ``rows``: the letter of those inputs' table."""
    out = llama.ends(config)
    if config.token_inputs:
        name, table, path = "model.per_layer", "embed_tokens_per_layer", "token_inputs"
        axes = f"{rows} (L e) -> {rows} L e"
        out += [
            TensorMap(f"model.{table}.weight", f"{path}/table", axes),
            *linear(f"{name}_model_projection", f"{path}/projection", "(L e) D -> D L e"),
            TensorMap(f"{name}_projection_norm.weight", f"{path}/norm/scale", "e -> e"),
        ]
    return out


def attention(config: ModelConfig, words: Sequence[str]) -> list[TensorMap]:
    """Return a layer's attention."""
    left_out = ("/key/", "/value/", "/key_norm/") if "reused" in words else ()
    if "wide" in words and config.wide and config.wide.key_is_value:
        left_out = (*left_out, "/value/")
    out = llama.attention(config)
    out = [entry for entry in out if not any(part in entry.path for part in left_out)]
    return _lettered(out, WIDE) if "wide" in words else out


def around(config: ModelConfig) -> list[TensorMap]:
    """Return a layer's norms, and what makes use of its own inputs."""
    name, path, out = "model.layers.{layer}", "layers", list[TensorMap]()
    norms = {"input": "attention", "post_attention": "attention_out", "pre_feedforward": "mlp"}
    norms |= {"post_feedforward": "mlp_out"}
    for theirs, ours in norms.items():
        out += norm(f"{name}.{theirs}_layernorm", f"{path}/{ours}_norm", "rms")
    if config.token_inputs:
        out += linear(f"{name}.per_layer_input_gate", f"{path}/token/gate", "e D -> D e")
        out += linear(f"{name}.per_layer_projection", f"{path}/token/up", "D e -> e D")
        out += norm(f"{name}.post_per_layer_input_norm", f"{path}/token/norm", "rms")
    return out


def _layer(config: ModelConfig, words: Sequence[str]) -> list[TensorMap]:
    """Return the tensors of a layer of this kind."""
    name, path = "model.layers.{layer}", "layers"
    shared = config.num_experts > 0
    mlp = llama.mlp(config, path=f"{path}/{'shared' if shared else 'mlp'}", width="Ff"[shared])
    out = attention(config, words) + around(config)
    out += _lettered(mlp, DOUBLE) if "reused" in words else mlp
    out.append(TensorMap(f"{name}.layer_scalar", f"{path}/scale", "1 -> 1"))
    return out + _experts(name, path) if shared else out


def _experts(name: str, path: str) -> list[TensorMap]:
    return [
        TensorMap(f"{name}.router.proj.weight", f"{path}/moe/router", "E D -> D E"),
        TensorMap(f"{name}.router.scale", f"{path}/moe/router_scale", "D -> D"),
        TensorMap(f"{name}.router.per_expert_scale", f"{path}/moe/expert_scale", "E -> E"),
        TensorMap(f"{name}.experts.gate_up_proj", f"{path}/moe/gate", "E (2:0 F) D -> E D F"),
        TensorMap(f"{name}.experts.gate_up_proj", f"{path}/moe/up", "E (2:1 F) D -> E D F"),
        TensorMap(f"{name}.experts.down_proj", f"{path}/moe/down", "E D F -> E F D"),
        *norm(f"{name}.pre_feedforward_layernorm_2", f"{path}/moe_norm", "rms"),
        *norm(f"{name}.post_feedforward_layernorm_2", f"{path}/moe_out_norm", "rms"),
        *norm(f"{name}.post_feedforward_layernorm_1", f"{path}/shared_out_norm", "rms"),
    ]


def _lettered(entries: Sequence[TensorMap], letters: Mapping[int, int]) -> list[TensorMap]:
    return [dataclasses.replace(entry, axes=entry.axes.translate(letters)) for entry in entries]
