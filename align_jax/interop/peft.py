# SPDX-License-Identifier: Apache-2.0
"""Adapters both ways between PEFT's files and our parameters, through each family's own tensor map.

    adapter_config.json         <->  LoraConfig
    adapter_model.safetensors   <->  {"layers": {"attention": {"query": {"lora_a": ...}}}}

PEFT adapts modules, we adapt linear maps; where a family's module holds several of ours (GPT-2's
``c_attn``, Phi 3's ``qkv_proj``), the file's A is ours one above the other and its B
block-diagonal, at the sum of the ranks: the same numbers. Read back, a part takes the components
that reach it alone; where all are shared, each part gets them all.

References:
    https://github.com/huggingface/peft, version 0.21: tuners/lora/config.py (the keys),
    utils/save_and_load.py (the tensors' names).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.numpy
from etils import epath

from align_jax.core import fields
from align_jax.core.files import read_json
from align_jax.core.tree import flatten, unflatten
from align_jax.interop import hf
from align_jax.interop.tensor_files import (
    DTYPES,
    NO_FLOATS,
    SINGLE,
    Reader,
    listed,
    others,
    remove_older,
)
from align_jax.models import BESIDE, FAMILIES
from align_jax.models.config import ModelConfig
from align_jax.models.heads import HEADS
from align_jax.models.lora import LEAVES, LoraConfig
from align_jax.models.model import build
from align_jax.models.roles import role_of
from align_jax.models.tensor_map import AxisMap, parse

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SCORE = "score/out/kernel"


def _is_share(value: Any) -> bool:
    return fields.is_not_below_zero(value) and value < 1


# keys of adapter_config.json that change what is computed -> the values that we compute the same
PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "arrow_config": (None,),
    "megatron_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "kasa_config": (None,),
    "modules_to_save": (None, [], ["score"], ["classifier", "score"]),
    # the others (pissa, olora, corda, loftq, lora_ga, ...) change the base's weights too
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
# keys that we follow, or that do not change what a finished adapter computes; any other must be
# unset
HARMLESS = frozenset(
    """r lora_alpha lora_dropout use_rslora use_dora rank_pattern alpha_pattern target_modules
    exclude_modules fan_in_fan_out layers_pattern task_type inference_mode auto_mapping
    base_model_name_or_path revision peft_version runtime_config megatron_core qalora_group_size
    loftq_config eva_config corda_config lora_ga_config ensure_weight_tying""".split()
)

FIELDS = (
    fields.Kind("a positive integer", fields.is_count, ("r",)),
    fields.Kind("a number above 0", fields.is_above_zero, ("lora_alpha",)),
    fields.Kind("a number from 0 to 1, or null", fields.or_null(_is_share), ("lora_dropout",)),
    fields.Kind(
        "true, false or null",
        fields.or_null(fields.is_bool),
        ("use_rslora", "use_dora", "fan_in_fan_out"),
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
)


@dataclasses.dataclass(frozen=True)
class LinearMap:
    """One of our linear maps in a module.

    Attributes:
        path: "layers/attention/query".
        axes: of the kernel.
        inputs: how many axes are contracted.
        start: first row of the module's outputs that belongs to the map.
    """

    path: str
    axes: AxisMap
    inputs: int
    start: int

    @property
    def _sides(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The letters of the module's inputs and of its outputs, as the tensor groups them."""
        first, second = self.axes.theirs
        ours = set(self.axes.ours[: self.inputs])
        return (first, second) if set(first) == ours else (second, first)

    def _layout(self, leaf: str, rank: int) -> AxisMap:
        """Return how lora_A [r, in], lora_B [out, r] or the magnitudes [out] become our leaf."""
        (inputs, outputs), sizes = self._sides, {**self.axes.sizes, "r": rank}
        ours_in, ours_out = self.axes.ours[: self.inputs], self.axes.ours[self.inputs :]
        if leaf == "lora_a":
            return AxisMap((("r",), inputs), (*ours_in, "r"), sizes)
        if leaf == "lora_b":
            return AxisMap((outputs, ("r",)), ("r", *ours_out), sizes)
        return AxisMap((outputs,), ours_out, sizes)

    @property
    def transposed(self) -> bool:
        """Whether the module's weight is [in, out] (GPT-2's Conv1D)."""
        return self.axes.theirs[0] == self._sides[0]

    @property
    def columns(self) -> int:
        """How many inputs the module has."""
        return self._layout("lora_a", 1).their_shape[1]

    @property
    def rows(self) -> slice:
        """The module's outputs that the map reaches into; a fused tensor's maps may share them."""
        size = math.prod(self.axes.sizes[letter] for letter in self._sides[1])
        return slice(self.start, self.start + size)

    def read(self, leaf: str, tensor: np.ndarray) -> np.ndarray:
        """Take this map's part of a layer's tensor."""
        rank = tensor.shape[0] if leaf == "lora_a" else tensor.shape[-1]
        axes = self._layout(leaf, rank)
        whole = [slice(None)] * len(axes.ours)
        rows = tensor if leaf == "lora_a" else tensor[self.rows]
        return axes.to_ours(rows[axes.bounds(whole)], whole)

    def write(self, leaf: str, ours: np.ndarray, rank: int) -> np.ndarray:
        """Return a layer's tensor as the file holds it (of this map's rows), zero where other maps'
        numbers go."""
        axes = self._layout(leaf, rank)
        out = np.zeros(axes.their_shape, np.float32)
        axes.to_theirs(np.asarray(ours, np.float32), out)
        return out


