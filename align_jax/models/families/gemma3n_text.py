# SPDX-License-Identifier: Apache-2.0
"""Gemma 3n's text decoder: four residual streams, a low-rank branch beside attention, sparse gates
in the first layers; inputs of each layer's own and keys that later layers reuse, as in Gemma 4's
small models (Gemma team 2025; transformers 5, ``Gemma3nTextModel``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align_jax.models.config import (
    ModelConfig,
    Streams,
    Wide,
    complete,
    decoder_config,
    ropes_by_kind,
)
from align_jax.models.families import gemma4_text, llama
from align_jax.models.tensor_map import TensorMap, by_layer, linear, norm

LEAST_CLIP = 100.0  # which no coefficient reaches that is trained from a released file


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration.

    Raises:
        ValueError: MLPs of several widths, no inputs of the layers' own or a table of more rows
            than the vocabulary, an active stream that is none, coefficients that are clipped.
    """
    full = complete(hf)
    _check(full)
    types, reused = full["layer_types"], gemma4_text.reused(full)
    # layers of both kinds have heads of one shape; apart, each reuses the keys of its own
    wide = Wide(full["head_dim"], full["num_key_value_heads"], key_is_value=False)
    (width,) = set(full["intermediate_size"])
    return decoder_config(
        hf,
        full,
        intermediate_size=width,
        activation=full["hidden_activation"],
        qk_norm="head",
        value_norm=True,
        norm_outputs=True,
        embed_scale=full["hidden_size"] ** 0.5,
        query_scale=1.0,
        final_softcap=full["final_logit_softcapping"] or 0.0,
        **ropes_by_kind(full, dict.fromkeys(types, full["head_dim"])),
        wide=wide if len(set(types)) > 1 else None,
        wide_layers=tuple(
            n for n, kind in enumerate(types) if kind == gemma4_text.GLOBAL and len(set(types)) > 1
        ),
        reused=reused,
        reused_size=width,
        token_inputs=full["hidden_size_per_layer_input"],
        token_rows=full["vocab_size_per_layer_input"],
        streams=Streams(
            full["altup_num_inputs"], full["altup_active_idx"], full["altup_correct_scale"]
        ),
        laurel_rank=full["laurel_rank"],
        sparsities=tuple(map(float, full["activation_sparsity_pattern"])),
    )


def _check(full: Mapping[str, Any]) -> None:
    """Refuse what the decoder does not compute."""
    if len(widths := set(full["intermediate_size"])) > 1:
        raise ValueError(
            f"intermediate_size: expected one width for all layers; got {sorted(widths)}"
        )
    if not full["hidden_size_per_layer_input"]:
        raise ValueError("hidden_size_per_layer_input: expected a width above 0; got 0")
    if (rows := full["vocab_size_per_layer_input"]) > full["vocab_size"]:
        raise ValueError(
            f"vocab_size_per_layer_input: expected at most vocab_size, {full['vocab_size']}; got "
            f"{rows}"
        )
    if (active := full["altup_active_idx"]) >= full["altup_num_inputs"]:
        raise ValueError(
            f"altup_active_idx: expected one below altup_num_inputs, {full['altup_num_inputs']}; "
            f"got {active}"
        )
    if (clip := full["altup_coef_clip"]) < LEAST_CLIP:
        raise ValueError(
            f"altup_coef_clip: expected at least {LEAST_CLIP:g}, since transformers clips AltUp's "
            f"coefficients to it while it trains and never else, and here they are trained as they "
            f"are; got {clip:g}"
        )


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """Return the tensor map."""
    out = gemma4_text.ends(config, rows="Y")
    for n in range(1, config.num_streams):
        for theirs, ours in (("altup_projections", "open"), ("altup_unembed_projections", "close")):
            out += linear(f"model.{theirs}.{n - 1}", f"streams/{ours}{n}", "d D -> D d")
    return out + by_layer(config, lambda words: _layer(config, words))


def _layer(config: ModelConfig, words: Sequence[str]) -> list[TensorMap]:
    """Return the tensors of a layer of this kind."""
    name, path = "model.layers.{layer}", "layers"
    altup, laurel = f"{name}.altup", f"{name}.laurel"
    return [
        *gemma4_text.attention(config, words),
        *llama.mlp(config),
        *gemma4_text.around(config),
        *linear(f"{altup}.modality_router", f"{path}/altup/router", "a D -> D a"),
        *linear(f"{altup}.prediction_coefs", f"{path}/altup/prediction", "A a -> a A"),
        *linear(f"{altup}.correction_coefs", f"{path}/altup/correction", "b a -> a b"),
        *norm(f"{altup}.router_norm", f"{path}/altup/norm", "rms"),
        TensorMap(f"{altup}.correct_output_scale", f"{path}/altup/scale", "D -> D"),
        *linear(f"{laurel}.linear_left", f"{path}/laurel/left", "i D -> D i"),
        *linear(f"{laurel}.linear_right", f"{path}/laurel/right", "D i -> i D"),
        *norm(f"{laurel}.post_laurel_norm", f"{path}/laurel/norm", "rms"),
    ]
