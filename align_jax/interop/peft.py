# SPDX-License-Identifier: Apache-2.0
"""Adapters both ways between PEFT's files and our parameters, through each family's own tensor map.

    adapter_config.json         <->  LoraConfig
    adapter_model.safetensors   <->  {"layers": {"attention": {"query": {"lora_a": ...}}}}

PEFT adapts modules, we adapt linear maps; where a family's module holds several of ours (GPT-2's
``c_attn``, Phi 3's ``qkv_proj``), the file's A is ours one above the other and its B
block-diagonal, at the sum of the ranks: the same numbers. Read back, a part takes the components
that reach it alone; where all are shared, each part gets them all.

PEFT may adapt some layers only, we adapt all: a layer that the file lacks has A and B of zeros,
which no gradient reaches, and is left out again when it is written. What the file holds beside A
and B is in ``peft_whole``.

References:
    https://github.com/huggingface/peft, version 0.21: utils/save_and_load.py (the tensors' names).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.numpy
from etils import epath

from align_jax.core.tree import flatten, unflatten
from align_jax.interop import hf, peft_settings, peft_tensors, peft_whole
from align_jax.interop.peft_modules import EMBED, LinearMap, Module, adaptable, bare, suffix
from align_jax.interop.peft_settings import CONFIG, TENSORS, Settings
from align_jax.interop.peft_tensors import PREFIX, Tensors
from align_jax.interop.tensor_files import listed, remove_older
from align_jax.models import BESIDE, find_family
from align_jax.models.config import ModelConfig
from align_jax.models.heads import HEADS
from align_jax.models.lora import LEAVES, LoraConfig
from align_jax.models.model import build

SCORE = "score/out/kernel"
# family -> targets whose modules PEFT 0.21 takes for experts (transformers_weight_conversion.py)
# where they are called modules, and not where their weights are called parameters
AS_PARAMETERS = dict.fromkeys(
    """deepseek_v2 deepseek_v3 dots1 ernie4_5_moe glm4_moe glm4_moe_lite kimi_k2 qwen3_next
    solar_open""".split(),
    "shared/",
)


# ------------------------------------------------------------------------------------------- export


def save(
    path: str,
    config: ModelConfig,
    lora: LoraConfig,
    adapter_params: Mapping[str, Any],
    base_name: str,
) -> None:
    """Write an adapter that ``peft.PeftModel.from_pretrained`` loads, in float32.

    Experts that every token passes go by ``target_parameters`` where PEFT would take their modules
    for the others', and the file then has no dropout.
    A reward model's score head goes with it (``modules_to_save``).  Value heads do not: they belong
    to a trainer, and PEFT has no place for them.

    Args:
        path: folder to make, local or in a bucket.
        config: what the base is.
        lora: the adapter's configuration.
        adapter_params: nested dict with the adapter's leaves (and heads).
        base_name: name of the base model, for ``base_model_name_or_path``.

    Raises:
        ValueError: leaves that are no adapter's of this family; DoRA on a part of a module, or on
            what goes by ``target_parameters``.
    """
    values = HEADS.keys() - {"score"}
    flat = flatten({name: node for name, node in adapter_params.items() if name not in values})
    flat = {name: np.asarray(leaf, np.float32) for name, leaf in flat.items()}
    modules = adaptable(config)
    maps = [part for module in modules for part in module.parts]
    known = {f"{part.path}/{leaf}" for part in maps for leaf in LEAVES} | {SCORE}
    known |= {*lora.whole, *lora.replaced, peft_whole.TOKEN_ROWS, peft_whole.HEAD_ROWS}
    if unknown := sorted(flat.keys() - known):
        raise ValueError(f"not parameters of a PEFT adapter of {config.family}: {unknown}")
    adapted = {one: parts for one in modules if (parts := _adapted(one, flat, lora))}
    spelled = {one: parts for one, parts in adapted.items() if _is_parameter(one, config)}
    if spelled and lora.dora:
        raise ValueError(
            f"PEFT has no DoRA on {config.family}'s {AS_PARAMETERS[config.family]}*, whose modules "
            "it takes for experts: export without --adapter, which merges them"
        )
    tensors: dict[str, np.ndarray] = {}
    names: set[str] = set()
    for module, parts in adapted.items():
        for place, number in _present(module, parts, flat):
            name = module.name.format(layer=number)
            names.add(name)
            for leaf, tensor in _layer_tensors(module, parts, flat, place, lora).items():
                tensors[name + module.ends[leaf]] = tensor
    more, settings = peft_whole.write(config, lora, flat, names)
    tensors |= more
    if SCORE in flat:
        tensors["score.weight"] = flat[SCORE].T
        settings["modules_to_save"].append("score")
    tensors = {PREFIX + name: np.ascontiguousarray(x) for name, x in tensors.items()}
    folder = epath.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TENSORS).write_bytes(safetensors.numpy.save(tensors, {"format": "pt"}))
    transposed = any(part.transposed for part in maps if part.path != EMBED)
    modules_only = {one: parts for one, parts in adapted.items() if one not in spelled}
    ranks = _ranks(modules_only, flat, config, lora)
    settings = _settings(lora, ranks, transposed, SCORE in flat, base_name) | settings
    if spelled:
        names = {f"{name}.weight" for name in _ranks(spelled, flat, config, lora)}
        # PEFT drops nothing out before a parameter
        settings |= {"target_parameters": sorted(names), "lora_dropout": 0.0}
    if find_family(config.family).carried:  # whose modules are called as the decoder's
        settings["exclude_modules"] = rf"(.*\.)?{BESIDE}\..*"
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    # a whole model that lay here before would be loaded in place of the adapter
    remove_older(path, (CONFIG, TENSORS))
    (folder / "config.json").unlink(missing_ok=True)


def _is_parameter(module: Module, config: ModelConfig) -> bool:
    """Tell whether PEFT is to find a module by its weight."""
    of = AS_PARAMETERS.get(config.family)
    return of is not None and any(part.target.startswith(of) for part in module.parts)


def _adapted(module: Module, flat: Mapping[str, Any], lora: LoraConfig) -> list[LinearMap]:
    """Return the parts of a module that have an adapter."""
    parts = [part for part in module.parts if f"{part.path}/lora_a" in flat]
    if lora.dora and 0 < len(parts) < len(module.parts):
        raise ValueError(
            f"DoRA on {', '.join(part.path for part in parts)} alone cannot be written: PEFT's "
            f"{module.name} holds {', '.join(part.path for part in module.parts)}; adapt all of "
            "them"
        )
    return parts


def _present(
    module: Module, parts: Sequence[LinearMap], flat: Mapping[str, np.ndarray]
) -> list[tuple[int, int]]:
    """Return the layers that are adapted, place in the stack and number: not where A and B are
    zeros, as of what was read from a file that lacks the layer."""
    names = [f"{part.path}/{leaf}" for part in parts for leaf in LEAVES[:2]]
    return [
        (place, number)
        for place, number in enumerate(module.layers)
        if any(np.any(flat[name][place] if module.inside else flat[name]) for name in names)
    ]


def _ranks(
    adapted: Mapping[Module, Sequence[LinearMap]],
    flat: Mapping[str, np.ndarray],
    config: ModelConfig,
    lora: LoraConfig,
) -> dict[str, int]:
    """Return ``target_modules`` with their ranks: a module's shortest name where all of its layers
    are adapted, else the full names of those that are."""
    everything = sorted(
        {
            hf.as_module(entry.name, config.family).removesuffix(".weight")
            for entry in find_family(config.family).tensor_maps(config)
        }
    )
    ranks: dict[str, int] = {}
    for name in dict.fromkeys(module.name for module in adapted):
        stacks = {one: parts for one, parts in adapted.items() if one.name == name}
        layers = {
            number: lora.rank * len(parts)
            for module, parts in stacks.items()
            for _, number in _present(module, parts, flat)
        }
        whole = len(layers) == sum(len(module.layers) for module in stacks)
        if whole and len(set(layers.values())) == 1:
            ranks[suffix(name, everything)] = layers.popitem()[1]
        else:
            ranks |= {name.format(layer=number): rank for number, rank in layers.items()}
    return ranks


def _layer_tensors(
    module: Module,
    adapted: Sequence[LinearMap],
    flat: Mapping[str, np.ndarray],
    place: int,
    lora: LoraConfig,
) -> dict[str, np.ndarray]:
    """Put a layer's adapters of a module's linear maps together: our leaf -> the tensor."""

    def written(part: LinearMap, leaf: str) -> np.ndarray:
        stored = flat[f"{part.path}/{leaf}"]
        own = stored[place] if module.inside else stored
        real = tuple(slice(size) for size in part.shape(leaf, lora.rank))  # without padded rows
        return part.write(leaf, own[real], lora.rank)

    down = np.concatenate([written(part, "lora_a") for part in adapted])
    up = np.zeros((module.rows, lora.rank * len(adapted)), np.float32)
    magnitude = np.zeros((module.rows,), np.float32)
    for i, part in enumerate(adapted):
        up[part.rows, i * lora.rank : (i + 1) * lora.rank] = written(part, "lora_b")
        if lora.dora:
            magnitude[part.rows] += written(part, "lora_m")
    return {"lora_a": down, "lora_b": up} | ({"lora_m": magnitude} if lora.dora else {})


def _settings(
    lora: LoraConfig, ranks: Mapping[str, int], transposed: bool, score: bool, base_name: str
) -> dict[str, Any]:
    others = {name: rank for name, rank in ranks.items() if rank != lora.rank}

    def alpha(rank: int) -> float:  # the same scale at another rank
        return lora.scale * (math.sqrt(rank) if lora.rank_stabilized else rank)

    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if score else "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(ranks),
        "rank_pattern": others,
        "init_lora_weights": True,
        "alpha_pattern": {name: alpha(rank) for name, rank in others.items()},
        "use_rslora": lora.rank_stabilized,
        "use_dora": lora.dora,
        "fan_in_fan_out": transposed,
    }


# ------------------------------------------------------------------------------------------- import


def load(path: str, config: ModelConfig) -> tuple[LoraConfig, dict[str, Any]]:
    """Read a PEFT adapter.

    Modules of unlike ranks are filled up with zeros to the largest; unlike scales go into B; layers
    that are not adapted are zeros, and rows that pad the vocabulary.

    Args:
        path: folder or hub id.
        config: what the base is.

    Returns:
        The adapter's configuration; and its parameters, float32 numpy arrays in nested dicts, with
        what stands in the place of the base's own, and ``score/out/kernel`` where the adapter has a
        score head.  Where the configuration is ``untied``, they are of ``config.untied()``.

    Raises:
        FileNotFoundError: no such folder, or no adapter in it.
        ValueError: a kind of adapter that we do not compute; tensors missing, unexpected or
            mis-shaped.
    """
    folder = hf.locate(path)
    settings = peft_settings.read(folder, path)
    tensors = peft_tensors.read(folder, config.family)
    untied = peft_whole.unties(tensors, config, settings)
    config = config.untied() if untied else config
    beside = peft_whole.read(tensors, config, settings, untied)
    found = _by_module(tensors, config, settings, path, beside)
    flat, rank = _stack(found, settings)
    dora, stabilized = bool(settings.get("use_dora")), bool(settings.get("use_rslora"))
    alpha = settings["lora_alpha"]
    if rank != settings["r"]:
        alpha = _usual_scale(settings) * (math.sqrt(rank) if stabilized else rank)
    targets = "|".join(sorted({part.target for module in found for part in module.parts}))
    lora = LoraConfig(
        rank,
        float(alpha),
        settings.get("lora_dropout") or 0.0,
        targets,
        stabilized,
        dora,
        whole=beside.whole,
        replaced=beside.replaced,
        tokens=beside.tokens,
        head_tokens=beside.head_tokens,
        untied=untied,
    )
    flat |= beside.leaves
    if config.vocab_rows > config.vocab_size:
        shapes = flatten(build(config, lora=lora).shapes())
        flat = {name: _padded(leaf, shapes[name].shape) for name, leaf in flat.items()}
    if "score.weight" in tensors.found:
        flat[SCORE] = tensors.found["score.weight"].T
    return lora, unflatten(flat)


def _padded(leaf: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.pad(leaf, [(0, size - had) for size, had in zip(shape, leaf.shape)])


Layers = list[dict[str, np.ndarray] | None]  # of each layer: our leaf -> a module's tensor


def _by_module(
    tensors: Tensors, config: ModelConfig, settings: Settings, path: str, beside: peft_whole.Found
) -> dict[Module, Layers]:
    """Sort the file's tensors by module and layer; every mistake is in one error.

    Returns:
        The modules of which some layer is adapted.
    """
    leaves = LEAVES if settings.get("use_dora") else LEAVES[:2]
    left = dict.fromkeys(name for name in tensors.found if name not in beside.taken)
    left.pop("score.weight", None)
    missing, misshaped = beside.missing, beside.misshaped
    score = tensors.found.get("score.weight")
    if score is not None and score.shape != (1, config.hidden_size):
        misshaped.append(f"score.weight: expected {(1, config.hidden_size)}, got {score.shape}")
    out: dict[Module, Layers] = {}
    modules = adaptable(config)
    for module in modules:
        layers: Layers = []
        for number in module.layers:
            name = tensors.module(module.name).format(layer=number)
            short = bare(name, config.family)
            stored = {leaf: short + end for leaf, end in module.ends.items() if leaf in leaves}
            own = {leaf: tensors.found[one] for leaf, one in stored.items() if one in left}
            if not _is_adapted(tensors, module, name, settings):
                layers.append(None)
                continue
            for one in stored.values():
                left.pop(one, None)
            missing += [one for leaf, one in stored.items() if leaf not in own]
            rank = peft_settings.of_module(settings, "rank_pattern", name, "r")
            shapes = (rank, module.parts[0].columns), (module.rows, rank), (module.rows,)
            misshaped += [
                f"{stored[leaf]}: expected {shape}, got {own[leaf].shape}"
                for leaf, shape in zip(leaves, shapes)
                if leaf in own and own[leaf].shape != shape
            ]
            layers.append(own)
        out[module] = layers
    out = _targeted(out)
    none = [
        one
        for one in settings.get("target_parameters") or ()
        if not any(
            peft_settings.adapts_weight({"target_parameters": [one]}, module.name.format(layer=n))
            for module in out
            for n in module.layers
        )
    ]
    if left or missing or misshaped or none or not out:
        known = ", ".join(dict.fromkeys(one.name.split("{layer}.")[-1] for one in modules))
        wrong = {"missing": missing, "unexpected": sorted(left), "mis-shaped": misshaped}
        wrong["target_parameters that are no such module's weight"] = none
        way = f"\n  what is unexpected is not read; {peft_settings.MERGE}" if left else ""
        raise ValueError(
            f"the adapter {path!r} does not fit a {config.family} model, of which these can be "
            f"adapted: {known}\n{listed(wrong) or '  it adapts none of them'}{way}"
        )
    _check_dora(out, settings, path)
    return out


def _targeted(modules: Mapping[Module, Layers]) -> dict[Module, Layers]:
    """Return the modules whose targets have an adapter, if only in one layer or stack of layers."""
    targets = {
        part.target
        for module, layers in modules.items()
        if any(layer is not None for layer in layers)
        for part in module.parts
    }
    return {
        module: layers
        for module, layers in modules.items()
        if any(part.target in targets for part in module.parts)
    }


def _is_adapted(tensors: Tensors, module: Module, name: str, settings: Settings) -> bool:
    """Tell whether a layer of a module is adapted: as the settings say, or where these name nothing
    (``target_modules`` of older versions), whether the file has any layer of it."""
    if peft_settings.adapts_weight(settings, name):
        return True
    if settings.get("target_modules") is not None:
        return peft_settings.adapts(settings, name, module.linear)
    short = bare(module.name, tensors.family) + module.ends["lora_a"]
    return any(short.format(layer=layer) in tensors.found for layer in module.layers)


def _check_dora(modules: Mapping[Module, Layers], settings: Settings, path: str) -> None:
    """Refuse DoRA on some layers only: the others' magnitudes would be trained too."""
    partly = [module.name for module, layers in modules.items() if None in layers]
    if settings.get("use_dora") and partly:
        raise ValueError(
            f"the adapter {path!r} has DoRA on some layers only of {', '.join(partly)}, which is "
            f"not supported; {peft_settings.MERGE}"
        )


