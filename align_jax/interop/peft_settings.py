# SPDX-License-Identifier: Apache-2.0
"""What adapter_config.json says: which modules of which layers PEFT adapts, at which rank and
scale, and what of it we do not compute.

References:
    https://github.com/huggingface/peft, version 0.21: tuners/lora/config.py (the keys),
    tuners/tuners_utils.py, check_target_module_exists (which modules are adapted).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any

from align_jax.core import fields
from align_jax.core.files import read_json
from align_jax.interop.tensor_files import SINGLE, others

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
Settings = Mapping[str, Any]

MERGE = (
    "merge it with peft, PeftModel.from_pretrained(base, adapter).merge_and_unload()"
    ".save_pretrained(DIR), and start from config.model.path = DIR"
)
PROMPTS = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT")


def _is_share(value: Any) -> bool:
    return fields.is_not_below_zero(value) and value < 1


def _is_names(value: Any) -> bool:
    return fields.is_text(value) or fields.is_list_of(fields.is_text)(value)


def _is_layers(value: Any) -> bool:
    return fields.is_integer(value) or fields.is_list_of(fields.is_integer)(value)


def _is_tokens(value: Any) -> bool:
    ids = fields.is_list_of(lambda one: fields.is_integer(one) and one >= 0)
    return ids(value) and len(set(value)) == len(value) > 0


# keys of adapter_config.json that change what is computed -> the values that we compute the same
PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None, "all", "lora_only"),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "arrow_config": (None,),
    "megatron_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "kasa_config": (None,),
    # the others (pissa, olora, corda, loftq, lora_ga, ...) change the base's weights too
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
# keys that we follow, or that do not change what a finished adapter computes; any other must be
# unset
HARMLESS = frozenset(
    """r lora_alpha lora_dropout use_rslora use_dora rank_pattern alpha_pattern target_modules
    exclude_modules layers_to_transform layers_pattern modules_to_save trainable_token_indices
    fan_in_fan_out task_type inference_mode auto_mapping base_model_name_or_path revision
    peft_version runtime_config megatron_core qalora_group_size loftq_config eva_config
    corda_config lora_ga_config ensure_weight_tying target_parameters""".split()
)

FIELDS = (
    fields.Kind("a positive integer", fields.is_count, ("r",)),
    fields.Kind("a number above 0", fields.is_above_zero, ("lora_alpha",)),
    fields.Kind("a number from 0 to 1, or null", fields.or_null(_is_share), ("lora_dropout",)),
    fields.Kind(
        "true, false or null",
        fields.or_null(fields.is_bool),
        ("use_rslora", "use_dora", "fan_in_fan_out", "ensure_weight_tying"),
    ),
    fields.Kind(
        "an object from modules to ranks, or null",
        fields.or_null(fields.is_object_of(fields.is_count)),
        ("rank_pattern",),
    ),
    fields.Kind(
        "an object from modules to numbers above 0, or null",
        fields.or_null(fields.is_object_of(fields.is_above_zero)),
        ("alpha_pattern",),
    ),
    fields.Kind(
        "a regular expression, a list of modules, or null",
        fields.or_null(_is_names),
        ("target_modules", "exclude_modules", "layers_pattern"),
    ),
    fields.Kind(
        "a layer's number, a list of them, or null",
        fields.or_null(_is_layers),
        ("layers_to_transform",),
    ),
    fields.Kind(
        "a list of unlike tokens' ids, an object from modules to such, or null",
        fields.or_null(lambda value: _is_tokens(value) or fields.is_object_of(_is_tokens)(value)),
        ("trainable_token_indices",),
    ),
    fields.Kind(
        "a list of modules, or null",
        fields.or_null(fields.is_list_of(fields.is_text)),
        ("modules_to_save",),
    ),
    fields.Kind(
        "a list of parameters, or null",
        fields.or_null(fields.is_list_of(fields.is_text)),
        ("target_parameters",),
    ),
)


def read(folder: str, path: str) -> dict[str, Any]:
    """Read the settings of an adapter that we compute.

    Args:
        folder: where it lies.
        path: what the user called it.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: a damaged file, a field of a wrong type, a kind of adapter that is not read.
    """
    there = set(os.listdir(folder))
    if missing := [name for name in (CONFIG, TENSORS) if name not in there]:
        raise FileNotFoundError(
            f"no PEFT adapter in {path!r}: {' and '.join(missing)} not found{_instead(folder)}"
        )
    file = os.path.join(folder, CONFIG)
    settings = read_json(file)
    plain = settings.get("peft_type", "LORA") in PLAIN["peft_type"]
    if plain:  # another kind's keys are others
        if wrong := fields.faults({"r": None, "lora_alpha": None, **settings}, FIELDS):
            raise ValueError(f"{file}: {'; '.join(wrong)}")
        _check_patterns(file, settings)
    wrong = [
        f"{key} = {settings[key]!r} (expected {', '.join(map(repr, known))})"
        for key, known in PLAIN.items()
        if key in settings and settings[key] not in known
    ]
    wrong += [
        f"{key} = {value!r} (not known here)"
        for key, value in settings.items()
        if plain and key not in PLAIN and key not in HARMLESS and value not in (None, False, [], {})
    ]
    if wrong:
        way = "" if settings.get("peft_type") in PROMPTS else f"; {MERGE}"
        raise ValueError(
            f"the adapter {path!r} is of a kind that is not supported: {'; '.join(wrong)}{way}"
        )
    return settings


def _instead(folder: str) -> str:
    """Say what a folder without an adapter that we read holds, and what to do."""
    there = set(os.listdir(folder))
    if PICKLE in there:
        return (
            f'; {PICKLE} beside it is not read: convert it, python -c "import torch, '
            "safetensors.torch as s; s.save_file({name: x.clone() for name, x in torch.load("
            f"'{PICKLE}', map_location='cpu', weights_only=True).items()}}, '{TENSORS}')\""
        )
    whole = "; it holds a whole model: that is config.model.path"
    return whole if SINGLE in there else others(folder)


def _check_patterns(file: str, settings: Settings) -> None:
    """Refuse what is given as a regular expression and is none."""
    given = [
        (key, pattern)
        for key in ("alpha_pattern", "rank_pattern", "modules_to_save")
        for pattern in settings.get(key) or ()
    ]
    given += [
        (key, settings[key])
        for key in ("target_modules", "exclude_modules", "layers_pattern")
        if isinstance(settings.get(key), str)
    ]
    for key, pattern in given:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{file}: {key}: {pattern!r} is no regular expression: {error}"
            ) from error


def adapts(settings: Settings, module: str, linear: bool = True) -> bool:
    """Tell whether PEFT adapts a module: ``check_target_module_exists`` of its tuners.

    Args:
        settings: from ``read``; they name ``target_modules``.
        module: its full name, "model.layers.3.self_attn.q_proj".
        linear: whether "all-linear" means it.
    """
    excluded, targets = settings.get("exclude_modules"), settings["target_modules"]
    if isinstance(excluded, str) and re.fullmatch(excluded, module):
        return False
    if not isinstance(excluded, str) and _named(module, excluded or ()):
        return False
    saved = settings.get("modules_to_save") or ()
    if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in saved):
        return False
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            return linear
        return re.fullmatch(targets, module) is not None
    if module in targets:
        return True
    return _named(module, targets) and _in_layers(settings, module)


def adapts_weight(settings: Settings, module: str) -> bool:
    """Tell whether PEFT adapts a module by its weight's name (``target_parameters``)."""
    return _named(f"{module}.weight", settings.get("target_parameters") or ())


