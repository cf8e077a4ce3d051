# SPDX-License-Identifier: Apache-2.0
"""From groups of tokens to a batch: its static sizes, and its arrays, or their shapes alone.

    plain          [prompt response 0 . . . ]     a response a row; a group is R consecutive rows
                   [prompt response 1 . . . ]
    packed         [prompt response 0 | prompt response 1 | next group ...]
    shared_prefix  [prompt | response 0 | response 1 | next group ...]     each response sees the
                                                                           prompt, not the other

What is written at once is a *bin*: the groups of a packed row, or the one group of R plain rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from align_jax.core.choose import choose
from align_jax.core.options import Config, DataOptions
from align_jax.core.schema import Batch
from align_jax.data.packing import group_slots


class Layout(NamedTuple):
    """How groups lie in rows."""

    packed: bool  # whole groups in a row, as many as fit; else one response
    shared: bool  # a group's prompt stands in its row once

    def tokens(
        self, prompt: Int[np.ndarray, "G"], responses: Int[np.ndarray, "G R"]
    ) -> Int[np.ndarray, "G"]:
        """Return how many tokens each group has in all its rows together, by its parts' lengths."""
        return prompt * (1 if self.shared else responses.shape[1]) + responses.sum(1)

    def row_length(
        self, prompt: Int[np.ndarray, "G"], responses: Int[np.ndarray, "G R"]
    ) -> Int[np.ndarray, "G"]:
        """Return how long rows must be to hold each group."""
        return self.tokens(prompt, responses) if self.packed else prompt + responses.max(1)


LAYOUTS: Mapping[str, Layout] = {
    "plain": Layout(packed=False, shared=False),
    "packed": Layout(packed=True, shared=False),
    "shared_prefix": Layout(packed=True, shared=True),
}


class TokenizedGroup(NamedTuple):
    """A prompt with its responses, as token ids; of each response the loss mask too."""

    prompt: Int[np.ndarray, "_"]
    responses: tuple[tuple[Int[np.ndarray, "_"], Bool[np.ndarray, "_"]], ...]


