# SPDX-License-Identifier: Apache-2.0
"""The models: one decoder, a table of families, weights both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from align_jax.models.config import ModelConfig
from align_jax.models.families import (
    gemma,
    gemma2,
    gemma3_text,
    gpt2,
    gpt_neox,
    llama,
    mistral,
    mixtral,
    olmo2,
    opt,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from align_jax.models.tensor_map import TensorMap


@dataclasses.dataclass(frozen=True)
class Family:
    """What a Hugging Face ``model_type`` needs.

    Attributes:
        from_hf: Hugging Face configuration -> ours.
        tensor_maps: our configuration -> the invertible tensor map.
        architecture: class name of the causal language model, as exported.
        base: prefix that checkpoints of the bare decoder lack.
        classifier: class name of the sequence classifier (reward models), "" where there is none.
        ignored: regular expression of tensors that are buffers, not weights.
    """

    from_hf: Callable[[Mapping[str, Any]], ModelConfig]
    tensor_maps: Callable[[ModelConfig], list[TensorMap]]
    architecture: str
    base: str = "model."
    classifier: str = ""
    ignored: str = r"rotary_emb\.inv_freq$"


FAMILIES: Mapping[str, Family] = {
    "gemma": Family(
        gemma.from_hf,
        gemma.tensor_maps,
        "GemmaForCausalLM",
        classifier="GemmaForSequenceClassification",
    ),
    "gemma2": Family(
        gemma2.from_hf,
        gemma2.tensor_maps,
        "Gemma2ForCausalLM",
        classifier="Gemma2ForSequenceClassification",
    ),
    "gemma3_text": Family(
        gemma3_text.from_hf,
        gemma3_text.tensor_maps,
        "Gemma3ForCausalLM",
        classifier="Gemma3TextForSequenceClassification",
    ),
    "gpt2": Family(
        gpt2.from_hf,
        gpt2.tensor_maps,
        "GPT2LMHeadModel",
        base="transformer.",
        classifier="GPT2ForSequenceClassification",
        ignored=r"attn\.(masked_)?bias$",
    ),
    "gpt_neox": Family(
        gpt_neox.from_hf,
        gpt_neox.tensor_maps,
        "GPTNeoXForCausalLM",
        base="gpt_neox.",
        classifier="GPTNeoXForSequenceClassification",
        ignored=r"attention\.(masked_)?bias$|rotary_emb\.inv_freq$",
    ),
    "llama": Family(
        llama.from_hf,
        llama.tensor_maps,
        "LlamaForCausalLM",
        classifier="LlamaForSequenceClassification",
    ),
    "mistral": Family(
        mistral.from_hf,
        mistral.tensor_maps,
        "MistralForCausalLM",
        classifier="MistralForSequenceClassification",
    ),
    "mixtral": Family(
        mixtral.from_hf,
        mixtral.tensor_maps,
        "MixtralForCausalLM",
        classifier="MixtralForSequenceClassification",
    ),
    "olmo2": Family(
        olmo2.from_hf,
        olmo2.tensor_maps,
        "Olmo2ForCausalLM",
        classifier="Olmo2ForSequenceClassification",
    ),
    "opt": Family(
        opt.from_hf, opt.tensor_maps, "OPTForCausalLM", classifier="OPTForSequenceClassification"
    ),
    "phi3": Family(
        phi3.from_hf,
        phi3.tensor_maps,
        "Phi3ForCausalLM",
        classifier="Phi3ForSequenceClassification",
    ),
    "qwen2": Family(
        qwen2.from_hf,
        qwen2.tensor_maps,
        "Qwen2ForCausalLM",
        classifier="Qwen2ForSequenceClassification",
    ),
    "qwen3": Family(
        qwen3.from_hf,
        qwen3.tensor_maps,
        "Qwen3ForCausalLM",
        classifier="Qwen3ForSequenceClassification",
    ),
    "qwen3_moe": Family(
        qwen3_moe.from_hf,
        qwen3_moe.tensor_maps,
        "Qwen3MoeForCausalLM",
        classifier="Qwen3MoeForSequenceClassification",
    ),
    "smollm3": Family(
        smollm3.from_hf,
        smollm3.tensor_maps,
        "SmolLM3ForCausalLM",
        classifier="SmolLM3ForSequenceClassification",
    ),
}
