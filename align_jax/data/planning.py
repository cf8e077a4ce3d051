# SPDX-License-Identifier: Apache-2.0
"""Before the first batch: what truncation leaves, which groups share a row, and every static size."""
from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from align_jax.core.schema import Batch
from align_jax.data import batching
from align_jax.data.batching import Cut, Shape
from align_jax.data.encoding import Encoded

FILLER = -1


@dataclasses.dataclass(frozen=True)
class Limits:
    """What truncation needs to know: see ``batching.truncate``; ``bos`` is the token's id or None."""

    max_length: int
    truncation: str = "keep_end"
    max_prompt_length: int | None = None
    bos: int | None = None

    def __post_init__(self) -> None:
        if self.truncation not in batching.TRUNCATIONS:
            raise ValueError(f"unknown truncation {self.truncation!r}; known: {list(batching.TRUNCATIONS)}")
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2 tokens, got {self.max_length}")
        if self.max_prompt_length is not None and not 1 <= self.max_prompt_length < self.max_length:
            raise ValueError(f"max_prompt_length must be from 1 to max_length - 1 = {self.max_length - 1}, "
                             f"got {self.max_prompt_length}")

    def cut(self, encoded: Encoded, group: int, lengths: Sequence[int]) -> Cut:
        """Truncate a group's prompt together with responses of these lengths."""
        prompt = encoded.prompt(group)
        return batching.truncate(
            len(prompt), lengths, turn=int(encoded.turn[group]), tail=int(encoded.tail[group]),
            bos=bool(len(prompt)) and int(prompt[0]) == self.bos, max_length=self.max_length, policy=self.truncation,
            max_prompt_length=self.max_prompt_length)


@dataclasses.dataclass(frozen=True)
class Cuts:
    """Truncation's result for the whole data set.

    Attributes:
        cuts: one a group; None where the group is dropped.
        loss: loss tokens of each response, [G, R].
        report: counts by reason.
    """

    cuts: tuple[Cut | None, ...]
    loss: np.ndarray
    report: dict[str, Any]


def cut_all(encoded: Encoded, limits: Limits) -> Cuts:
    """Truncate every group, counting what is cut and dropped, and why.

    Raises:
        ValueError: nothing is left.
    """
    starts = encoded.response_ends[:-1].reshape(-1, encoded.responses)
    lengths = np.diff(encoded.response_ends).reshape(-1, encoded.responses)
    learnt = np.concatenate([[0], np.cumsum(encoded.response_mask)])
    loss = np.zeros_like(lengths)
    cuts: list[Cut | None] = []
    counts: collections.Counter[str] = collections.Counter()
    for group in range(encoded.groups):
        before = lengths[group].tolist()
        cut = limits.cut(encoded, group, before)
        if not cut.reason:
            loss[group] = learnt[starts[group] + cut.lengths] - learnt[starts[group]]
        reason = cut.reason or ("" if loss[group].all() else "no tokens to learn")
        if reason:
            counts[f"dropped: {reason}"] += 1
            cuts.append(None)
            continue
        prompt = encoded.prompt_ends[group + 1] - encoded.prompt_ends[group]
        counts["truncated prompts"] += int(cut.head + cut.tail < prompt)
        counts["truncated responses"] += sum(after < whole for after, whole in zip(cut.lengths, before))
        cuts.append(cut)
    report = {name: count for name, count in counts.items() if count}
    if not any(cut is not None for cut in cuts):
        raise ValueError(f"the data set is empty after truncation to max_length={limits.max_length} tokens: {report}")
    return Cuts(tuple(cuts), loss, report)