def adaptable(config: ModelConfig) -> dict[str, list[LinearMap]]:
    """Return a family's modules that can be adapted: name with {layer} -> our linear maps in it."""
    if config.dense_layers:
        raise ValueError(
            f"{config.family}: PEFT adapters of models with dense layers among those with "
            "experts are not read or written; export without --adapter merges it"
        )
    roles = flatten(build(config).roles())
    out: dict[str, list[LinearMap]] = {}
    for entry in FAMILIES[config.family].tensor_maps(config):
        name = hf.as_module(entry.name, config.family).removesuffix(".weight")
        role = role_of(roles, entry.path)
        if role.adaptable:
            start = entry.span[0] if entry.span else 0
            path = entry.path.removesuffix("/kernel")
            part = LinearMap(path, parse(entry, config), role.inputs, start)
            out.setdefault(name, []).append(part)
    return out


def _rows(parts: Sequence[LinearMap]) -> int:
    """Return how many outputs a module has."""
    return max(part.rows.stop for part in parts)


# ------------------------------------------------------------------------------------------- export


def save(
    path: str,
    config: ModelConfig,
    lora: LoraConfig,
    adapter_params: Mapping[str, Any],
    base_name: str,
) -> None:
    """Write an adapter that ``peft.PeftModel.from_pretrained`` loads, in float32.

    A reward model's score head goes with it (``modules_to_save``).  Value heads do not: they belong
    to a trainer, and PEFT has no place for them.

    Args:
        path: folder to make, local or in a bucket.
        config: what the base is.
        lora: the adapter's configuration.
        adapter_params: nested dict with the adapter's leaves (and heads).
        base_name: name of the base model, for ``base_model_name_or_path``.

    Raises:
        ValueError: leaves that are no adapter's of this family; DoRA on a part of a module.
    """
    values = HEADS.keys() - {"score"}
    flat = flatten({name: node for name, node in adapter_params.items() if name not in values})
    modules = adaptable(config)
    maps = [part for parts in modules.values() for part in parts]
    known = {f"{part.path}/{leaf}" for part in maps for leaf in LEAVES} | {SCORE}
    if unknown := sorted(flat.keys() - known):
        raise ValueError(f"not parameters of a PEFT adapter of {config.family}: {unknown}")
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}  # of each target
    everything = [
        hf.as_module(entry.name, config.family).removesuffix(".weight")
        for entry in FAMILIES[config.family].tensor_maps(config)
    ]
    for name, parts in modules.items():
        adapted = [part for part in parts if f"{part.path}/lora_a" in flat]
        if not adapted:
            continue
        if lora.dora and len(adapted) < len(parts):
            raise ValueError(
                f"DoRA on {', '.join(part.path for part in adapted)} alone cannot be written: "
                f"PEFT's {name} holds {', '.join(part.path for part in parts)}; adapt all of them"
            )
        ranks[_suffix(name, everything)] = lora.rank * len(adapted)
        leaves = {
            f"{part.path}/{leaf}": np.asarray(flat[f"{part.path}/{leaf}"], np.float32)
            for part in adapted
            for leaf in (LEAVES if lora.dora else LEAVES[:2])
        }
        for layer in range(config.num_layers):
            own = {key: leaf[layer] for key, leaf in leaves.items()}
            found = _layer_tensors(adapted, own, _rows(parts), lora)
            tensors |= {PREFIX + name.format(layer=layer) + end: x for end, x in found.items()}
    if SCORE in flat:
        score = np.asarray(flat[SCORE], np.float32)
        tensors[f"{PREFIX}score.weight"] = np.ascontiguousarray(score.T)
    folder = epath.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TENSORS).write_bytes(safetensors.numpy.save(tensors, {"format": "pt"}))
    transposed = any(part.transposed for part in maps)
    settings = _settings(lora, ranks, transposed, SCORE in flat, base_name)
    if FAMILIES[config.family].carried:  # whose modules are called as the decoder's
        settings["exclude_modules"] = rf"(.*\.)?{BESIDE}\..*"
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    # a whole model that lay here before would be loaded in place of the adapter
    remove_older(path, (CONFIG, TENSORS))
    (folder / "config.json").unlink(missing_ok=True)


