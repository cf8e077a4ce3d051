# SPDX-License-Identifier: Apache-2.0
"""Adapters both ways between PEFT's files and our parameters, through each family's own tensor map.

    adapter_config.json, adapter_model.safetensors  <->  LoraConfig, {"layers": {"attention":
    {"query": {"lora_a"...}}}}

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

from align_jax.core.tree import flatten, unflatten
from align_jax.interop import hf
from align_jax.interop.tensor_files import SINGLE
from align_jax.models import FAMILIES
from align_jax.models.config import ModelConfig
from align_jax.models.lora import LoraConfig
from align_jax.models.tensor_map import AxisMap, parse

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SCORE = "score/out/kernel"

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
    (
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "fan_in_fan_out",
        "layers_pattern",
        "task_type",
        "inference_mode",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "peft_version",
        "runtime_config",
        "megatron_core",
        "qalora_group_size",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "ensure_weight_tying",
    )
)


@dataclasses.dataclass(frozen=True)
class Site:
    """One of our linear maps in a module.

    Attributes:
        path: "layers/attention/query".
        axes: of the kernel.
        count: how many axes are contracted.
        start: first row of the module's outputs that belongs to the axes.
    """

    path: str
    axes: AxisMap
    count: int
    start: int

    @property
    def _sides(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        inputs = set(self.axes.ours[: self.count])
        first, second = self.axes.theirs
        return (first, second) if set(first) == inputs else (second, first)

    def side(self, which: str, rank: int) -> AxisMap:
        """Return how lora_A [r, in], lora_B [out, r] or the magnitudes [out] are laid out."""
        (inputs, outputs), sizes = self._sides, {**self.axes.sizes, "r": rank}
        ours_in, ours_out = self.axes.ours[: self.count], self.axes.ours[self.count :]
        return {
            "lora_a": AxisMap((("r",), inputs), (*ours_in, "r"), sizes),
            "lora_b": AxisMap((outputs, ("r",)), ("r", *ours_out), sizes),
            "lora_m": AxisMap((outputs,), ours_out, sizes),
        }[which]

    @property
    def transposed(self) -> bool:
        """Whether the module's weight is [in, out] (GPT-2's Conv1D)."""
        return self.axes.theirs[0] == self._sides[0]

    @property
    def width(self) -> int:
        """Rows of the module's outputs that the axes covers."""
        return math.prod(self.axes.sizes[letter] for letter in self._sides[1])

    def read(self, which: str, tensor: np.ndarray) -> np.ndarray:
        """Take this map's part of a layer's tensor."""
        rank = tensor.shape[0] if which == "lora_a" else tensor.shape[-1]
        axes = self.side(which, rank)
        whole = [slice(None)] * len(axes.ours)
        rows = tensor if which == "lora_a" else tensor[self.start : self.start + self.width]
        return axes.to_ours(rows[axes.bounds(whole)], whole)

    def write(self, which: str, ours: np.ndarray, rank: int) -> np.ndarray:
        """Return a layer's tensor as the file holds it (of this map's rows), zero where other maps'
        numbers go."""
        axes = self.side(which, rank)
        out = np.zeros(axes.their_shape, np.float32)
        axes.to_theirs(np.asarray(ours, np.float32), out)
        return out


def sites(config: ModelConfig) -> dict[str, list[Site]]:
    """Return a family's modules that can be adapted: name with {layer} -> our linear maps in it."""
    out: dict[str, list[Site]] = {}
    for entry in FAMILIES[config.family].tensor_maps(config):
        if re.fullmatch(r"layers/(attention|mlp)/\w+/kernel", entry.path):
            path = entry.path.removesuffix("/kernel")
            site = Site(
                path,
                parse(entry, config),
                2 if path.endswith("/output") else 1,
                entry.span[0] if entry.span else 0,
            )
            out.setdefault(entry.name.removesuffix(".weight"), []).append(site)
    return out


