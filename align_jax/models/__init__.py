# SPDX-License-Identifier: Apache-2.0
"""The models: one decoder, a table of families, weights both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from align_jax.core import own
from align_jax.models.config import ModelConfig
from align_jax.models.families import (
    arcee,
    cohere2,
    cwm,
    deepseek_v2,
    deepseek_v3,
    dots1,
    ernie4_5,
    ernie4_5_moe,
    exaone4,
    gemma,
    gemma2,
    gemma3_text,
    gemma3n_text,
    gemma4_text,
    glm4,
    glm4_moe,
    glm4_moe_lite,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    hunyuan_v1_dense,
    kimi_k2,
    llama,
    minimax_m2,
    ministral,
    ministral3,
    mistral,
    mixtral,
    nemotron,
    olmo2,
    olmo3,
    olmoe,
    opt,
    phi,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5_moe_text,
    qwen3_5_text,
    qwen3_moe,
    qwen3_next,
    seed_oss,
    smollm3,
    solar_open,
    starcoder2,
    towers,
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
        modules: the same prefix in transformers' modules, and so in adapters and in some
            checkpoints, "" where it is that one.
        carried: regular expression of tensors that are not the decoder's: an export takes them from
            the checkpoint as they are.
        classifier: class name of the sequence classifier (reward models), "" where there is none.
        ignored: regular expression of tensors that are buffers, not weights.
    """

    from_hf: Callable[[Mapping[str, Any]], ModelConfig]
    tensor_maps: Callable[[ModelConfig], list[TensorMap]]
    architecture: str
    base: str = "model."
    modules: str = ""
    carried: str = ""
    classifier: str = ""
    ignored: str = r"rotary_emb\.inv_freq$"


# keys and values of layers that use others', which released files hold all the same
GEMMA_UNUSED = r"model\.(language_model\.)?layers\.\d+\.self_attn\.[kv]_(proj|norm)\."
# what modules of models that see images are called beside the decoder
BESIDE = "(vision_tower|multi_modal_projector|visual|audio_tower|embed_vision|embed_audio)"


def _row(module: ModuleType, name: str, **changes: Any) -> Family:
    """Make the row of a family's file, whose classes transformers calls by this name."""
    fields = dict(
        from_hf=module.from_hf,
        tensor_maps=module.tensor_maps,
        architecture=f"{name}ForCausalLM",
        classifier=f"{name}ForSequenceClassification",
    )
    return Family(**(fields | changes))


def _tower(family: str, name: str, beside: str = r"mtp\.") -> Family:
    """Make the row of a model that sees images, of which we read the text decoder; ``beside``: what
    else it has that is carried."""
    return Family(
        towers.from_hf,
        towers.tensor_maps,
        f"{name}ForConditionalGeneration",
        base=towers.NAMES[family][0],
        modules="model.language_model.",
        carried=rf"^((model\.)?{BESIDE}\.|{beside})",
    )