def _suffix(name: str, modules: Sequence[str]) -> str:
    """Return the shortest end of a module's name that no other module's name has."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        end = "." + ".".join(parts[-count:])
        if not any(other.endswith(end) for other in modules if other != name):
            return end[1:]
    return name


# our leaf -> the end of the tensor's name
ENDS = dict(zip(LEAVES, (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")))


def _layer_tensors(
    adapted: Sequence[LinearMap], leaves: Mapping[str, np.ndarray], rows: int, lora: LoraConfig
) -> dict[str, np.ndarray]:
    """Put a layer's adapters of a module's linear maps together: end of the tensor's name -> it."""

    def written(part: LinearMap, leaf: str) -> np.ndarray:
        return part.write(leaf, leaves[f"{part.path}/{leaf}"], lora.rank)

    down = np.concatenate([written(part, "lora_a") for part in adapted])
    up = np.zeros((rows, lora.rank * len(adapted)), np.float32)
    magnitude = np.zeros((rows,), np.float32)
    for i, part in enumerate(adapted):
        up[part.rows, i * lora.rank : (i + 1) * lora.rank] = written(part, "lora_b")
        if lora.dora:
            magnitude[part.rows] += written(part, "lora_m")
    found = {"lora_a": down, "lora_b": up} | ({"lora_m": magnitude} if lora.dora else {})
    return {ENDS[leaf]: tensor for leaf, tensor in found.items()}


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
        "bias": "none",
        "init_lora_weights": True,
        "alpha_pattern": {name: alpha(rank) for name, rank in others.items()},
        "use_rslora": lora.rank_stabilized,
        "use_dora": lora.dora,
        "fan_in_fan_out": transposed,
        "modules_to_save": ["score"] if score else None,
    }


# ------------------------------------------------------------------------------------------- import


