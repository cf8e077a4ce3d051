# SPDX-License-Identifier: Apache-2.0
"""What an adapter's file holds beside A and B: parameters of the base, and rows of its ends.

modules_to_save            trained, in place of the base's           LoraConfig.whole
bias                       trained, in place of the base's           LoraConfig.whole
trainable_token_indices    rows, trained, in place of the base's     LoraConfig.tokens
save_embedding_layers      not trained, the base's own ends          LoraConfig.replaced
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from align_jax.interop import peft_settings
from align_jax.interop.peft_modules import Whole, bare, parameters, suffix, tensor_shapes
from align_jax.interop.peft_settings import MERGE, Settings
from align_jax.interop.peft_tensors import Tensors
from align_jax.models.config import ModelConfig
from align_jax.models.lora import LoraConfig

TOKENS, HEAD = "embed/tokens", "output/kernel"
TOKEN_ROWS, HEAD_ROWS = "embed/rows", "output/rows"
WRAP = ".token_adapter"
ROWS = f"{WRAP}.trainable_tokens_delta"


class Ends(NamedTuple):
    """The modules before and behind the layers, which tied models have one matrix for."""

    embed: str
    head: str


def ends(config: ModelConfig) -> Ends:
    """Return transformers' names of the embedding and of the head."""
    known = parameters(config.untied())
    return Ends(known[TOKENS].module, known[HEAD].module)


def unties(tensors: Tensors, config: ModelConfig, settings: Settings) -> bool:
    """Tell whether an adapter treats the embedding and the head of a tied model apart."""
    if not config.tied or settings.get("ensure_weight_tying"):
        return False
    both = [tensors.module(name) for name in ends(config)]
    targeted = settings.get("target_modules") is not None
    apart = any(
        peft_settings.saves(settings, name)
        or targeted
        and peft_settings.adapts(settings, name, linear=False)
        for name in both
    )
    of_embed, of_head = (peft_settings.rows(settings, name, name == both[0]) for name in both)
    return apart or bool(of_head) and of_head != of_embed


# ------------------------------------------------------------------------------------------- import


@dataclasses.dataclass
class Found:
    """What was read, and what is wrong with it.

    Attributes:
        leaves: by our paths.
        whole, replaced, tokens, head_tokens: as ``LoraConfig`` has them.
        taken: names of the tensors that were looked for.
        missing, misshaped: of the tensors that the settings name.
    """

    leaves: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    whole: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    head_tokens: tuple[int, ...] = ()
    taken: set[str] = dataclasses.field(default_factory=set)
    missing: list[str] = dataclasses.field(default_factory=list)
    misshaped: list[str] = dataclasses.field(default_factory=list)

    def take(
        self, tensors: Tensors, names: Iterable[str], shapes: Iterable[tuple[int, ...]]
    ) -> list[np.ndarray] | None:
        """Return the tensors of these names, None where one is wrong."""
        out = []
        for name, shape in zip(names, shapes):
            self.taken.add(name)
            if name not in tensors.found:
                self.missing.append(name)
            elif (got := tensors.found[name].shape) != shape:
                self.misshaped.append(f"{name}: expected {shape}, got {got}")
            else:
                out.append(tensors.found[name])
                continue
            return None
        return out