def _suffix(name: str, modules: Sequence[str]) -> str:
    """Return the shortest end of a module's name that no other module's name has."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        end = "." + ".".join(parts[-count:])
        if not any(other.endswith(end) for other in modules if other != name):
            return end[1:]
    return name


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
    flat = {
        name: leaf
        for name, leaf in flatten(adapter_params).items()
        if not re.match(r"value(_mlp)?/", name)
    }
    modules = sites(config)
    known = {
        f"{site.path}/{leaf}"
        for parts in modules.values()
        for site in parts
        for leaf in ("lora_a", "lora_b", "lora_m")
    } | {SCORE}
    if unknown := sorted(flat.keys() - known):
        raise ValueError(
            f"not parameters of a PEFT adapter of {config.family}: "
            f"{', '.join(unknown)}"
            + (
                "; adapters on experts can only be merged"
                if any("/moe/" in x for x in unknown)
                else ""
            )
        )
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    targets = []
    everything = [
        entry.name.removesuffix(".weight") for entry in FAMILIES[config.family].tensor_maps(config)
    ]
    for name, parts in modules.items():
        adapted = [site for site in parts if f"{site.path}/lora_a" in flat]
        if not adapted:
            continue
        if lora.dora and len(adapted) < len(parts):
            raise ValueError(
                f"DoRA on {', '.join(site.path for site in adapted)} alone cannot "
                "be written: PEFT's "
                f"{name} holds {', '.join(site.path for site in parts)}; adapt all "
                "of them"
            )
        targets.append(_suffix(name, everything))
        if len(adapted) > 1:
            ranks[targets[-1]] = lora.rank * len(adapted)
        _write(tensors, name, parts, adapted, flat, config.num_layers, lora)
    if SCORE in flat:
        tensors[f"{PREFIX}score.weight"] = np.ascontiguousarray(
            np.asarray(flat[SCORE], np.float32).T
        )
    folder = epath.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TENSORS).write_bytes(safetensors.numpy.save(tensors, {"format": "pt"}))
    transposed = any(site.transposed for parts in modules.values() for site in parts)
    settings = _settings(lora, targets, ranks, transposed, SCORE in flat, base_name)
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _write(
    tensors: dict[str, np.ndarray],
    name: str,
    parts: Sequence[Site],
    adapted: Sequence[Site],
    flat: Mapping[str, Any],
    layers: int,
    lora: LoraConfig,
) -> None:
    rows, rank = max(site.start + site.width for site in parts), lora.rank
    leaves = {
        f"{site.path}/{leaf}": np.asarray(flat[f"{site.path}/{leaf}"], np.float32)
        for site in adapted
        for leaf in ("lora_a", "lora_b", "lora_m")[: 3 if lora.dora else 2]
    }
    for layer in range(layers):
        down = np.concatenate(
            [site.write("lora_a", leaves[f"{site.path}/lora_a"][layer], rank) for site in adapted]
        )
        up = np.zeros((rows, rank * len(adapted)), np.float32)
        magnitude = np.zeros((rows,), np.float32)
        for i, site in enumerate(adapted):
            span = slice(site.start, site.start + site.width)
            up[span, i * rank : (i + 1) * rank] = site.write(
                "lora_b", leaves[f"{site.path}/lora_b"][layer], rank
            )
            if lora.dora:
                magnitude[span] += site.write("lora_m", leaves[f"{site.path}/lora_m"][layer], rank)
        module = PREFIX + name.format(layer=layer)
        tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        if lora.dora:
            tensors[f"{module}.lora_magnitude_vector"] = magnitude


def _settings(
    lora: LoraConfig,
    targets: Sequence[str],
    ranks: Mapping[str, int],
    transposed: bool,
    score: bool,
    base_name: str,
) -> dict[str, Any]:
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
        "target_modules": sorted(targets),
        "rank_pattern": dict(ranks),
        "bias": "none",
        "init_lora_weights": True,
        "alpha_pattern": {name: alpha(rank) for name, rank in ranks.items()},
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
    if missing := [
        name for name in (CONFIG, TENSORS) if not os.path.exists(os.path.join(folder, name))
    ]:
        hint = (
            "; it holds a whole model: that is config.model.path"
            if os.path.exists(os.path.join(folder, SINGLE))
            else ""
        )
        raise FileNotFoundError(
            f"no PEFT adapter in {path!r}: {' and '.join(missing)} not found{hint}"
        )
    with open(os.path.join(folder, CONFIG), encoding="utf-8") as file:
        settings = json.load(file)
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
    tensors = {
        name.removeprefix(PREFIX): value.astype(np.float32)
        for name, value in safetensors.numpy.load_file(os.path.join(folder, TENSORS)).items()
    }
    found = _found(tensors, config, bool(settings.get("use_dora")), path)
    flat, rank = _stack(found, settings, config)
    scale = _scale(settings, settings["r"], settings["lora_alpha"])
    stabilized = bool(settings.get("use_rslora"))
    alpha = (
        settings["lora_alpha"]
        if rank == settings["r"]
        else scale * (math.sqrt(rank) if stabilized else rank)
    )
    targets = "|".join(sorted({name.removeprefix("layers/").rsplit("/", 1)[0] for name in flat}))
    if "score.weight" in tensors:
        flat[SCORE] = tensors["score.weight"].T
    lora = LoraConfig(
        rank,
        alpha=float(alpha),
        dropout=settings.get("lora_dropout") or 0.0,
        targets=targets,
        rank_stabilized=stabilized,
        dora=bool(settings.get("use_dora")),
    )
    return lora, unflatten(flat)


Found = dict[str, list[dict[str, np.ndarray]]]  # module with {layer} -> each layer's tensors


def _found(tensors: Mapping[str, np.ndarray], config: ModelConfig, dora: bool, path: str) -> Found:
    """Sort the file's tensors by module and layer; every mistake is in one error."""
    kinds = {"lora_a": ".lora_A.weight", "lora_b": ".lora_B.weight"} | (
        {"lora_m": ".lora_magnitude_vector"} if dora else {}
    )
    left, missing, wrong, out = set(tensors) - {"score.weight"}, [], [], {}
    for module, parts in sites(config).items():
        names = [
            {which: module.format(layer=layer) + end for which, end in kinds.items()}
            for layer in range(config.num_layers)
        ]
        flat = {name for layer in names for name in layer.values()}
        if not flat & left:
            continue
        missing += sorted(flat - left)
        left -= flat
        inputs = parts[0].side("lora_a", 1).their_shape[1]
        rows = max(site.start + site.width for site in parts)
        for layer in names:
            if not set(layer.values()) <= tensors.keys():
                continue
            rank = tensors[layer["lora_a"]].shape[0]
            expected = {"lora_a": (rank, inputs), "lora_b": (rows, rank), "lora_m": (rows,)}
            wrong += [
                f"{name}: expected {expected[which]}, got {tensors[name].shape}"
                for which, name in layer.items()
                if tensors[name].shape != expected[which]
            ]
        out[module] = [
            {which: tensors.get(name) for which, name in layer.items()} for layer in names
        ]
    if left or missing or wrong or not out:
        known = ", ".join(name.split("{layer}.")[1] for name in sites(config))
        parts = [
            f"  {len(names)} {what}:\n    " + "\n    ".join(names)
            for what, names in (
                ("missing", missing),
                ("unexpected", sorted(left)),
                ("mis-shaped", wrong),
            )
            if names
        ]
        raise ValueError(
            f"the adapter {path!r} does not fit a {config.family} model, in every "
            "layer of which these "
            f"can be adapted: {known}\n" + "\n".join(parts)
        )
    return out


