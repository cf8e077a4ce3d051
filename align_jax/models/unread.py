# SPDX-License-Identifier: Apache-2.0
"""Keys of a Hugging Face configuration that change logits in some families and that transformers
passes over in others.

A key that the family's own class declares is read by its modules; any other is a mere attribute.
Such a key does no harm where it says what the family does anyway, or where the tensors decide (a
bias is there or not).  Where it says otherwise, some programs read it and some do not, and the
checkpoint is refused by the key's name.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# of tensors that are there or not, which is checked
OF_TENSORS = """attention_bias qkv_bias attention_out_bias mlp_bias use_bias use_qk_norm
qk_layernorm""".split()
# key -> what is computed where it is passed over, of a ModelConfig
IMPLIED: Mapping[str, Callable[[Any], Any]] = {
    "use_bidirectional_attention": lambda config: False,
    "alibi": lambda config: False,
    "use_alibi": lambda config: False,
    "rope_interleave": lambda config: config.rope_interleaved,
    "use_parallel_residual": lambda config: config.parallel_residual,
    "swiglu_limit": lambda config: config.glu_limit or None,
    "sliding_window": lambda config: None,
    "attention_chunk_size": lambda config: None,
    "layer_types": lambda config: [
        "sliding_attention" if window else "full_attention" for window in config.windows
    ],
    "no_rope_layers": lambda config: [int(rope >= 0) for rope in config.layer_ropes],
    "clip_qkv": lambda config: None,
    "attn_logit_softcapping": lambda config: config.attention_softcap or None,
    "final_logit_softcapping": lambda config: config.final_softcap or None,
    "query_pre_attn_scalar": lambda config: config.query_scale**-2,
    "attention_multiplier": lambda config: config.query_scale,
    "embedding_multiplier": lambda config: config.embed_scale,
    "residual_multiplier": lambda config: config.residual_scale,
    "logit_scale": lambda config: config.output_scale,
    "logits_scaling": lambda config: 1 / config.output_scale,
    "norm_topk_prob": lambda config: config.normalize_experts,
    "routed_scaling_factor": lambda config: config.routed_scale,
}

# declared by a class, and passed over by its modules all the same
DECLARED_ONLY: Mapping[str, set[str]] = {
    "gemma": {"use_bidirectional_attention"},
    "gemma3_text": {"attn_logit_softcapping"},
}
# said in released files, and read by no program
RELEASED: Mapping[tuple[str, str], Any] = {("gemma3n_text", "query_pre_attn_scalar"): 256}


def unread(hf: Mapping[str, Any]) -> set[str]:
    """Return those keys of the two tables that transformers passes over in this configuration.

    Args:
        hf: a configuration, with its ``model_type``.
    """
    from transformers import CONFIG_MAPPING  # here, because importing it takes seconds

    if hf["model_type"] not in CONFIG_MAPPING:
        return set()  # of a name that its file knows, and reads as another's
    of = CONFIG_MAPPING[hf["model_type"]]
    if "text_config" in of.sub_configs:  # whose own keys are there, or here in older files
        return set()
    declared = {field.name for field in dataclasses.fields(of)} | set(of.attribute_map)
    declared -= DECLARED_ONLY.get(hf["model_type"], set())
    return {key for key in (*IMPLIED, *OF_TENSORS) if key in hf and key not in declared}


def check(hf: Mapping[str, Any], config: Any) -> None:
    """Refuse keys that transformers passes over and that say what it does not compute, and an
    encoder.

    Args:
        hf: the configuration as it was saved.
        config: the ModelConfig that was made of it.

    Raises:
        ValueError: all such keys.
    """
    wrong, text = list(_wrong(hf, config)), hf.get("text_config")
    if isinstance(text, Mapping) and "model_type" in text:
        wrong += [f"text_config.{one}" for one in _wrong(text, config)]
    if wrong:
        raise ValueError("; ".join(wrong))


def _wrong(hf: Mapping[str, Any], config: Any) -> Iterator[str]:
    if hf.get("is_causal") is False:  # which transformers reads of every family
        yield "is_causal: expected true, as a decoder's attention is; got false"
    for key in sorted(unread(hf) & IMPLIED.keys()):
        value, implied = hf[key], IMPLIED[key](config)
        if value == RELEASED.get((hf["model_type"], key)):
            continue
        if key == "sliding_window" and (
            hf.get("use_sliding_window") is False or (value or 0) >= config.max_positions
        ):
            continue
        if not (value is None or _same(value, implied)):
            implied = round(implied, 6) if isinstance(implied, float) else implied
            yield (
                f"{key}: expected {json.dumps(implied)}, or no such key, since transformers' "
                f"{hf['model_type']} passes over it; got {json.dumps(value)}"
            )


def _same(one: Any, other: Any) -> bool:
    if not (one or other):
        return True
    numbers = isinstance(one, (int, float)) and isinstance(other, (int, float))
    return math.isclose(one, other, rel_tol=1e-6) if numbers else one == other
