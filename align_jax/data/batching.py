# SPDX-License-Identifier: Apache-2.0
"""From groups of tokens to rows: truncation, packing, and the arrays of a Batch.

plain          [prompt response 0 . . . ]   one response a row; a group is R consecutive rows
               [prompt response 1 . . . ]
packed         [prompt response 0 | prompt response 1 | next group ...]
shared_prefix  [prompt | response 0 | response 1 | next group ...]   each response sees the prompt, not the other
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from align_jax.core.schema import Batch
from align_jax.data.encoding import Encoded

LAYOUTS = ("plain", "packed", "shared_prefix")
TRUNCATIONS = ("keep_start", "keep_end", "drop")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A batch's static sizes, those of the whole mesh; letters as in core.schema."""

    rows: int  # N
    length: int  # T
    positions: int  # P
    slots: int  # S
    groups: int  # B
    responses: int  # R


@dataclasses.dataclass(frozen=True)
class Cut:
    """What truncation leaves of a group: the prompt's first ``head`` and last ``tail`` tokens, each
    response's start.

    ``reason`` says why the group is dropped; empty if it is not.
    """

    head: int
    tail: int
    lengths: tuple[int, ...]
    reason: str = ""


def truncate(
    prompt: int,
    responses: Sequence[int],
    *,
    turn: int,
    tail: int,
    bos: bool,
    max_length: int,
    policy: str,
    max_prompt_length: int | None = None,
) -> Cut:
    """Fit a group's prompt and its longest response into ``max_length`` tokens.

    The prompt gives way first, the same for all responses of the group, but its last user turn (all
    of it, where there is one turn) only to leave the response a quarter of the length; beyond that
    the responses lose their ends (and with them the token that ends a turn, so that nobody learns
    to stop there).

    Args:
        prompt: tokens of the prompt.
        responses: tokens of each response.
        turn: where the prompt's last user turn begins.
        tail: how many tokens at the prompt's end ask for the answer; ``keep_start`` keeps them too.
        bos: whether the prompt begins with a beginning-of-sequence token; ``keep_end`` keeps it.
        max_length: the limit for prompt and response together, in tokens.
        policy: ``keep_end`` or ``keep_start`` of the prompt, or ``drop`` the whole group.
        max_prompt_length: a limit for the prompt alone.

    Returns:
        The cut.
    """
    longest = max(responses, default=0)
    limit = prompt if max_prompt_length is None else min(prompt, max_prompt_length)
    if limit == prompt and prompt + longest <= max_length:
        return Cut(prompt, 0, tuple(responses))
    if policy == "drop":
        return Cut(prompt, 0, tuple(responses), reason="too long")
    floor = min(prompt - turn + (bos and turn > 0), max_length - min(longest, max_length // 4))
    keep = min(limit, max(max_length - longest, floor))
    keep = max(keep, min(prompt, tail + bos))
    lengths = tuple(min(length, max_length - keep) for length in responses)
    if min(lengths, default=1) < 1:
        return Cut(prompt, 0, tuple(responses), reason="too long")
    if keep >= prompt:
        return Cut(prompt, 0, lengths)
    end = keep - bos if policy == "keep_end" else tail
    return Cut(keep - end, end, lengths)


def best_fit(
    lengths: Sequence[int],
    capacity: int,
    limit: int,
    *,
    loads: Sequence[int] | None = None,
    most: int = 0,
) -> list[list[int]]:
    """Pack items into rows: the longest first, each into the fullest row that still has room.

    Args:
        lengths: tokens of each item, at most ``capacity``.
        capacity: tokens in a row.
        limit: the most items in a row.
        loads: a second measure of each item (its loss tokens); None: there is none.
        most: the most of it in a row of several items.

    Returns:
        Rows of item numbers; no row holds more than ``capacity`` tokens or ``limit`` items.

    >>> best_fit([5, 4, 3, 2, 2], capacity=8, limit=3)
    [[0, 2], [1, 3, 4]]
    >>> best_fit([5, 4, 3, 2, 2], capacity=8, limit=3, loads=[4, 2, 3, 1, 1], most=5)
    [[0, 3], [1, 2], [4]]
    """
    rows: list[list[int]] = []
    loaded: list[int] = []
    # (tokens left, row) of the rows that still take items, ascending
    room: list[tuple[int, int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load = 0 if loads is None else loads[item]
        at = bisect.bisect_left(room, (lengths[item], -1))
        while at < len(room) and loaded[room[at][1]] + load > most and loads is not None:
            at += 1
        if at < len(room):
            left, row = room.pop(at)
            rows[row].append(item)
            loaded[row] += load
        else:
            left, row = capacity, len(rows)
            rows.append([item])
            loaded.append(load)
        left -= lengths[item]
        if left and len(rows[row]) < limit:
            bisect.insort(room, (left, row))
    return rows


@dataclasses.dataclass(frozen=True)
class Piece:
    """A group (or, in the plain layout, one response of it) as it goes into a row."""

    prompt: Int[np.ndarray, "_"]
    responses: tuple[tuple[Int[np.ndarray, "_"], Bool[np.ndarray, "_"]], ...]


def cut_prompt(prompt: Int[np.ndarray, "_"], cut: Cut) -> Int[np.ndarray, "_"]:
    """Return what a cut leaves of a prompt."""
    if cut.head + cut.tail >= len(prompt):
        return prompt
    return np.concatenate([prompt[: cut.head], prompt[len(prompt) - cut.tail :]])


def group_length(prompt: int, responses: Sequence[int], layout: str) -> int:
    """Return how many tokens of a row a group takes (plain: its longest response's row)."""
    if layout == "plain":
        return prompt + max(responses)
    return (
        prompt + sum(responses)
        if layout == "shared_prefix"
        else prompt * len(responses) + sum(responses)
    )


class Rows:
    """Writes pieces into a batch's arrays.

    Attributes:
        arrays: field name -> array, as in Batch.
    """

    def __init__(
        self, rows: int, length: int, positions: int, slots: int, pad: int, *, shared: bool
    ):
        zeros = {
            name: np.zeros((rows, length), np.int32)
            for name in ("segment_ids", "positions", "source_index", "slot")
        }
        self.arrays = {
            "tokens": np.full((rows, length), pad, np.int32),
            **zeros,
            "loss_mask": np.zeros((rows, length), np.bool_),
            "loss_index": np.full((rows, positions), length, np.int32),
        }
        if shared:
            self.arrays["prefix_ids"] = np.zeros((rows, length), np.int32)
        self.lengths = np.zeros((rows, slots), np.int32)
        self.last_index = np.zeros((rows, slots), np.int32)
        self.shared = shared

    def write(self, row: int, pieces: Iterable[Piece], responses: int) -> None:
        """Write a row's pieces one after the other; ``responses`` is the number of slots a piece
        takes."""
        at = segment = 0
        for number, piece in enumerate(pieces):
            slot = number * responses
            if self.shared:
                start = at
                segment += 1
                at = self._segment(row, at, piece.prompt, segment, 0)
                shared, source = (segment, at - 1) if at > start else (0, 0)
                for offset, (ids, mask) in enumerate(piece.responses):
                    segment += 1
                    begin = at
                    at = self._segment(row, at, ids, segment, len(piece.prompt))
                    self.arrays["prefix_ids"][row, begin:at] = shared
                    self.arrays["source_index"][row, begin] = source
                    self._mask(row, begin, mask, slot + offset)
            else:
                for offset, (ids, mask) in enumerate(piece.responses):
                    segment += 1
                    begin = at + len(piece.prompt)
                    at = self._segment(row, at, np.concatenate([piece.prompt, ids]), segment, 0)
                    self._mask(row, begin, mask, slot + offset)
        found = np.flatnonzero(self.arrays["loss_mask"][row])
        self.arrays["loss_index"][row, : len(found)] = found

    def _segment(self, row: int, at: int, ids: np.ndarray, segment: int, position: int) -> int:
        end = at + len(ids)
        self.arrays["tokens"][row, at:end] = ids
        self.arrays["segment_ids"][row, at:end] = segment
        self.arrays["positions"][row, at:end] = np.arange(position, position + len(ids))
        self.arrays["source_index"][row, at + 1 : end] = np.arange(at, end - 1)
        return end

    def _mask(self, row: int, begin: int, mask: np.ndarray, slot: int) -> None:
        end = begin + len(mask)
        self.arrays["loss_mask"][row, begin:end] = mask
        self.arrays["slot"][row, begin:end] = np.where(mask, slot, 0)
        self.lengths[row, slot] = mask.sum()
        self.last_index[row, slot] = (
            begin + int(np.flatnonzero(mask)[-1]) if mask.any() else max(end - 1, 0)
        )


def piece_of(encoded: Encoded, group: int, cut: Cut) -> Piece:
    """Return a group's tokens after truncation."""
    responses = []
    for index, length in enumerate(cut.lengths):
        ids, mask = encoded.response(group, index)
        responses.append((ids[:length], mask[:length]))
    return Piece(cut_prompt(encoded.prompt(group), cut), tuple(responses))


def to_batch(
    rows: Rows,
    responses: int,
    *,
    weight: Float[np.ndarray, "B"],
    **fields: np.ndarray | Batch | None,
) -> Batch:
    """Return the written rows as a Batch; ``fields`` are the groups' own ([B], [B, R])."""
    return Batch(
        **rows.arrays,
        lengths=rows.lengths.reshape(-1, responses),
        last_index=rows.last_index.reshape(-1, responses),
        weight=weight,
        **fields,
    )