def _scale(settings: Mapping[str, Any], rank: int, alpha: float | int) -> float:
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _alpha(settings: Mapping[str, Any], module: str) -> float | int:
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return alpha
    return settings["lora_alpha"]


def _stack(
    found: Found, settings: Mapping[str, Any], config: ModelConfig
) -> tuple[dict[str, np.ndarray], int]:
    """Stack the layers of each linear map, at one rank and one scale."""
    ours: dict[str, list[np.ndarray]] = {}
    usual = _scale(settings, settings["r"], settings["lora_alpha"])
    for module, parts in sites(config).items():
        for layer, tensors in enumerate(found.get(module, ())):
            down, up = tensors["lora_a"], tensors["lora_b"]
            scale = _scale(settings, down.shape[0], _alpha(settings, module.format(layer=layer)))
            ups = [site.read("lora_b", up) for site in parts]
            # [parts, r]
            reaches = np.stack([np.any(b.reshape(len(b), -1) != 0, axis=1) for b in ups])
            for site, b, own in zip(parts, ups, reaches):
                kept = own | ~np.any(reaches, axis=0)  # what reaches other parts alone is left out
                ours.setdefault(f"{site.path}/lora_a", []).append(site.read("lora_a", down[kept]))
                ours.setdefault(f"{site.path}/lora_b", []).append(
                    b[kept] * np.float32(scale / usual)
                )
                if "lora_m" in tensors:
                    ours.setdefault(f"{site.path}/lora_m", []).append(
                        site.read("lora_m", tensors["lora_m"])
                    )
    rank = max(len(b) for name, layers in ours.items() if name.endswith("lora_b") for b in layers)
    return {
        name: np.stack([_filled(value, rank, name) for value in layers])
        for name, layers in ours.items()
    }, rank


def _filled(value: np.ndarray, rank: int, name: str) -> np.ndarray:
    """Fill the axis of the rank up with zeros."""
    if name.endswith("lora_m"):
        return value
    axis = value.ndim - 1 if name.endswith("lora_a") else 0
    return np.pad(
        value, [(0, rank - value.shape[axis]) if i == axis else (0, 0) for i in range(value.ndim)]
    )