def saves(settings: Settings, module: str) -> bool:
    """Tell whether PEFT trains a module whole: ``modules_to_save`` are ends of its name, or of one
    that it stands in."""
    saved = settings.get("modules_to_save") or ()
    parts = module.split(".")
    paths = [".".join(parts[: count + 1]) for count in range(len(parts))]
    return any(path.endswith(name) for path in paths for name in saved)


def rows(settings: Settings, module: str, is_embedding: bool) -> tuple[int, ...]:
    """Return the tokens whose rows PEFT trains in a module (``trainable_token_indices``)."""
    given = settings.get("trainable_token_indices") or {}
    if not isinstance(given, Mapping):
        return tuple(given) if is_embedding else ()
    return next((tuple(ids) for name, ids in given.items() if module.endswith(name)), ())


def _named(module: str, names: Any) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _in_layers(settings: Settings, module: str) -> bool:
    """Tell whether ``layers_to_transform`` means a module's layer."""
    layers, patterns = settings.get("layers_to_transform"), settings.get("layers_pattern") or ()
    if layers is None or layers == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = [re.match(rf"(?:^|.*?\.){one}\.(?P<layer>\d+)\.", module) for one in patterns]
    if not patterns:
        found = [re.match(r".*?\.[^.]*\.(?P<layer>\d+)\.", module)]
    number = next((int(match["layer"]) for match in found if match), None)
    return number is not None and number in ([layers] if isinstance(layers, int) else layers)


def of_module(settings: Settings, patterns: str, module: str, default: str) -> Any:
    """Return what ``rank_pattern`` or ``alpha_pattern`` says of a module, else the value of all."""
    for pattern, value in (settings.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return settings[default]


def scale(settings: Settings, rank: int, alpha: float | int) -> float:
    """Return the factor on the output of an adapter of this rank."""
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
