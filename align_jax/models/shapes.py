# SPDX-License-Identifier: Apache-2.0
"""Shapes of published models that several recipes share: fields of their Hugging Face configs.

A recipe names its checkpoint and gives these beside it, so that ``align_jax.plan`` can compile it
where the checkpoint cannot be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# mistralai/Mistral-7B-v0.1 and what is tuned from it (zephyr-7b-sft-full)
MISTRAL_7B: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-5,
}
# meta-llama/Meta-Llama-3-8B and what is tuned from it
LLAMA_3_8B: Mapping[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
}
# meta-llama/Llama-3.2-1B
LLAMA_3_1B: Mapping[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
# EleutherAI/pythia-6.9b-deduped and what is tuned from it
PYTHIA_6_9B: Mapping[str, Any] = {
    "vocab_size": 50432,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "use_parallel_residual": True,
    "layer_norm_eps": 1e-5,
}
# Qwen/Qwen2.5-7B and its instruction model
QWEN_2_5_7B: Mapping[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
}