def read(tensors: Tensors, config: ModelConfig, settings: Settings, untied: bool) -> Found:
    """Read what an adapter's file holds beside A and B.

    Args:
        tensors: from the file.
        config: what the base is, untied where the adapter unties it.
        settings: the adapter's.
        untied: whether the adapter unties the base.

    Raises:
        ValueError: a module that is saved in some layers only; rows of tokens that are none; a head
            that is another than the embedding that it is tied to.
    """
    found, known, shapes = Found(), parameters(config), tensor_shapes(config)
    saved = _in_all(known, tensors, lambda name: peft_settings.saves(settings, name))
    biases = _biases(known, tensors, settings, saved)
    replaced = [
        path
        for path in (TOKENS, HEAD)
        if path in known
        and path not in saved
        and bare(known[path].name, config.family) in tensors.found
    ]
    for path in (*saved, *biases, *replaced):
        one = known[path]
        names = [bare(name, config.family) for name in one.names]
        own = found.take(tensors, names, [shapes[name] for name in one.names])
        if own is not None:
            found.leaves[path] = one.read(own)
    if untied and len(replaced) == 1:  # of the base, where both are one
        (path,), (other,) = replaced, {TOKENS, HEAD} - {*replaced}
        if other not in saved and path in found.leaves:
            found.leaves[other] = found.leaves[path].T
            replaced.append(other)
    found.whole, found.replaced = (*saved, *biases), tuple(replaced)
    _read_rows(found, tensors, config, settings)
    if config.tied:
        _check_tied(found, tensors, config)
    return found


def _in_all(
    known: Mapping[str, Whole], tensors: Tensors, chosen: Callable[[str], bool]
) -> list[str]:
    """Return the paths whose modules are chosen, in every layer."""
    out, partly = [], []
    for path, one in known.items():
        name = tensors.module(one.module)
        hits = [chosen(name.format(layer=layer)) for layer in one.layers]
        if all(hits):
            out.append(path)
        elif any(hits):
            partly.append(one.name)
    if partly:
        raise ValueError(
            f"the adapter trains {', '.join(partly)} whole in some layers only, which is not "
            f"supported; {MERGE}"
        )
    return out


def _biases(
    known: Mapping[str, Whole], tensors: Tensors, settings: Settings, saved: list[str]
) -> list[str]:
    """Return the biases that are trained beside what is saved whole."""
    kind = settings.get("bias") or "none"
    biases = {
        path: one for path, one in known.items() if one.name.endswith(".bias") and path not in saved
    }
    if kind == "none" or not biases:
        return []
    if kind == "all":
        return list(biases)
    names = {bare(name, tensors.family) for one in biases.values() for name in one.names}
    if names.isdisjoint(tensors.found):  # PEFT before 0.20 did not save them, nor finds them then
        return []
    return _in_all(biases, tensors, lambda name: peft_settings.adapts(settings, name))


def _read_rows(found: Found, tensors: Tensors, config: ModelConfig, settings: Settings) -> None:
    names = [tensors.module(name) for name in ends(config)]
    tokens, head_tokens = (peft_settings.rows(settings, x, x == names[0]) for x in names)
    if config.tied:
        tokens, head_tokens = tokens or head_tokens, ()
    if beyond := [one for one in (*tokens, *head_tokens) if one >= config.vocab_size]:
        raise ValueError(
            f"trainable_token_indices: {beyond[0]} is no token of a vocabulary of "
            f"{config.vocab_size}: give the tokenizer that the adapter was made with "
            "(config.tokenizer), to which the vocabulary grows"
        )
    for path, name, ids in zip((TOKEN_ROWS, HEAD_ROWS), names, (tokens, head_tokens)):
        if ids:
            shape = (len(ids), config.hidden_size)
            own = found.take(tensors, [bare(name, config.family) + ROWS], [shape])
            if own is not None:
                found.leaves[path] = own[0]
    found.tokens, found.head_tokens = tokens, head_tokens


def _check_tied(found: Found, tensors: Tensors, config: ModelConfig) -> None:
    """Let go of what a tied head repeats of the embedding."""
    embed, head = (bare(name, config.family) for name in ends(config))
    for end, other in (
        (".weight", ".weight"),
        (".lora_A.weight", ".lora_embedding_B"),
        (".lora_B.weight", ".lora_embedding_A"),
    ):
        one, same = tensors.found.get(head + end), tensors.found.get(embed + other)
        if one is None:
            continue
        found.taken.add(head + end)
        if same is None or not np.array_equal(one, same if end == other else same.T):
            raise ValueError(
                f"the adapter's {head}{end} is another than its {embed}{other}, to which the base "
                f"ties it; {MERGE}"
            )


