# SPDX-License-Identifier: Apache-2.0
"""The models: one decoder, a table of families, weights both ways."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from align_jax.models.config import ModelConfig
from align_jax.models.families import llama
from align_jax.models.weights import Weight


@dataclasses.dataclass(frozen=True)
class Family:
    """What a Hugging Face ``model_type`` needs.

    Attributes:
        from_hf: Hugging Face configuration -> ours.
        weights: our configuration -> the invertible weight map.
        architecture: class name of the causal language model, as exported.
        base: prefix that checkpoints of the bare decoder lack.
        classifier: class name of the sequence classifier (reward models), "" where there is none.
        ignored: regular expression of tensors that are buffers, not weights.
    """

    from_hf: Callable[[Mapping[str, Any]], ModelConfig]
    weights: Callable[[ModelConfig], list[Weight]]
    architecture: str
    base: str = "model."
    classifier: str = ""
    ignored: str = r"rotary_emb\.inv_freq$"


FAMILIES: Mapping[str, Family] = {
    "llama": Family(llama.from_hf, llama.weights, "LlamaForCausalLM", classifier="LlamaForSequenceClassification"),
}
