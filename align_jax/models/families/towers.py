# SPDX-License-Identifier: Apache-2.0
"""The text decoders of models that see images too: Gemma 3 to 4, Mistral 3, Qwen's from 2 to 3.5.

They are read and trained on text; what sees images is carried from checkpoint to export as it is
(``Family.carried``).  The rotary sections of Qwen's are one embedding where there is text alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from align_jax.models.config import ModelConfig, complete
from align_jax.models.families import (
    gemma3_text,
    gemma3n_text,
    gemma4_text,
    ministral3,
    mistral,
    qwen2,
    qwen3,
    qwen3_5_moe_text,
    qwen3_5_text,
)
from align_jax.models.tensor_map import TensorMap

# model_type of a text_config -> the family that it is
TEXT: Mapping[str, tuple[str, ModuleType]] = {
    "gemma3_text": ("gemma3_text", gemma3_text),
    "gemma3n_text": ("gemma3n_text", gemma3n_text),
    "gemma4_text": ("gemma4_text", gemma4_text),
    "ministral3": ("ministral3", ministral3),
    "mistral": ("mistral", mistral),
    "qwen2_vl_text": ("qwen2", qwen2),
    "qwen2_5_vl_text": ("qwen2", qwen2),
    "qwen3_vl_text": ("qwen3", qwen3),
    "qwen3_5_text": ("qwen3_5_text", qwen3_5_text),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", qwen3_5_moe_text),
}
# family -> what its tensors' names have for Llama's "model." and "lm_head."
NAMES: Mapping[str, tuple[str, str]] = {
    "gemma3": ("language_model.model.", "language_model.lm_head."),
    "gemma3n": ("model.language_model.", "lm_head."),
    "gemma4": ("model.language_model.", "lm_head."),
    "mistral3": ("language_model.model.", "language_model.lm_head."),
    "qwen2_vl": ("model.", "lm_head."),
    "qwen2_5_vl": ("model.", "lm_head."),
    "qwen3_vl": ("model.language_model.", "lm_head."),
    "qwen3_5": ("model.language_model.", "lm_head."),
    "qwen3_5_moe": ("model.language_model.", "lm_head."),
}


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face configuration: its text_config, and whether the whole ties its ends.

    Raises:
        ValueError: a text_config of another family.
    """
    full = complete(hf)
    text = full["text_config"]
    if text["model_type"] not in TEXT:  # no near name is said: it is another decoder
        raise ValueError(
            f"text_config.model_type: expected one of {', '.join(TEXT)}; got {text['model_type']!r}"
        )
    kind, module = TEXT[text["model_type"]]
    return dataclasses.replace(
        module.from_hf(text | {"model_type": kind}),
        family=full["model_type"],
        tied=bool(full["tie_word_embeddings"]),
        hf=json.dumps(dict(hf), sort_keys=True),
    )


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """Return the tensor map of the text decoder."""
    base, head = NAMES[config.family]
    _, module = TEXT[_text_type(config)]
    out = []
    for entry in module.tensor_maps(config):
        name = base + entry.name.removeprefix("model.")
        if entry.name.startswith("lm_head."):
            name = head + entry.name.removeprefix("lm_head.")
        out.append(dataclasses.replace(entry, name=name))
    return out


def _text_type(config: ModelConfig) -> str:
    return "mistral" if config.family == "mistral3" else f"{config.family}_text"
