# SPDX-License-Identifier: Apache-2.0
"""Which modules of transformers hold which of our linear maps, and how an adapter's tensors on them
are laid out.

    model.layers.{layer}.self_attn.q_proj  ─►  layers/attention/query
    transformer.h.{layer}.attn.c_attn      ─►  layers/attention/{query, key, value}
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from align_jax.core.tree import flatten
from align_jax.interop import hf
from align_jax.models import find_family
from align_jax.models.config import ModelConfig
from align_jax.models.lora import LEAVES
from align_jax.models.model import build
from align_jax.models.roles import role_of
from align_jax.models.tensor_map import AxisMap, TensorMap, parse

EMBED, OUTPUT = "embed", "output"


@dataclasses.dataclass(frozen=True, eq=False)
class LinearMap:
    """One of our linear maps in a module.

    Attributes:
        path: "layers/attention/query".
        target: what ``LoraConfig.targets`` are matched with: "attention/query".
        axes: of the kernel.
        inputs: how many axes are contracted.
        start: first row of the module's outputs that belongs to the map.
    """

    path: str
    target: str
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

    def shape(self, leaf: str, rank: int) -> tuple[int, ...]:
        """Return the shape of a layer of our leaf."""
        return self._layout(leaf, rank).our_shape

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


@dataclasses.dataclass(frozen=True, eq=False)
class Module:
    """A module of transformers, one a layer, and what we have for it.

    Attributes:
        name: transformers' name, with {layer}.
        layers: the layers' numbers, in the order of our stack of them.
        parts: our linear maps in it.
    """

    name: str
    layers: range
    parts: tuple[LinearMap, ...]

    @property
    def rows(self) -> int:
        """How many outputs it has."""
        return max(part.rows.stop for part in self.parts)

    @property
    def inside(self) -> bool:
        """Whether it stands in the layers."""
        return "{layer}" in self.name

    @property
    def linear(self) -> bool:
        """Whether "all-linear" means it: neither embedding nor head."""
        return not {EMBED, OUTPUT} & {part.target for part in self.parts}

    @property
    def ends(self) -> dict[str, str]:
        """Our leaf -> the end of the tensor's name."""
        if any(part.path == EMBED for part in self.parts):
            return dict(zip(LEAVES, (".lora_embedding_A", ".lora_embedding_B")))
        return dict(zip(LEAVES, (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")))


@dataclasses.dataclass(frozen=True, eq=False)
class Whole:
    """A parameter of ours as the tensors of transformers' modules hold it, not an adapter of it.

    Attributes:
        name: the tensor's, with {layer}.
        entry: where it stands in them.
        axes: and how it is laid out there.
        layers: the layers' numbers, in the order of our stack of them.
    """

    name: str
    entry: TensorMap
    axes: AxisMap
    layers: range

    @property
    def module(self) -> str:
        """The module that has it."""
        return self.name.rpartition(".")[0]

    @property
    def names(self) -> list[str]:
        """The tensors' names, layer by layer."""
        return [self.name.format(layer=layer) for layer in self.layers]

    def _rows(self, tensor: np.ndarray) -> np.ndarray:
        span = self.entry.span
        return tensor[span[0] : sum(span)] if span else tensor

    def fault(self, tensor: np.ndarray, shape: tuple[int, ...]) -> str:
        """Say what is wrong with a tensor's shape."""
        return "" if tensor.shape == shape else f"expected {shape}, got {tensor.shape}"

    def read(self, tensors: Sequence[np.ndarray]) -> np.ndarray:
        """Take it out of the layers' tensors."""
        index = [slice(None)] * len(self.axes.ours)
        bounds = self.axes.bounds(index)
        found = [self.axes.to_ours(self._rows(tensor)[bounds], index) for tensor in tensors]
        return np.stack(found) if self.entry.stacked else found[0]

    def write(self, ours: np.ndarray, place: int, tensor: np.ndarray) -> None:
        """Put a layer of it into its tensor."""
        one = ours[place] if self.entry.stacked else ours
        real = tuple(slice(size) for size in self.axes.our_shape)  # without rows of padding
        self.axes.to_theirs(one[real], self._rows(tensor))


def _unpadded(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, vocab_rows=config.vocab_size)


def adaptable(config: ModelConfig) -> list[Module]:
    """Return a family's modules that can be adapted."""
    config = _unpadded(config)
    roles = flatten(build(config).roles())
    found: dict[tuple[str, range], list[LinearMap]] = {}
    for entry in find_family(config.family).tensor_maps(config):
        role = role_of(roles, entry.path)
        if role.adaptable:
            name = hf.as_module(entry.name, config.family).removesuffix(".weight")
            start = entry.span[0] if entry.span else 0
            path = EMBED if role.target == EMBED else entry.path.removesuffix("/kernel")
            part = LinearMap(path, role.target, parse(entry, config), role.inputs or 1, start)
            found.setdefault((name, entry.numbers(config)), []).append(part)
    return [Module(name, layers, tuple(parts)) for (name, layers), parts in found.items()]


def parameters(config: ModelConfig) -> dict[str, Whole]:
    """Return a family's parameters by our paths, but for experts."""
    config = _unpadded(config)
    return {
        entry.path: Whole(
            hf.as_module(entry.name, config.family),
            entry,
            parse(entry, config),
            entry.numbers(config),
        )
        for entry in find_family(config.family).tensor_maps(config)
        if not entry.by_expert
    }


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors of transformers' modules."""
    config = _unpadded(config)
    entries = find_family(config.family).tensor_maps(config)
    spelled = [
        dataclasses.replace(entry, name=hf.as_module(entry.name, config.family))
        for entry in entries
    ]
    return hf.tensor_shapes(spelled, config)


def bare(name: str, family: str) -> str:
    """Return a module's or tensor's name without the prefixes that depend on which class of
    transformers, and of which version, it stands in."""
    row = find_family(family)
    prefixes = [one for one in (row.base, row.modules, "model.", "language_model.") if one]
    while prefix := next((one for one in prefixes if name.startswith(one)), ""):
        name = name.removeprefix(prefix)
    return name


def suffix(name: str, modules: Sequence[str], dot: str = ".") -> str:
    """Return the shortest end of a module's name that no other module's name has.

    Args:
        name: the module's.
        modules: all modules' names.
        dot: what stands before the end in a name that has it: "" where PEFT compares text alone.
    """
    parts = name.split(".")
    for count in range(1, len(parts)):
        end = ".".join(parts[-count:])
        if not any(other.endswith(dot + end) for other in modules if other != name):
            return end
    return name
