# SPDX-License-Identifier: Apache-2.0
"""Columns beside those that a format reads: most are metadata, but some names say that their words
belong to the prompt or the answer, which would be trained without them."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from align_jax.core.schema import Example
from align_jax.data.messages import Row
from align_jax.data.rows import TEMPLATE, renaming
from align_jax.data.transcripts import RowError

# what a column of such a name is a part of -> its names
_NAMES = {
    "system": r"sys(tem)?_?(prompt|message|instruction|content|turn|text)?s?",
    "prompt": r"prompt|history|contexts?|passages?|inputs?|instructions?|question|query|background",
    "answer": r"response|completion|(.+_)?(cot|chain_of_thought|reasoning(_content)?|thinking|"
    r"thoughts?)",
}
_CALLED = {"system": "system turn", "prompt": "prompt", "answer": "answer"}
_PARTS = {part: re.compile(names, re.IGNORECASE) for part, names in _NAMES.items()}


def check_beside(row: Row, unread: Collection[str], kind: str, examples: Sequence[Example]) -> None:
    """Refuse a column that seems to be a part of what is trained, and of which nothing is trained.

    Args:
        row: the row.
        unread: its columns that the format does not read.
        kind: of the format: of prompts alone, a reasoning is the reward's business.
        examples: made of the row.

    Raises:
        RowError: naming the column, and the flags that say what it is.
    """
    named = {name: part for name in unread if name not in TEMPLATE and (part := _part_of(name))}
    if kind == "prompts":
        named = {name: part for name, part in named.items() if part != "answer"}
    if not named:
        return
    trained = [_plain(text) for one in examples for text in _texts(vars(one))]
    for name, part in named.items():
        lost = [text for text in map(_plain, _texts(row[name])) if text]
        if any(not any(text in one for one in trained) for text in lost):
            uses = {
                "system": f"{renaming(system=name)} makes it so",
                "prompt": "write it into the prompt",
                "answer": "write it into the answer (reasoning as its message's reasoning_content)",
            }
            raise RowError(
                f"{name}: seems to be a part of the {_CALLED[part]}, and nothing of it is trained",
                f"{uses[part]}, or {renaming(note=name)} says that it is none",
            )


@functools.lru_cache(4096)
def _part_of(name: str) -> str:
    """Return what a column is a part of by its name, "" = nothing."""
    return next((part for part, names in _PARTS.items() if names.fullmatch(name)), "")


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a value; of messages what is said, not who says it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in ("role", "from", "source", "extras"):
                yield from _texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)


def _plain(text: str) -> str:
    return " ".join(text.split())