FAMILIES: Mapping[str, Family] = {
    "arcee": _row(arcee, "Arcee"),
    "cohere2": _row(cohere2, "Cohere2", classifier=""),
    "cwm": _row(cwm, "Cwm", classifier=""),
    "deepseek_v2": _row(deepseek_v2, "DeepseekV2"),
    # the layer behind the last predicts more tokens at once, which transformers leaves out
    "deepseek_v3": _row(deepseek_v3, "DeepseekV3", carried=r"^model\.layers\.61\."),
    "dots1": _row(dots1, "Dots1", classifier=""),
    "ernie4_5": _row(ernie4_5, "Ernie4_5", classifier=""),
    # what predicts more tokens at once stands under mtp, which transformers leaves out
    "ernie4_5_moe": _row(ernie4_5_moe, "Ernie4_5_Moe", classifier="", carried=r"^(model\.)?mtp_"),
    "exaone4": _row(exaone4, "Exaone4"),
    "gemma": _row(gemma, "Gemma"),
    "gemma2": _row(gemma2, "Gemma2"),
    "gemma3": _tower("gemma3", "Gemma3"),
    "gemma3_text": _row(gemma3_text, "Gemma3", classifier="Gemma3TextForSequenceClassification"),
    "gemma3n": _tower("gemma3n", "Gemma3n", GEMMA_UNUSED),
    "gemma3n_text": _row(gemma3n_text, "Gemma3n", classifier="", carried=GEMMA_UNUSED),
    "gemma4": _tower("gemma4", "Gemma4", GEMMA_UNUSED),
    "gemma4_text": _row(gemma4_text, "Gemma4", classifier="", carried=GEMMA_UNUSED),
    "glm4": _row(glm4, "Glm4"),
    # the further layers predict more tokens at once, which transformers leaves out
    "glm4_moe": _row(glm4_moe, "Glm4Moe", classifier="", carried=r"^model\.layers\.(46|92)\."),
    "glm4_moe_lite": _row(
        glm4_moe_lite, "Glm4MoeLite", classifier="", carried=r"^model\.layers\.47\."
    ),
    "gpt2": _row(
        gpt2,
        "GPT2",
        architecture="GPT2LMHeadModel",
        base="transformer.",
        ignored=r"attn\.(masked_)?bias$",
    ),
    "gpt_neox": _row(
        gpt_neox,
        "GPTNeoX",
        base="gpt_neox.",
        ignored=r"attention\.(masked_)?bias$|rotary_emb\.inv_freq$",
    ),
    "gpt_oss": _row(gpt_oss, "GptOss"),
    "granite": _row(granite, "Granite", classifier=""),
    "hunyuan_v1_dense": _row(hunyuan_v1_dense, "HunYuanDenseV1"),
    # transformers has it as remote code alone, of DeepSeek's classes
    "kimi_k2": _row(kimi_k2, "DeepseekV3", classifier="", carried=r"^model\.layers\.61\."),
    "llama": _row(llama, "Llama"),
    "minimax_m2": _row(minimax_m2, "MiniMaxM2", classifier=""),
    "ministral": _row(ministral, "Ministral"),
    "ministral3": _row(ministral3, "Ministral3"),
    "mistral": _row(mistral, "Mistral"),
    "mistral3": _tower("mistral3", "Mistral3"),
    "mixtral": _row(mixtral, "Mixtral"),
    "nemotron": _row(nemotron, "Nemotron"),
    "olmo2": _row(olmo2, "Olmo2"),
    "olmo3": _row(olmo3, "Olmo3"),
    "olmoe": _row(olmoe, "Olmoe", classifier=""),
    "opt": _row(opt, "OPT"),
    "phi": _row(phi, "Phi"),
    "phi3": _row(phi3, "Phi3"),
    "qwen2": _row(qwen2, "Qwen2"),
    "qwen2_5_vl": _tower("qwen2_5_vl", "Qwen2_5_VL"),
    "qwen2_moe": _row(qwen2_moe, "Qwen2Moe"),
    "qwen2_vl": _tower("qwen2_vl", "Qwen2VL"),
    "qwen3": _row(qwen3, "Qwen3"),
    "qwen3_5": _tower("qwen3_5", "Qwen3_5"),
    "qwen3_5_moe": _tower("qwen3_5_moe", "Qwen3_5Moe"),
    # what predicts more tokens at once stands under mtp, which transformers leaves out
    "qwen3_5_moe_text": _row(qwen3_5_moe_text, "Qwen3_5Moe", classifier="", carried=r"^mtp\."),
    "qwen3_5_text": _row(
        qwen3_5_text,
        "Qwen3_5",
        classifier="Qwen3_5TextForSequenceClassification",
        carried=r"^mtp\.",
    ),
    "qwen3_moe": _row(qwen3_moe, "Qwen3Moe"),
    "qwen3_next": _row(qwen3_next, "Qwen3Next", carried=r"^mtp\."),
    "qwen3_vl": _tower("qwen3_vl", "Qwen3VL"),
    "seed_oss": _row(seed_oss, "SeedOss"),
    "smollm3": _row(smollm3, "SmolLM3"),
    "solar_open": _row(solar_open, "SolarOpen", classifier=""),
    "starcoder2": _row(starcoder2, "Starcoder2"),
}


def find_family(name: str) -> Family:
    """Return a family by name: the table's, or the user's own, ``module:name``.

    Raises:
        ValueError: an unknown name; something else than a ``Family``.
    """
    return own.row(FAMILIES, name, "the model's family")
