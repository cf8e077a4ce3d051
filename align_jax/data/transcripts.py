# SPDX-License-Identifier: Apache-2.0
"""Finding the prompt that two conversations share: by turns where there are turns, never by token
ids."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from align_jax.core.schema import Message

_TURN = re.compile(r"(?:\n\n|\A)(Human|Assistant):")
_ROLE = {"Human": "user", "Assistant": "assistant"}


class RowError(ValueError):
    """A row that no example can be made of.

    Args:
        reason: why, without the row's own text: dropped rows are counted by it.
        detail: what of the row shows it.
        where: its place, if whoever catches this need not say it.
    """

    def __init__(self, reason: str, detail: str = "", where: str = "") -> None:
        lead = f"{where}: " if where else ""
        super().__init__(lead + (f"{reason}: {detail}" if detail else reason))
        self.reason, self.where = reason, where


class TranscriptError(RowError):
    """Such a row of Anthropic transcripts, whose public files hold a few: always dropped and
    counted."""


def is_transcript(text: str) -> bool:
    """Tell whether a text is an Anthropic transcript: turns that begin with "\\n\\nHuman:" and
    "\\n\\nAssistant:", the first perhaps without its empty line."""
    if text.startswith("Human:"):
        return "\n\nAssistant:" in text
    return text.startswith(("\n\nHuman:", "\n\nAssistant:"))


def turns(text: str) -> tuple[Message, ...]:
    """Split a transcript into messages; texts stripped, turns of one speaker in a row joined by an
    empty line."""
    parts = _TURN.split(text)[1:]
    found: list[Message] = []
    for role, content in zip(parts[::2], parts[1::2]):
        if found and found[-1]["role"] == _ROLE[role]:
            found[-1] = {
                "role": _ROLE[role],
                "content": f"{found[-1]['content']}\n\n{content.strip()}",
            }
        else:
            found.append({"role": _ROLE[role], "content": content.strip()})
    return tuple(found)


def write(messages: Sequence[Message]) -> str:
    """Write messages as a transcript that ends where the assistant is to answer.

    >>> write(({"role": "user", "content": "Why?"},))
    '\\n\\nHuman: Why?\\n\\nAssistant:'
    """
    names = {
        "user": "\n\nHuman: ",
        "assistant": "\n\nAssistant: ",
        "tool": "\n\nTool: ",
        "system": "",
    }
    return (
        "".join(names[message["role"]] + message["content"] for message in messages)
        + "\n\nAssistant:"
    )


def asking(
    messages: tuple[Message, ...], responses: Sequence[str], *, chat: bool
) -> tuple[tuple[Message, ...] | str, tuple[str, ...]]:
    """Return a prompt and its responses: messages where there is a chat template, else a plain
    transcript."""
    if chat:
        return messages, tuple(responses)
    return write(messages), tuple(f" {response}" for response in responses)


def split_messages(
    chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """Split two conversations into the prompt they share and what follows in each.

    The prompt is the longest run of equal turns after which both go on with the assistant.

    Raises:
        RowError: they share no such turns.
    """
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and not all(
        len(side) > shared and side[shared]["role"] == "assistant" for side in (chosen, rejected)
    ):
        shared -= 1
    if not shared:
        raise RowError("chosen and rejected share no prompt")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def split_pair(
    chosen: str, rejected: str, *, chat: bool
) -> tuple[tuple[Message, ...] | str, tuple[str | tuple[Message, ...], ...]]:
    """Split two texts that begin alike into prompt and responses.

    Transcripts become messages where the tokenizer has a chat template, and stay the plain text
    they are otherwise. Texts without turns are split after the last white space or line of what
    they share, so that a word with which both answers begin is not cut.

    Raises:
        RowError: they share no prompt, or an answer is empty (transcripts: TranscriptError).
    """
    if is_transcript(chosen) and is_transcript(rejected):
        return _split_transcripts(chosen, rejected, chat)
    common = os.path.commonprefix([chosen, rejected])
    cut = max((match.end() for match in re.finditer(r"\s+", common)), default=0)
    if not cut:
        raise RowError("chosen and rejected share no prompt")
    if not chosen[cut:].strip() or not rejected[cut:].strip():
        raise RowError("empty response")  # one text is the whole of what they share
    return chosen[:cut], (chosen[cut:], rejected[cut:])


def _split_transcripts(
    chosen: str, rejected: str, chat: bool
) -> tuple[tuple[Message, ...] | str, tuple[str | tuple[Message, ...], ...]]:
    try:
        prompt, *rests = split_messages(turns(chosen), turns(rejected))
    except RowError as error:
        raise TranscriptError(str(error)) from error
    cut = _shared_turns_end(chosen, rejected)
    if not all(
        message["content"] for rest in rests for message in rest if message["role"] == "assistant"
    ):
        raise TranscriptError("empty response")
    if chat:
        return prompt, tuple(rest[0]["content"] if len(rest) == 1 else rest for rest in rests)
    if not cut:
        raise TranscriptError("chosen and rejected share no prompt")
    return chosen[:cut], (chosen[cut:], rejected[cut:])


def _shared_turns_end(chosen: str, rejected: str) -> int:
    """Return where the last assistant's answer begins up to which both transcripts are equal, in
    characters."""
    common = len(os.path.commonprefix([chosen, rejected]))
    ends = [
        match.end()
        for match in _TURN.finditer(chosen)
        if match.group(1) == "Assistant" and match.end() <= common
    ]
    return ends[-1] if ends else 0
