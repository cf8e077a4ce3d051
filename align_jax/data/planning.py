# SPDX-License-Identifier: Apache-2.0
"""Before the first batch: what truncation leaves, which groups share a row, and every static
size."""

from __future__ import annotations

import collections
import dataclasses
import math
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
    """What truncation needs to know: see ``batching.truncate``; ``bos`` is the token's id or
    None."""

    max_length: int
    truncation: str = "keep_end"
    max_prompt_length: int | None = None
    bos: int | None = None

    def __post_init__(self) -> None:
        if self.truncation not in batching.TRUNCATIONS:
            raise ValueError(
                f"unknown truncation {self.truncation!r}; known: {list(batching.TRUNCATIONS)}"
            )
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2 tokens, got {self.max_length}")
        if self.max_prompt_length is not None and not 1 <= self.max_prompt_length < self.max_length:
            raise ValueError(
                "max_prompt_length must be from 1 to max_length - 1 = "
                f"{self.max_length - 1}, "
                f"got {self.max_prompt_length}"
            )

    def cut(self, encoded: Encoded, group: int, lengths: Sequence[int]) -> Cut:
        """Truncate a group's prompt together with responses of these lengths."""
        prompt = encoded.prompt(group)
        return batching.truncate(
            len(prompt),
            lengths,
            turn=int(encoded.turn[group]),
            tail=int(encoded.tail[group]),
            bos=bool(len(prompt)) and int(prompt[0]) == self.bos,
            max_length=self.max_length,
            policy=self.truncation,
            max_prompt_length=self.max_prompt_length,
        )


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
    learned = np.concatenate([[0], np.cumsum(encoded.response_mask)])
    loss = np.zeros_like(lengths)
    cuts: list[Cut | None] = []
    counts: collections.Counter[str] = collections.Counter()
    for group in range(encoded.groups):
        before = lengths[group].tolist()
        cut = limits.cut(encoded, group, before)
        if not cut.reason:
            loss[group] = learned[starts[group] + cut.lengths] - learned[starts[group]]
        reason = cut.reason or ("" if loss[group].all() else "no tokens to learn")
        if reason:
            counts[f"dropped: {reason}"] += 1
            cuts.append(None)
            continue
        prompt = encoded.prompt_ends[group + 1] - encoded.prompt_ends[group]
        counts["truncated prompts"] += int(cut.head + cut.tail < prompt)
        counts["truncated responses"] += sum(
            after < whole for after, whole in zip(cut.lengths, before)
        )
        cuts.append(cut)
    report = {name: count for name, count in counts.items() if count}
    if not any(cut is not None for cut in cuts):
        raise ValueError(
            "the data set is empty after truncation to "
            f"max_length={limits.max_length} tokens: {report}"
        )
    return Cuts(tuple(cuts), loss, report)