def _usual_scale(settings: Settings) -> float:
    return peft_settings.scale(settings, settings["r"], settings["lora_alpha"])


def _stack(
    modules: Mapping[Module, Layers], settings: Settings
) -> tuple[dict[str, np.ndarray], int]:
    """Stack the layers of each linear map, at one rank and one scale; return them and the rank."""
    ours: dict[LinearMap, list[dict[str, np.ndarray]]] = {}  # of each layer, {}: not adapted
    for module, layers in modules.items():
        for number, tensors in zip(module.layers, layers):
            divided: list[dict[str, np.ndarray]] = [{} for _ in module.parts]
            if tensors is not None:
                name, rank = module.name.format(layer=number), len(tensors["lora_a"])
                alpha = peft_settings.of_module(settings, "alpha_pattern", name, "lora_alpha")
                factor = peft_settings.scale(settings, rank, alpha) / _usual_scale(settings)
                divided = _divided(module, tensors, factor)
            for part, own in zip(module.parts, divided):
                ours.setdefault(part, []).append(own)
    rank = max(len(own["lora_b"]) for layers in ours.values() for own in layers if own)
    leaves = LEAVES if settings.get("use_dora") else LEAVES[:2]

    def filled(part: LinearMap, own: Mapping[str, np.ndarray], leaf: str) -> np.ndarray:
        if not own:
            return np.zeros(part.shape(leaf, rank), np.float32)
        return _filled(own[leaf], rank, leaf)

    inside = {part for module in modules if module.inside for part in module.parts}
    found = {}
    for part, own_layers in ours.items():
        for leaf in leaves:
            every = [filled(part, own, leaf) for own in own_layers]
            found[f"{part.path}/{leaf}"] = np.stack(every) if part in inside else every[0]
    return found, rank


def _divided(
    module: Module, tensors: Mapping[str, np.ndarray], factor: float
) -> list[dict[str, np.ndarray]]:
    """Divide a layer's tensors among the linear maps of their module, B times a factor."""
    down, up = tensors["lora_a"], tensors["lora_b"]
    ups = [part.read("lora_b", up) for part in module.parts]
    reaches = np.stack([np.any(b.reshape(len(b), -1) != 0, axis=1) for b in ups])
    out = []
    for part, b, own in zip(module.parts, ups, reaches):  # own: [r]
        kept = own | ~np.any(reaches, axis=0)  # what reaches other parts alone is left out
        found = {"lora_a": part.read("lora_a", down[kept]), "lora_b": b[kept] * np.float32(factor)}
        if "lora_m" in tensors:
            found["lora_m"] = part.read("lora_m", tensors["lora_m"])
        out.append(found)
    return out


def _filled(value: np.ndarray, rank: int, leaf: str) -> np.ndarray:
    """Fill the axis of the rank up with zeros."""
    if leaf == "lora_m":
        return value
    widths = [(0, 0)] * value.ndim
    axis = value.ndim - 1 if leaf == "lora_a" else 0
    widths[axis] = (0, rank - value.shape[axis])
    return np.pad(value, widths)