# ------------------------------------------------------------------------------------------- export


def write(
    config: ModelConfig, lora: LoraConfig, flat: Mapping[str, np.ndarray], adapted: set[str]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Write what stands beside A and B.

    Args:
        config: what the base is.
        lora: the adapter's configuration.
        flat: the leaves by path.
        adapted: names of the modules that have A and B.

    Returns:
        Tensors by their names, and settings.

    Raises:
        ValueError: a bias alone that is neither one of all nor one of all that are adapted.
    """
    known = parameters(config)
    embed, head = ends(config)
    rows = {embed: (TOKEN_ROWS, lora.tokens), head: (HEAD_ROWS, lora.head_tokens)}
    rows = {name: pair for name, pair in rows.items() if pair[1]}
    wrapped = dict.fromkeys(adapted, ".base_layer") | dict.fromkeys(rows, f"{WRAP}.base_layer")
    tensors = _tensors(config, known, [*lora.whole, *lora.replaced], flat, wrapped)
    modules = {known[path].module for path in lora.whole}
    alone = {  # biases of modules that are not saved
        module
        for module in modules
        if any(one.module == module and path not in lora.whole for path, one in known.items())
    }
    everything = sorted({one.module for one in known.values()})
    settings: dict[str, Any] = {
        "modules_to_save": [suffix(name, everything, "") for name in sorted(modules - alone)],
        "bias": _bias(known, lora, alone, adapted),
    }
    if config.tied and (TOKENS in lora.whole or embed in adapted):
        settings["ensure_weight_tying"] = True
        # the head has its own name for what it shares, which PEFT looks for
        shared = {name: x for name, x in tensors.items() if name.startswith(f"{embed}.")}
        tensors |= {head + name.removeprefix(embed): x for name, x in shared.items()}
        if embed in adapted:
            tensors[f"{head}.lora_A.weight"] = flat["embed/lora_b"]
            tensors[f"{head}.lora_B.weight"] = flat["embed/lora_a"][: config.vocab_size]
    tensors |= {name + ROWS: flat[path] for name, (path, _) in rows.items()}
    if rows:
        ids = {name.rpartition(".")[2]: list(of) for name, (_, of) in rows.items()}
        settings["trainable_token_indices"] = list(lora.tokens) if head not in rows else ids
    return tensors, settings


def _tensors(
    config: ModelConfig,
    known: Mapping[str, Whole],
    paths: Iterable[str],
    flat: Mapping[str, np.ndarray],
    wrapped: Mapping[str, str],
) -> dict[str, np.ndarray]:
    shapes, tensors = tensor_shapes(config), {}
    for path in paths:
        one = known[path]
        for place, name in enumerate(one.names):
            module, _, end = name.rpartition(".")
            spelled = f"{module}{wrapped.get(module, '')}.{end}"
            if spelled not in tensors:
                tensors[spelled] = np.zeros(shapes[name], np.float32)
            one.write(flat[path], place, tensors[spelled])
    return tensors


def _bias(
    known: Mapping[str, Whole], lora: LoraConfig, modules: set[str], adapted: set[str]
) -> str:
    if not modules:
        return "none"
    layers: dict[str, set[str]] = {}  # of the modules that have a bias, their full names
    for one in known.values():
        if one.name.endswith(".bias"):
            full = {one.module.format(layer=layer) for layer in one.layers}
            layers.setdefault(one.module, set()).update(full)
    rest = layers.keys() - {known[path].module for path in lora.whole}
    if not rest:
        return "all"
    if all(layers[name] <= adapted for name in modules) and not any(
        layers[name] & adapted for name in rest
    ):
        return "lora_only"
    raise ValueError(
        f"PEFT trains all biases or those of adapted modules: {', '.join(sorted(modules))} alone "
        "cannot be written; export without --adapter"
    )