def plan_shape(*, responses: int, batch_size: int, layout: str, max_length: int, row_length: int | None = None,
               groups_per_row: int | None = None, loss_positions: int | None = None, row_multiple: int = 1) -> Shape:
    """Tell a batch's static sizes from the configuration alone.

    Args:
        responses: R.
        batch_size: B, groups in a step, the whole mesh together; in packed rows some stay empty.
        layout: ``plain``, ``packed`` or ``shared_prefix``.
        max_length: tokens of prompt and response; T of a plain row.
        row_length: T of a packed row; default R * max_length.
        groups_per_row: the most groups in a packed row; it divides batch_size.
        loss_positions: P; default T (the data layer finds the exact budget).
        row_multiple: over how many devices, and microbatches, rows are split.

    Returns:
        The sizes.

    Raises:
        ValueError: an unknown layout, or sizes that do not divide; the nearest sizes that do are named.
    """
    if layout not in batching.LAYOUTS:
        raise ValueError(f"unknown data layout {layout!r}; known: {list(batching.LAYOUTS)}")
    if batch_size < 1 or row_multiple < 1:
        raise ValueError(f"batch_size and row_multiple must be at least 1, got {batch_size} and {row_multiple}")
    each = 1 if layout == "plain" else groups_per_row or 1
    units = batch_size // each
    if batch_size % each or units % row_multiple:
        step = each * row_multiple
        below, above = batch_size // step * step, -(-batch_size // step) * step
        what = "groups" if layout == "plain" else f"rows of {each} groups"
        raise ValueError(f"batch_size {batch_size} ({what}) is not divisible by {step} (devices over rows times "
                         f"microbatches{'' if layout == 'plain' else ' times groups_per_row'}); the nearest that are: "
                         f"{', '.join(str(size) for size in (below, above) if size)}")
    if layout == "plain":
        rows, length, slots = batch_size * responses, max_length, 1
    else:
        rows, length, slots = units, row_length or responses * max_length, each * responses
    return Shape(rows, length, min(loss_positions or length, length), slots, batch_size, responses)


def choose_groups_per_row(lengths: Sequence[int], row_length: int, batch_size: int, multiple: int) -> int:
    """Choose how many groups a packed row may hold: the mean number that fits, if it divides the batch.

    Args:
        lengths: tokens of each group.
        row_length: T.
        batch_size: B.
        multiple: the number of rows must be divisible by this.
    """
    fits = max(1, int(row_length // max(np.mean(lengths), 1)))
    return max(each for each in range(1, max(fits, 1) + 1)
               if each == 1 or (batch_size % each == 0 and batch_size // each % multiple == 0))


def batch_shapes(shape: Shape, *, kind: str, layout: str, mismatched: Shape | None = None) -> Batch:
    """Return a batch of the given sizes that takes no memory (zero strides), for planning and for lowering.

    Args:
        shape: the sizes.
        kind: the data kind; decides which optional fields there are.
        layout: ``shared_prefix`` adds ``prefix_ids``.
        mismatched: sizes of the mismatched completions' batch, where there is one.
    """
    def empty(dtype: Any, *sizes: int) -> np.ndarray:
        return np.broadcast_to(np.zeros((), dtype), sizes)

    by_token = (shape.rows, shape.length)
    by_response = (shape.groups, shape.responses)
    ints = {name: empty(np.int32, *by_token) for name in ("tokens", "segment_ids", "positions", "source_index", "slot")}
    batch = Batch(**ints, loss_mask=empty(np.bool_, *by_token), loss_index=empty(np.int32, shape.rows, shape.positions),
                  lengths=empty(np.int32, *by_response), last_index=empty(np.int32, *by_response),
                  weight=empty(np.float32, shape.groups))
    if layout == "shared_prefix":
        batch = batch._replace(prefix_ids=empty(np.int32, *by_token))
    if kind == "mismatched":
        return batch
    if kind == "unpaired":
        batch = batch._replace(label=empty(np.bool_, shape.groups))
    else:
        batch = batch._replace(margin=empty(np.float32, shape.groups))
    extra = None if mismatched is None else batch_shapes(mismatched, kind="mismatched", layout="plain")
    return batch._replace(example_index=empty(np.int32, shape.groups), scores=empty(np.float32, *by_response),
                          mismatched=extra)


def round_up(size: int) -> int:
    """Round a static size up to a multiple of 8, or of 128 if it is larger than 512.

    >>> round_up(13), round_up(600)
    (16, 640)
    """
    step = 8 if size <= 512 else 128
    return max(step, -(-size // step) * step)


def mismatched_shape(shape: Shape, max_length: int, longest: int) -> Shape:
    """Return the sizes of the mismatched completions' batch: plain rows, one a group.

    Args:
        shape: the batch's own sizes.
        max_length: tokens of prompt and response.
        longest: the most loss tokens in any response.
    """
    length = shape.length if shape.slots == 1 else max_length
    return Shape(shape.groups, length, min(round_up(longest), length), 1, shape.groups, 1)


def make_units(lengths: Sequence[int], groups: Sequence[int], row_length: int, each: int) -> np.ndarray:
    """Pack groups into units of ``each`` places; returns group numbers [units, each], FILLER in places left over."""
    # in the order of the data, as far as packing leaves it, for those who do not shuffle
    rows = sorted(sorted(row) for row in batching.best_fit(lengths, row_length, each))
    units = np.full((len(rows), each), FILLER, np.int64)
    for number, row in enumerate(rows):
        units[number, :len(row)] = [groups[item] for item in row]
    return units