def plan_shape(
    *,
    responses: int,
    batch_size: int,
    layout: str,
    max_length: int,
    row_length: int | None = None,
    groups_per_row: float | int | None = None,
    loss_positions: int | None = None,
    row_multiple: int = 1,
) -> Shape:
    """Tell a batch's static sizes from the configuration alone.

    Args:
        responses: R.
        batch_size: groups in a step, the whole mesh together: exactly in plain rows, on average in
            packed ones.
        layout: ``plain``, ``packed`` or ``shared_prefix``.
        max_length: tokens of prompt and response; T of a plain row.
        row_length: T of a packed row; default R * max_length.
        groups_per_row: how many groups a packed row holds on average (the data layer measures it);
            default 1.
        loss_positions: P; default T (the data layer finds the exact budget).
        row_multiple: over how many devices, and microbatches, rows are split.

    Returns:
        The sizes.  In packed rows B counts places for groups, of which about half stay empty.

    Raises:
        ValueError: an unknown layout, or sizes that do not divide; the nearest sizes that do are
            named.
    """
    if layout not in batching.LAYOUTS:
        raise ValueError(f"unknown data layout {layout!r}; known: {list(batching.LAYOUTS)}")
    if batch_size < 1 or row_multiple < 1:
        raise ValueError(
            f"batch_size and row_multiple must be at least 1, got {batch_size} and {row_multiple}"
        )
    if layout == "plain":
        if batch_size % row_multiple:
            below, above = (
                batch_size // row_multiple * row_multiple,
                -(-batch_size // row_multiple) * row_multiple,
            )
            raise ValueError(
                f"batch_size {batch_size} is not divisible by {row_multiple} "
                "(devices over rows times "
                "microbatches); the nearest that are: "
                f"{', '.join(str(n) for n in (below, above) if n)}"
            )
        rows, length, slots = batch_size * responses, max_length, 1
    else:
        mean = groups_per_row or 1
        if mean < 1:
            raise ValueError(f"groups_per_row must be at least 1, got {groups_per_row}")
        rows = max(1, round(batch_size / mean / row_multiple)) * row_multiple
        length, slots = row_length or responses * max_length, places(mean) * responses
    return Shape(
        rows,
        length,
        min(loss_positions or length, length),
        slots,
        rows * slots // responses,
        responses,
    )


def places(groups_per_row: float | int) -> int:
    """Return how many groups a packed row may hold: one, or twice the average; empty places cost
    next to nothing."""
    return 1 if groups_per_row == 1 else math.ceil(2 * groups_per_row)


def mean_groups_per_row(lengths: Sequence[int], row_length: int) -> float:
    """Return how many groups a packed row holds on average.

    Args:
        lengths: tokens of each group.
        row_length: T.
    """
    longest = max(lengths)
    return len(lengths) / len(batching.best_fit(lengths, max(row_length, longest), len(lengths)))


def batch_shapes(shape: Shape, *, kind: str, layout: str, mismatched: Shape | None = None) -> Batch:
    """Return a batch of the given sizes that takes no memory (zero strides), for planning and for
    lowering.

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
    ints = {
        name: empty(np.int32, *by_token)
        for name in ("tokens", "segment_ids", "positions", "source_index", "slot")
    }
    batch = Batch(
        **ints,
        loss_mask=empty(np.bool_, *by_token),
        loss_index=empty(np.int32, shape.rows, shape.positions),
        lengths=empty(np.int32, *by_response),
        last_index=empty(np.int32, *by_response),
        weight=empty(np.float32, shape.groups),
    )
    if layout == "shared_prefix":
        batch = batch._replace(prefix_ids=empty(np.int32, *by_token))
    if kind == "mismatched":
        return batch
    if kind == "unpaired":
        batch = batch._replace(label=empty(np.bool_, shape.groups))
    else:
        batch = batch._replace(margin=empty(np.float32, shape.groups))
    extra = (
        None if mismatched is None else batch_shapes(mismatched, kind="mismatched", layout="plain")
    )
    return batch._replace(
        example_index=empty(np.int32, shape.groups),
        scores=empty(np.float32, *by_response),
        mismatched=extra,
    )


def round_up(size: int) -> int:
    """Round a static size up to a multiple of 8, or of 128 if it is larger than 512.

    >>> round_up(13), round_up(600)
    (16, 640)
    """
    step = 8 if size <= 512 else 128
    return max(step, -(-size // step) * step)


def mismatched_shape(shape: Shape, length: int, longest: int) -> Shape:
    """Return the sizes of the mismatched completions' batch: plain rows, one a group.

    Args:
        shape: the batch's own sizes.
        length: tokens of prompt and response.
        longest: the most loss tokens in any response.
    """
    return Shape(shape.groups, length, min(round_up(longest), length), 1, shape.groups, 1)


def make_units(
    lengths: Sequence[int], loss: Sequence[int], groups: Sequence[int], row_length: int, each: int
) -> np.ndarray:
    """Pack groups into rows, evening out the loss tokens.

    The head's budget P is the most loss tokens in any row, so rows may hold a fifth more than the
    average (or the one group that has the most): on real pairs that halves P and costs 1 to 4 %
    more rows.

    Args:
        lengths: tokens of each group.
        loss: loss tokens of each group.
        groups: their numbers.
        row_length: T.
        each: the most groups in a row.

    Returns:
        Group numbers [units, each], FILLER in places left over.
    """
    if each == 1:
        rows = [[item] for item in range(len(lengths))]
    else:
        most = max(*loss, int(1.2 * sum(loss) * row_length / sum(lengths)))
        # in the order of the data, as far as packing leaves it, for those who do not shuffle
        rows = sorted(
            map(sorted, batching.best_fit(lengths, row_length, each, loads=loss, most=most))
        )
    units = np.full((len(rows), each), FILLER, np.int64)
    for number, row in enumerate(rows):
        units[number, : len(row)] = [groups[item] for item in row]
    return units