# ------------------------------------------------------------------------------------ static sizes


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """The sizes that are asked of a batch, whatever its layout.

    Attributes:
        batch_size: groups in a step, the whole mesh together: exactly in plain rows, on average in
            packed ones.
        max_length: tokens of a prompt with one response; T of plain rows.
        row_length: T of packed rows; 0: R times ``max_length`` (the pipeline chooses by cost).
        row_multiple: rows come in multiples of this: the devices that they are split over, times
            the microbatches.
        attention_cost: of one query's to one key, in a token's matrix products; see
            ``data.row_length``.
    """

    batch_size: int
    max_length: int
    row_length: int = 0
    row_multiple: int = 1
    attention_cost: float = 0.0

    @classmethod
    def of(
        cls, config: Config, row_shards: int, *, once: bool = False, attention_cost: float = 0.0
    ) -> BatchSizes:
        """Return the sizes that a config asks for.

        Args:
            config: the config.
            row_shards: over how many devices rows are split.
            once: of batches to evaluate, which have no microbatches.
            attention_cost: as the attribute.
        """
        return cls(
            (once and config.eval.batch_size) or config.batch_size,
            config.max_length,
            config.row_length,
            row_shards * (1 if once else config.microbatches),
            attention_cost,
        )

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.row_multiple < 1:
            raise ValueError(
                f"batch_size and row_multiple must be at least 1, got {self.batch_size} and "
                f"{self.row_multiple}"
            )


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The static sizes of a batch's arrays; letters as in core.schema."""

    rows: int  # N
    length: int  # T
    loss_positions: int  # P
    slots: int  # S
    groups: int  # B; in packed rows room for so many, of which about half stays empty
    responses: int  # R

    @property
    def rows_per_bin(self) -> int:
        """Rows of what is written at once."""
        return max(1, self.responses // self.slots)

    @property
    def bins(self) -> int:
        """Packed: rows; plain: groups."""
        return self.rows // self.rows_per_bin

    def with_bins(self, bins: int) -> BatchShape:
        """Return the sizes of a part of the batch, or of a larger one."""
        rows = bins * self.rows_per_bin
        return dataclasses.replace(self, rows=rows, groups=rows * self.slots // self.responses)


def usual(name: str, responses: int) -> str:
    """Return the layout that "auto" most often chooses for groups of so many responses; any other
    name as it is."""
    if name != "auto":
        return name
    return "shared_prefix" if responses > 1 else "packed"


def round_up(size: int, multiple: int) -> int:
    """Return the least multiple that is at least ``size``."""
    return -(-size // multiple) * multiple


def loss_budget(tokens: int, length: int) -> int:
    """Return P where a row of ``length`` has at most so many loss tokens.

    Rounded up to a multiple of 8, or of 128 beyond 512, so that data of about the same lengths
    compile to the same step.

    >>> loss_budget(13, 1024), loss_budget(600, 1024), loss_budget(600, 620)
    (16, 640, 620)
    """
    return min(round_up(max(tokens, 1), 8 if tokens <= 512 else 128), length)


def packed_rows(batch_size: int, mean_groups: float, multiple: int) -> int:
    """Return how many rows of so many groups on average hold about ``batch_size``."""
    return max(1, round(batch_size / mean_groups / multiple)) * multiple


def batch_shape(
    options: DataOptions,
    sizes: BatchSizes,
    responses: int,
    *,
    mean_groups: float = 0.0,
    loss_positions: int = 0,
) -> BatchShape:
    """Tell a batch's static sizes from the options alone.

    Args:
        options: ``layout``, ``groups_per_row`` and ``max_prompt_length`` are read.
        sizes: what is asked for.
        responses: R.
        mean_groups: how many groups a packed row holds on average; 0: as the options say, or 1 (the
            pipeline measures it).
        loss_positions: P; 0: what a plain row's longest prompt leaves, else T (the pipeline knows
            the exact budget).

    Raises:
        ValueError: sizes that do not divide; the nearest that do are named.
    """
    batch_size, multiple = sizes.batch_size, sizes.row_multiple
    if choose(LAYOUTS, options.layout, "config.data.layout").packed:
        mean = mean_groups or options.groups_per_row or 1
        if mean < 1:
            raise ValueError(f"config.data.groups_per_row = {mean}: expected at least 1")
        rows = packed_rows(batch_size, mean, multiple)
        length, slots = sizes.row_length or responses * sizes.max_length, group_slots(mean)
        slots *= responses
    else:
        if batch_size % multiple:
            near = (batch_size // multiple * multiple, round_up(batch_size, multiple))
            raise ValueError(
                f"batch_size {batch_size} is not divisible by {multiple} (devices over rows times "
                f"microbatches); the nearest that are: {', '.join(str(n) for n in near if n)}"
            )
        rows, length, slots = batch_size * responses, sizes.max_length, 1
        loss_positions = loss_positions or length - options.max_prompt_length
    loss_positions = min(loss_positions or length, length)
    return BatchShape(rows, length, loss_positions, slots, rows * slots // responses, responses)


def one_group_shape(
    layout: str, *, groups: int, responses: int, prompt: int, response: int
) -> BatchShape:
    """Return the sizes of a batch of one group (plain: one response) a row, lengths being known.

    Args:
        layout: a key of ``LAYOUTS``.
        groups, responses: B and R.
        prompt, response: tokens of the longest.
    """
    packing = LAYOUTS[layout]
    slots = responses if packing.packed else 1
    longest = packing.row_length(np.asarray([prompt]), np.full((1, responses), response))
    length = round_up(int(longest[0]), 8)
    return BatchShape(
        groups * responses // slots, length, slots * response, slots, groups, responses
    )


def mismatched_shape(shape: BatchShape, length: int, longest: int) -> BatchShape:
    """Return the sizes of the mismatched completions' batch: as many rows, of as many slots.

    Args:
        shape: the batch's own sizes.
        length: tokens of a row.
        longest: the most loss tokens in any row.
    """
    return dataclasses.replace(
        shape, length=length, loss_positions=loss_budget(longest, length), responses=1
    )


# ------------------------------------------------------------------------------------------ arrays

# (sizes, value, dtype) -> array
Fill = Callable[[tuple[int, ...], Any, type], np.ndarray]


def _zero_strides(sizes: tuple[int, ...], value: Any, dtype: type) -> np.ndarray:
    """Return an array as ``np.full`` does, but one that takes no memory."""
    return np.broadcast_to(np.asarray(value, dtype), sizes)


def _fields(shape: BatchShape, layout: Layout, pad: int, fill: Fill) -> dict[str, Any]:
    """Make every field that rows have, as in Batch, for no group at all."""
    by_token, by_response = (shape.rows, shape.length), (shape.groups, shape.responses)
    names = ["segment_ids", "positions", "source_index", "slot"]
    names += ["prefix_ids"] if layout.shared else []
    return {
        **{name: fill(by_token, 0, np.int32) for name in names},
        "tokens": fill(by_token, pad, np.int32),
        "loss_mask": fill(by_token, False, np.bool_),
        "loss_index": fill((shape.rows, shape.loss_positions), shape.length, np.int32),
        "lengths": fill(by_response, 0, np.int32),
        "last_index": fill(by_response, 0, np.int32),
    }


def abstract_batch(
    shape: BatchShape,
    layout: str,
    kind: str,
    *,
    mismatched: BatchShape | None = None,
    token_fields: Sequence[str] = (),
) -> Batch:
    """Return a batch whose arrays take no memory (zero strides), for planning and lowering.

    Args:
        shape: the sizes.
        layout: a key of ``LAYOUTS``.
        kind: of data: decides which optional fields there are.
        mismatched: sizes of the mismatched completions' batch, where there is one.
        token_fields: fields [N, T], in float32, that something else fills in.
    """
    by_group = (shape.groups,)
    fields = _fields(shape, LAYOUTS[layout], 0, _zero_strides)
    if kind == "unpaired":
        fields["label"] = _zero_strides(by_group, False, np.bool_)
    else:
        fields["margin"] = _zero_strides(by_group, 0, np.float32)
    if kind == "stepwise":
        token_fields = [*token_fields, "step_labels"]
    for name in token_fields:
        fields[name] = _zero_strides((shape.rows, shape.length), 0, np.float32)
    if mismatched is not None:
        fields["mismatched"] = Batch(
            **_fields(mismatched, LAYOUTS["plain"], 0, _zero_strides),
            weight=_zero_strides((mismatched.groups,), 0, np.float32),
        )
    return Batch(
        **fields,
        weight=_zero_strides(by_group, 0, np.float32),
        example_index=_zero_strides(by_group, 0, np.int32),
        scores=_zero_strides((shape.groups, shape.responses), 0, np.float32),
    )


def make_batch(
    bins: Sequence[Sequence[TokenizedGroup]],
    shape: BatchShape,
    layout: str,
    *,
    pad: int,
    weight: Float[np.ndarray, "B"],
    mismatched: Batch | None = None,
    **fields: Any,
) -> Batch:
    """Write groups into rows.

    Args:
        bins: the groups of each packed row, or the one group, or none, of each R plain rows.
        shape: the sizes of rows; there are as many as the bins take.
        layout: a key of ``LAYOUTS``.
        pad: id that fills rows.
        weight: of each group; 0 where a bin has room for more.
        mismatched: the mismatched completions' batch.
        **fields: what else the batch holds of its groups: [B] or [B, R].
    """
    rows = _Rows(shape.with_bins(len(bins)), LAYOUTS[layout], pad)
    for number, groups in enumerate(bins):
        rows.write(number, groups)
    return Batch(**rows.fields, weight=weight, mismatched=mismatched, **fields)


class _Rows:
    """Rows that are being written; ``fields`` are the batch's arrays."""

    def __init__(self, shape: BatchShape, layout: Layout, pad: int) -> None:
        self.fields = _fields(shape, layout, pad, np.full)
        self._shape, self._layout = shape, layout
        # the same memory as [B, R]: see core.schema
        self._lengths = self.fields["lengths"].reshape(shape.rows, shape.slots)
        self._last_index = self.fields["last_index"].reshape(shape.rows, shape.slots)

    def write(self, number: int, groups: Sequence[TokenizedGroup]) -> None:
        """Write a bin."""
        if self._layout.packed:
            self._write_row(number, groups)
            return
        for group in groups:
            for index, response in enumerate(group.responses):
                row = number * self._shape.responses + index
                self._write_row(row, [TokenizedGroup(group.prompt, (response,))])

    def _write_row(self, row: int, groups: Sequence[TokenizedGroup]) -> None:
        """Write groups one after the other; each response takes the next slot and segment."""
        at = segment = slot = 0
        for prompt, responses in groups:
            if self._layout.shared:
                # a segment of its own, which responses name as their prefix
                segment += 1
                at = self._write_segment(row, at, prompt, segment)
                prefix, source = (segment, at - 1) if len(prompt) else (0, 0)
            for ids, mask in responses:
                begin, segment = at, segment + 1
                if self._layout.shared:
                    # the response goes on where the prompt ends: in its positions, and its first
                    # token is predicted from the prompt's last
                    at = self._write_segment(row, at, ids, segment, len(prompt))
                    self.fields["prefix_ids"][row, begin:at] = prefix
                    self.fields["source_index"][row, begin] = source
                else:
                    at = self._write_segment(row, at, np.concatenate([prompt, ids]), segment)
                self._write_loss(row, at - len(mask), mask, slot)
                slot += 1
        learned = np.flatnonzero(self.fields["loss_mask"][row])
        self.fields["loss_index"][row, : len(learned)] = learned

    def _write_segment(
        self, row: int, begin: int, ids: np.ndarray, segment: int, position: int = 0
    ) -> int:
        """Write tokens that attend to each other; return where the next segment begins."""
        end = begin + len(ids)
        self.fields["tokens"][row, begin:end] = ids
        self.fields["segment_ids"][row, begin:end] = segment
        self.fields["positions"][row, begin:end] = np.arange(position, position + len(ids))
        # each but the first is predicted from the one before it
        self.fields["source_index"][row, begin + 1 : end] = np.arange(begin, end - 1)
        return end

    def _write_loss(self, row: int, begin: int, mask: np.ndarray, slot: int) -> None:
        end = begin + len(mask)
        learned = np.flatnonzero(mask)
        self.fields["loss_mask"][row, begin:end] = mask
        self.fields["slot"][row, begin:end] = np.where(mask, slot, 0)
        self._lengths[row, slot] = len(learned)
        self._last_index[row, slot] = begin + learned[-1] if len(learned) else max(end - 1, 0)


def mismatch(keys: Sequence[Hashable]) -> list[int]:
    """Return, for each group, one with another prompt, whose response its prompt gets.

    The mismatched completion of KTO's estimate of the KL term.  Groups are laid prompt by prompt,
    and each takes the one that stands as far on as the commonest prompt has groups: every response
    is used once, so desirable and undesirable ones are met as often as the data holds them.  Where
    a prompt has more than half of the groups, the others' responses are used several times.

    Args:
        keys: equal for groups of the same prompt; their order decides who meets whom.

    Raises:
        ValueError: all keys are equal.

    >>> mismatch([7, 7, 8, 8]), mismatch([7, 7, 7, 8])
    ([2, 3, 0, 1], [3, 3, 3, 2])
    """
    of_prompt: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        of_prompt.setdefault(key, []).append(index)
    if len(of_prompt) < 2:
        raise ValueError(
            f"mismatched completions need two different prompts; these {len(keys)} groups have "
            "one: use data with more prompts (online: a larger rollout.prompts)"
        )
    order = [index for members in of_prompt.values() for index in members]
    commonest = max(of_prompt, key=lambda key: len(of_prompt[key]))
    others = [index for index in order if keys[index] != keys[of_prompt[commonest][0]]]
    step = len(of_prompt[commonest])
    partners = [0] * len(keys)
    for rank, index in enumerate(order):
        partner = order[(rank + step) % len(order)]
        if keys[partner] == keys[index]:
            partner = others[rank % len(others)]
        partners[index] = partner
    return partners
