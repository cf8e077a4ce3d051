# SPDX-License-Identifier: Apache-2.0
"""Truncation: what is left of a prompt and its responses that are too long together."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from align_jax.core.choose import nearest
from align_jax.core.options import DataOptions
from align_jax.data.encoding import Encoded
from align_jax.data.layout import TokenizedGroup

POLICIES = ("keep_start", "keep_end", "drop")


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long prompts and responses may be.

    Attributes:
        max_length: of a prompt with one response, tokens.
        policy: what is kept of a prompt: its start, its end; or ``drop`` the whole group.
        max_prompt_length: of a prompt, tokens; 0: what the response leaves.
        bos_id: the beginning-of-sequence token, which ``keep_end`` keeps; None: there is none.
    """

    max_length: int
    policy: str = "keep_end"
    max_prompt_length: int = 0
    bos_id: int | None = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(
                f"config.data.truncation = {self.policy!r} is "
                f"unknown{nearest(self.policy, POLICIES)}"
            )
        if self.max_length < 2:
            raise ValueError(f"max_length = {self.max_length}: expected at least 2 tokens")
        if not 0 <= self.max_prompt_length < self.max_length:
            raise ValueError(
                f"config.data.max_prompt_length = {self.max_prompt_length}: expected less than "
                f"max_length = {self.max_length}"
            )

    @classmethod
    def of(cls, options: DataOptions, max_length: int, bos_id: int | None = None) -> Limits:
        """Return the limits that the options set."""
        return cls(max_length, options.truncation, options.max_prompt_length, bos_id)


@dataclasses.dataclass(frozen=True)
class Truncation:
    """What is left of a group: the prompt's first ``head`` and last ``tail`` tokens, and so many of
    each response.

    ``reason`` says why the group is dropped; empty if it is not.
    """

    head: int
    tail: int
    lengths: tuple[int, ...]
    reason: str = ""

    def prompt(self, ids: Int[np.ndarray, "_"]) -> Int[np.ndarray, "_"]:
        """Return what is left of the prompt."""
        if self.head + self.tail >= len(ids):
            return ids
        return np.concatenate([ids[: self.head], ids[len(ids) - self.tail :]])

    def group(self, whole: TokenizedGroup) -> TokenizedGroup:
        """Return what is left of the group."""
        responses = [
            (ids[:length], mask[:length])
            for (ids, mask), length in zip(whole.responses, self.lengths)
        ]
        return TokenizedGroup(self.prompt(whole.prompt), tuple(responses))