def load(path: str, config: ModelConfig) -> tuple[LoraConfig, dict[str, Any]]:
    """Read a PEFT adapter.

    Modules of unlike ranks are filled up with zeros to the largest; unlike scales go into B.

    Args:
        path: folder or hub id.
        config: what the base is.

    Returns:
        The adapter's configuration; and its parameters, float32 numpy arrays in nested dicts, with
        ``score/out/kernel`` where the adapter has a score head.

    Raises:
        FileNotFoundError: no such folder, or no adapter in it.
        ValueError: a kind of adapter that we do not compute; tensors missing, unexpected or
            mis-shaped.
    """
    folder = hf.locate(path)
    settings = _read_settings(folder, path)
    tensors = _read_tensors(folder)
    dora, stabilized = bool(settings.get("use_dora")), bool(settings.get("use_rslora"))
    layers = _by_module(tensors, config, settings, path)
    flat, rank = _stack(layers, settings, config)
    alpha = settings["lora_alpha"]
    if rank != settings["r"]:
        alpha = _scale(settings, settings["r"], alpha) * (math.sqrt(rank) if stabilized else rank)
    targets = "|".join(sorted({name.removeprefix("layers/").rsplit("/", 1)[0] for name in flat}))
    if "score.weight" in tensors:
        flat[SCORE] = tensors["score.weight"].T
    dropout = settings.get("lora_dropout") or 0.0
    return LoraConfig(rank, float(alpha), dropout, targets, stabilized, dora), unflatten(flat)


def _read_settings(folder: str, path: str) -> dict[str, Any]:
    there = set(os.listdir(folder))
    if missing := [name for name in (CONFIG, TENSORS) if name not in there]:
        whole = "; it holds a whole model: that is config.model.path"
        raise FileNotFoundError(
            f"no PEFT adapter in {path!r}: {' and '.join(missing)} not found"
            + (whole if SINGLE in there else others(folder))
        )
    file = os.path.join(folder, CONFIG)
    settings = read_json(file)
    if wrong := fields.faults({"r": None, "lora_alpha": None, **settings}, FIELDS):
        raise ValueError(f"{file}: {'; '.join(wrong)}")
    for key in ("alpha_pattern", "rank_pattern"):
        for pattern in settings.get(key) or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"{file}: {key}: {pattern!r} is no regular expression: {error}"
                ) from error
    wrong = [
        f"{key} = {settings[key]!r} (expected {', '.join(map(repr, known))})"
        for key, known in PLAIN.items()
        if key in settings and settings[key] not in known
    ]
    wrong += [
        f"{key} = {value!r} (not known here)"
        for key, value in settings.items()
        if key not in PLAIN and key not in HARMLESS and value not in (None, False, [], {})
    ]
    if wrong:
        raise ValueError(
            f"the adapter {path!r} is of a kind that is not supported: {'; '.join(wrong)}"
        )
    return settings


def _read_tensors(folder: str) -> dict[str, np.ndarray]:
    with Reader(folder, TENSORS) as reader:
        other = [f"{name}: {reader.code(name)}" for name in sorted(reader.names)]
        other = [one for one in other if one.rpartition(" ")[2] not in DTYPES]
        if other:
            raise ValueError(f"{os.path.join(folder, TENSORS)}:\n{listed({NO_FLOATS: other})}")
        found = {
            name.removeprefix(PREFIX): reader.read(name).astype(np.float32)
            for name in sorted(reader.names)
        }
        reader.check_finite()
    return found


Layers = list[dict[str, np.ndarray]]  # of each layer: our leaf -> a module's tensor


