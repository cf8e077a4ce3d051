# SPDX-License-Identifier: Apache-2.0
"""How a family's tensors correspond to ours: one invertible map for import, export and the round
trip.

A ``TensorMap`` says where one of our parameters (one layer of it) stands in the checkpoint, and how
the two are laid out:

    TensorMap("model.layers.{layer}.self_attn.q_proj.weight", "layers/attention/query/kernel", "(H
    h) D -> D H h")

Letters are the dimensions of core/schema.py with their sizes from the configuration.  A part of a
fused tensor is named by a digit, ``(3:0 H h)`` (entry 0 of an axis of size 3), or by a span of rows
of its first axis.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence

import numpy as np

from align_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """One of our parameters in a checkpoint.

    Attributes:
        name: tensor name, with {layer} (and {expert}) where there is one each.
        path: our path, "/"-separated; under "layers/" it has a leading axis of layers.
        axes: "theirs -> ours"; theirs may group letters: "(H h) D".
        span: (start, length) of the tensor's first axis, where it holds several parameters one
            after the other.
        layers: numbers of those that the parameter holds, where it is not all of them.
    """

    name: str
    path: str
    axes: str
    span: tuple[int, int] | None = None
    layers: range | None = None

    def numbers(self, config: ModelConfig) -> range:
        """Return the layers that the parameter holds."""
        if not self.stacked:
            return range(1)
        return range(config.num_layers) if self.layers is None else self.layers

    @property
    def stacked(self) -> bool:
        """Whether there is one tensor a layer."""
        return "{layer}" in self.name

    @property
    def by_expert(self) -> bool:
        """Whether there is one tensor an expert."""
        return "{expert}" in self.name


@dataclasses.dataclass(frozen=True)
class AxisMap:
    """A parsed ``TensorMap.axes`` with sizes.

    Attributes:
        theirs: for each axis of the tensor, its letters (outermost first).
        ours: our letters, in order.
        sizes: letter -> size; a selected axis "n:i" has size n.
    """

    theirs: tuple[tuple[str, ...], ...]
    ours: tuple[str, ...]
    sizes: Mapping[str, int]

    @property
    def our_shape(self) -> tuple[int, ...]:
        """Our shape, one layer (and expert) of it."""
        return tuple(self.sizes[letter] for letter in self.ours)

    @property
    def their_shape(self) -> tuple[int, ...]:
        """The shape of the tensor (of the span, where there is one)."""
        return tuple(math.prod(self.sizes[letter] for letter in group) for group in self.theirs)

    @property
    def _kept(self) -> list[str]:
        """Their letters, in order, without selected ones."""
        return [letter for group in self.theirs for letter in group if ":" not in letter]

    def _grid(self, tensor: np.ndarray) -> np.ndarray:
        """View a tensor with an axis a letter; a group's outermost takes what is left of its
        axis."""
        shape: list[int] = []
        for group, size in zip(self.theirs, tensor.shape):
            inner = [self.sizes[letter] for letter in group[1:]]
            shape += [size // math.prod(inner), *inner]
        return tensor.reshape(shape)

    def bounds(self, index: Sequence[slice]) -> tuple[slice, ...]:
        """Return which part of the tensor holds this part of ours (more than that where inner
        letters are sliced)."""
        wanted = dict(zip(self.ours, index))
        out = []
        for group in self.theirs:
            inner = math.prod(self.sizes[letter] for letter in group[1:])
            start, stop, _ = wanted.get(group[0], slice(None)).indices(self.sizes[group[0]])
            if ":" in group[0]:
                start = _selected(group[0])
                stop = start + 1
            out.append(slice(start * inner, stop * inner))
        return tuple(out)

    def to_ours(self, tensor: np.ndarray, index: Sequence[slice]) -> np.ndarray:
        """Turn the part of the tensor that ``bounds(index)`` names into this part of ours."""
        wanted = dict(zip(self.ours, index))
        picks: list[int | slice] = []
        for group in self.theirs:
            for letter in group:
                # bounds has already cut the outermost letter of a group to what is wanted
                if letter == group[0]:
                    picks.append(0 if ":" in letter else slice(None))
                else:
                    chosen = wanted.get(letter, slice(None))
                    picks.append(_selected(letter) if ":" in letter else chosen)
        kept = self._kept
        return self._grid(tensor)[tuple(picks)].transpose([kept.index(x) for x in self.ours])

    def to_theirs(self, ours: np.ndarray, tensor: np.ndarray) -> None:
        """Write one of our parameters (one layer of it, whole) into its place in a tensor."""
        letters = [letter for group in self.theirs for letter in group]
        picks = tuple(_selected(x) if ":" in x else slice(None) for x in letters)
        self._grid(tensor)[picks] = ours.transpose([self.ours.index(x) for x in self._kept])


def _selected(letter: str) -> int:
    """Return i of "n:i"."""
    return int(letter.split(":")[1])


def parse(entry: TensorMap, config: ModelConfig) -> AxisMap:
    """Read the string of axes."""
    theirs, ours = entry.axes.split("->")
    groups = [
        tuple((group or letter).split()) for group, letter in re.findall(r"\((.*?)\)|(\S+)", theirs)
    ]
    sizes = config.sizes
    resolved = {
        letter: int(letter.split(":")[0]) if letter[0].isdigit() else sizes[letter]
        for group in groups
        for letter in group
    }
    return AxisMap(tuple(groups), tuple(ours.split()), resolved)


def names(entry: TensorMap, config: ModelConfig) -> list[str]:
    """Return the names of the tensors of all layers and experts."""
    layers = entry.numbers(config)
    experts = range(config.num_experts) if entry.by_expert else (0,)
    return [entry.name.format(layer=layer, expert=expert) for layer in layers for expert in experts]


def by_kind(
    config: ModelConfig,
    common: Sequence[TensorMap],
    experts: Sequence[TensorMap],
    dense: Sequence[TensorMap],
    attention: Sequence[TensorMap] = (),
    delta: Sequence[TensorMap] = (),
) -> list[TensorMap]:
    """Return the tensors of all layers, stack by stack.

    Args:
        config: which layers are of which kind.
        common: of each layer, below "layers/".
        experts, dense: beside these of a layer with experts, of a dense one.
        attention, delta: and of one that attends, of one that keeps a state.
    """

    def of(words: Sequence[str]) -> Iterator[TensorMap]:
        yield from common
        yield from delta if "delta" in words else attention
        yield from dense if "dense" in words else experts

    return by_layer(config, of)


def by_layer(
    config: ModelConfig, of: Callable[[Sequence[str]], Iterable[TensorMap]]
) -> list[TensorMap]:
    """Return the tensors of all layers, stack by stack.

    Args:
        config: which layers are of which kind.
        of: from a kind's words (``ModelConfig.kinds``) to its tensors, below "layers/".
    """
    out = []
    for stack in config.stacks:
        for place, kind in enumerate(stack.kinds):
            path, layers = stack.path(place), stack.layers(place)
            for entry in of(kind.split()):
                own = path + entry.path.removeprefix("layers")
                out.append(dataclasses.replace(entry, path=own, layers=layers))
    return out


def fused(entries: Sequence[TensorMap], present: Container[str]) -> list[TensorMap]:
    """Name experts as a checkpoint does that holds all of a layer's in one tensor, as modules of
    transformers 5 do; what it holds one by one stays."""
    out = []
    for entry in entries:
        name = entry.name
        for older, newer in _NEWER.items():
            name = name.replace(older, newer)
        whole, by_expert, _ = name.partition(".experts.{expert}.")
        part = entry.path.rsplit("/", 1)[-1]
        if by_expert:
            name = f"{whole}.experts.{'down' if part == 'down' else 'gate_up'}_proj"
        if name != entry.name and name.format(layer=_first(entry)) in present:
            axes = _FUSED[part] if by_expert else entry.axes
            entry = dataclasses.replace(entry, name=name, axes=axes)
        out.append(entry)
    return out


# a part of a checkpoint's name -> what modules of transformers 5 have there
_NEWER = {".block_sparse_moe.": ".mlp.", ".mlp.moe_statics.": ".mlp.gate.moe_statics."}
_FUSED = {"gate": "E (2:0 F) D -> E D F", "up": "E (2:1 F) D -> E D F", "down": "E D F -> E F D"}


def _first(entry: TensorMap) -> int:
    return 0 if entry.layers is None else entry.layers[0]


def norm(name: str, path: str, kind: str, letters: str = "D") -> list[TensorMap]:
    """Return a norm's scale, and its bias if it is a layer norm."""
    out = [TensorMap(f"{name}.weight", f"{path}/scale", f"{letters} -> {letters}")]
    return out + (
        [TensorMap(f"{name}.bias", f"{path}/bias", f"{letters} -> {letters}")]
        if kind == "layer"
        else []
    )


def linear(
    name: str, path: str, axes: str, bias: str = "", *, span: tuple[int, int] | None = None
) -> list[TensorMap]:
    """Return a linear map's kernel, and its bias if that has axes."""
    out = [TensorMap(f"{name}.weight", f"{path}/kernel", axes, span)]
    return out + ([TensorMap(f"{name}.bias", f"{path}/bias", bias, span)] if bias else [])
