# SPDX-License-Identifier: Apache-2.0
"""Calls of functions in the form that a chat template reads.

Data have a call's arguments as an object or, as OpenAI's API does, as a text of JSON; a template
that writes ``arguments | tojson`` quotes the text a second time, and one that joins texts fails at
the object.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from align_jax.core.schema import Message
from align_jax.data import template as templates
from align_jax.data.transcripts import RowError


def as_read(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message]
) -> list[Mapping[str, Any]]:
    """Return messages whose calls' arguments have the form that the tokenizer's template takes.

    Raises:
        RowError: a text that is no JSON, where an object is wanted.
    """
    form = _form(tokenizer)
    if not form:
        return list(turns)
    return [
        {**turn, "tool_calls": [_call(call, form) for call in turn["tool_calls"]]}
        if turn.get("tool_calls")
        else turn
        for turn in turns
    ]


def _call(call: Any, form: str) -> Any:
    inner = call.get("function") if isinstance(call, Mapping) else None
    if isinstance(inner, Mapping):
        return {**call, "function": _call(inner, form)}
    if not isinstance(call, Mapping) or "arguments" not in call:
        return call
    given = call["arguments"]
    if form == "text" and isinstance(given, (Mapping, list)):
        return {**call, "arguments": json.dumps(given, ensure_ascii=False)}
    if form == "object" and isinstance(given, str):
        try:
            return {**call, "arguments": json.loads(given) if given.strip() else {}}
        except (ValueError, RecursionError) as error:
            raise RowError("tool_calls: arguments that are no JSON") from error
    return call


@functools.lru_cache(maxsize=8)
def _form(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what a template takes arguments as: text or object; "" where it takes both, or none of
    them."""
    texts = {"object": _rendered(tokenizer, {"a": "b"}), "text": _rendered(tokenizer, '{"a": "b"}')}
    # an object that is written as Python writes it, a text that is quoted twice
    wrong = {"object": "{'a'", "text": '\\"a\\"'}
    takes = [form for form, text in texts.items() if text and wrong[form] not in text]
    return takes[0] if len(takes) == 1 else ""


def _rendered(tokenizer: PreTrainedTokenizerBase, arguments: Any) -> str:
    function = {"name": "f", "arguments": arguments}
    call = {"id": "call00001", "type": "function", "function": function}
    turns: list[Message] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    try:
        return templates.apply(tokenizer, turns)
    except templates.Endless:
        raise
    except Exception:  # templates raise what they like
        return ""