def truncate(
    prompt: Int[np.ndarray, "_"],
    responses: Sequence[int],
    limits: Limits,
    *,
    last_turn: int,
    header: int,
) -> Truncation:
    """Fit a prompt and the longest of its responses into ``max_length`` tokens.

    The prompt gives way first, the same for all responses of the group, but its last user turn (all
    of it, where there is one turn) only to leave the response a quarter of the length; beyond that
    the responses lose their ends (and with them the token that ends a turn, so that nobody learns
    to stop there).

    Args:
        prompt: token ids.
        responses: tokens of each response.
        limits: what they are to fit.
        last_turn: where the prompt's last user turn begins.
        header: how many tokens at the prompt's end ask for the answer: they always stay.
    """
    size, longest, max_length = len(prompt), max(responses, default=0), limits.max_length
    bos = int(size > 0 and int(prompt[0]) == limits.bos_id)
    allowed = min(size, limits.max_prompt_length or size)
    if allowed == size and size + longest <= max_length:
        return Truncation(size, 0, tuple(responses))
    too_long = Truncation(size, 0, tuple(responses), reason="too long")
    if limits.policy == "drop":
        return too_long
    turn = size - last_turn + (bos if last_turn else 0)
    wanted = min(turn, max_length - min(longest, max_length // 4))
    keep = min(allowed, max(max_length - longest, wanted))
    keep = max(keep, min(size, header + bos))
    lengths = tuple(min(length, max_length - keep) for length in responses)
    if min(lengths, default=1) < 1:
        return too_long
    if keep >= size:
        return Truncation(size, 0, lengths)
    tail = keep - bos if limits.policy == "keep_end" else header
    return Truncation(keep - tail, tail, lengths)


def truncate_group(
    encoded: Encoded, group: int, responses: Sequence[int], limits: Limits
) -> Truncation:
    """Truncate a group's prompt together with responses of these lengths (its own, or others)."""
    return truncate(
        encoded.prompt(group),
        responses,
        limits,
        last_turn=int(encoded.last_turn[group]),
        header=int(encoded.header[group]),
    )


@dataclasses.dataclass(frozen=True)
class Truncations:
    """What is left of a whole data set.

    Attributes:
        head, tail, lengths: of each group, as in Truncation; all 0 where it is dropped.
        loss_tokens: of each response.
        report: counts by reason.
    """

    head: Int[np.ndarray, "G"]
    tail: Int[np.ndarray, "G"]
    lengths: Int[np.ndarray, "G R"]
    loss_tokens: Int[np.ndarray, "G R"]
    report: dict[str, int]

    def group(self, number: int) -> Truncation:
        """Return what is left of a group."""
        return Truncation(
            int(self.head[number]), int(self.tail[number]), tuple(self.lengths[number].tolist())
        )


def _made_equal(encoded: Encoded, group: int, left: Truncation, whole: Sequence[int]) -> bool:
    """Tell whether what sets a pair's answers apart was cut off."""
    if len(whole) != 2 or tuple(whole) == left.lengths:
        return False
    first, second = (encoded.response(group, i)[0][: left.lengths[i]] for i in range(2))
    return np.array_equal(first, second)


_LONGER = (
    "; raise --config.max_length, or cut prompts in place of leaving them out: "
    "--config.data.truncation=keep_end"
)


def truncate_all(encoded: Encoded, limits: Limits) -> Truncations:
    """Truncate every group, counting what is cut and dropped, and why.

    Raises:
        ValueError: nothing is left, or every response is cut.
    """
    lengths = np.diff(encoded.response_ends).reshape(-1, encoded.responses)
    head = np.diff(encoded.prompt_ends)
    tail, loss_tokens = np.zeros_like(head), encoded.loss_tokens.copy()
    reasons = np.asarray(encoded.reasons, np.object_)[encoded.refused]
    too_long = head + lengths.max(axis=1) > limits.max_length
    if limits.max_prompt_length:
        too_long |= head > limits.max_prompt_length
    counts: collections.Counter[str] = collections.Counter(encoded.notes)
    for group in np.flatnonzero(too_long).tolist():
        whole = tuple(lengths[group].tolist())
        left = truncate_group(encoded, group, whole, limits)
        if left.reason:
            reasons[group] = reasons[group] or left.reason
            continue
        cut = [index for index, length in enumerate(left.lengths) if length < whole[index]]
        for index in cut:
            _, mask = encoded.response(group, index)
            loss_tokens[group, index] = mask[: left.lengths[index]].sum()
        if loss_tokens[group].all():
            shorter = bool(left.head + left.tail < head[group])
            counts["truncated prompts"] += shorter
            turn = int(head[group] - encoded.last_turn[group])
            counts["truncated last turns"] += shorter and left.tail < turn
            counts["answers made equal by truncation"] += _made_equal(encoded, group, left, whole)
            counts["truncated responses"] += len(cut)
        head[group], tail[group], lengths[group] = left.head, left.tail, left.lengths
    reasons[(reasons == "") & ~loss_tokens.all(axis=1)] = "no tokens to learn"
    dropped = reasons != ""
    counts.update(f"dropped: {reason}" for reason in reasons[dropped])
    report = {name: count for name, count in counts.items() if count}
    if dropped.all():
        raise ValueError(
            f"the data set is empty after truncation to max_length={limits.max_length} tokens: "
            f"{report}" + _LONGER * (report.get("dropped: too long") == len(dropped))
        )
    _check_room(encoded, lengths, ~dropped, limits)
    for array in (head, tail, lengths, loss_tokens):
        array[dropped] = 0
    return Truncations(head, tail, lengths, loss_tokens, report)


def _check_room(
    encoded: Encoded, left: Int[np.ndarray, "G R"], kept: Bool[np.ndarray, "G"], limits: Limits
) -> None:
    """Refuse a length that cuts every answer to every prompt: none would be learned to its end.

    Raises:
        ValueError: with the length that cuts none.
    """
    prompts, whole = np.diff(encoded.prompt_ends), np.diff(encoded.response_ends)
    whole = whole.reshape(-1, encoded.responses)
    if prompts.all() and (left < whole)[kept].all():
        longest = int((prompts[:, None] + whole).max())
        raise ValueError(
            f"max_length = {limits.max_length} tokens cut every response; the longest example has "
            f"{longest}: --config.max_length={longest} cuts none (evaluate: --max_length)"
        )