def _by_module(
    tensors: Mapping[str, np.ndarray], config: ModelConfig, settings: Mapping[str, Any], path: str
) -> dict[str, Layers]:
    """Sort the file's tensors by module and layer; every mistake is in one error."""
    leaves = LEAVES if settings.get("use_dora") else LEAVES[:2]
    left = set(tensors) - {"score.weight"}
    missing: list[str] = []
    misshaped: list[str] = []
    if "score.weight" in tensors and (got := tensors["score.weight"].shape) != (
        1,
        config.hidden_size,
    ):
        misshaped.append(f"score.weight: expected {(1, config.hidden_size)}, got {got}")
    out: dict[str, Layers] = {}
    modules = adaptable(config)
    for module, parts in modules.items():
        names = [
            {leaf: module.format(layer=layer) + ENDS[leaf] for leaf in leaves}
            for layer in range(config.num_layers)
        ]
        mine = {name for layer in names for name in layer.values()}
        if not mine & left:
            continue
        missing += sorted(mine - left)
        if mine <= left:
            out[module] = [{leaf: tensors[name] for leaf, name in layer.items()} for layer in names]
            for number, (layer, found) in enumerate(zip(names, out[module])):
                rank = _of_module(settings, "rank_pattern", module.format(layer=number), "r")
                shapes = (rank, parts[0].columns), (_rows(parts), rank), (_rows(parts),)
                misshaped += [
                    f"{layer[leaf]}: expected {shape}, got {found[leaf].shape}"
                    for leaf, shape in zip(leaves, shapes)
                    if found[leaf].shape != shape
                ]
        left -= mine
    if left or missing or misshaped or not out:
        known = ", ".join(name.split("{layer}.")[1] for name in modules)
        wrong = {"missing": missing, "unexpected": sorted(left), "mis-shaped": misshaped}
        raise ValueError(
            f"the adapter {path!r} does not fit a {config.family} model, in every layer of which "
            f"these can be adapted: {known}\n{listed(wrong)}"
        )
    return out


def _scale(settings: Mapping[str, Any], rank: int, alpha: float | int) -> float:
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _of_module(settings: Mapping[str, Any], patterns: str, module: str, default: str) -> Any:
    """Return what the patterns say of a module, else the value of all."""
    for pattern, value in (settings.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return settings[default]


def _stack(
    modules: Mapping[str, Layers], settings: Mapping[str, Any], config: ModelConfig
) -> tuple[dict[str, np.ndarray], int]:
    """Stack the layers of each linear map, at one rank and one scale; return them and the rank."""
    ours: dict[str, list[np.ndarray]] = {}
    maps, usual = adaptable(config), _scale(settings, settings["r"], settings["lora_alpha"])
    for module, layers in modules.items():
        for layer, tensors in enumerate(layers):
            down, up = tensors["lora_a"], tensors["lora_b"]
            alpha = _of_module(settings, "alpha_pattern", module.format(layer=layer), "lora_alpha")
            factor = np.float32(_scale(settings, down.shape[0], alpha) / usual)
            ups = [part.read("lora_b", up) for part in maps[module]]
            reaches = np.stack([np.any(b.reshape(len(b), -1) != 0, axis=1) for b in ups])
            for part, b, own in zip(maps[module], ups, reaches):  # own: [r]
                kept = own | ~np.any(reaches, axis=0)  # what reaches other parts alone is left out
                found = {"lora_a": part.read("lora_a", down[kept]), "lora_b": b[kept] * factor}
                if "lora_m" in tensors:
                    found["lora_m"] = part.read("lora_m", tensors["lora_m"])
                for leaf, value in found.items():
                    ours.setdefault(f"{part.path}/{leaf}", []).append(value)
    rank = max(len(b) for name, layers in ours.items() if name.endswith("lora_b") for b in layers)
    return {
        name: np.stack([_filled(value, rank, name) for value in layers])
        for name, layers in ours.items()
    }, rank


def _filled(value: np.ndarray, rank: int, name: str) -> np.ndarray:
    """Fill the axis of the rank up with zeros."""
    if name.endswith("lora_m"):
        return value
    widths = [(0, 0)] * value.ndim
    axis = value.ndim - 1 if name.endswith("lora_a") else 0
    widths[axis] = (0, rank - value.shape[axis])
    return np.pad(value, widths)
