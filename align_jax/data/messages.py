# SPDX-License-Identifier: Apache-2.0
"""Reading messages: what of a turn is text, what is a call, who speaks, whether it is learned.

A message comes out as ``role``, ``content`` (a text), ``loss: False`` where it is not learned
(``True`` where that is asked of a turn that no assistant speaks), and every other key for the chat
template.
"""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Callable, Mapping
from typing import Any

from align_jax.core.choose import nearest
from align_jax.core.schema import Message
from align_jax.data.transcripts import RowError

Row = Mapping[str, Any]
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
CALLS = ("function_call", "tool_call")  # roles of turns whose words are a call, as JSON
# on a turn or a row: 0 or false, and it is not learned
MARKS = (
    "weight",
    "train",
    "trainable",
    "training",
    "train_on_turn",
    "loss",
    "loss_mask",
    "loss_weight",
    "loss_scale",
)
# words of marks that say more than that, or of which it is not clear what they say
_MARKING = re.compile(
    r"(^|_)(masks?|masked|ignored?|skip|skipped|excluded?|train|trained|trainable|training|loss|"
    r"weights?|learn|learned|learnable)(_|$)",
    re.IGNORECASE,
)
REASONING = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
# keys of a turn that are a part of what it says: a template that leaves one out loses words
SAID = ("tool_calls", *REASONING, "refusal", "tools", "functions")
# keys and columns that text alone cannot keep
MEDIA = {
    f"{kind}{part}"
    for kind in ("image", "images", "img", "video", "videos", "audio", "audios")
    for part in ("", "_url", "_urls", "_path", "_paths", "_bytes")
} | {"pixel_values"}


def kind_of(value: Any) -> str:
    """Say what a value is in the words of JSON.

    >>> kind_of([]), kind_of(True), kind_of(None), kind_of("x")
    ('a list', 'true or false', 'null', 'a text')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    kinds = ((str, "a text"), ((list, tuple), "a list"), (Mapping, "a dict"))
    return next((name for kind, name in kinds if isinstance(value, kind)), type(value).__name__)


_UNSEEN = "\u00ad\u200b\u200c\u200d\u2060\ufeff"  # characters that no reader sees


def is_blank(text: str) -> bool:
    r"""Tell whether a text shows nothing.

    >>> is_blank(" \u200b\n"), is_blank("-")
    (True, False)
    """
    return all(one.isspace() or one in _UNSEEN for one in text)  # a first word is enough


def text_of(value: Any, what: str) -> str:
    """Read a text, or a list of text parts, which are joined.

    Raises:
        RowError: anything else, or a part that is no text (an image).
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple)):
        raise RowError(f"{what}: expected a text, got {kind_of(value)}")
    if not value:
        raise RowError(f"{what}: expected a text, got an empty list")
    parts = []
    for part in value:
        if not isinstance(part, Mapping) or "type" not in part:
            raise RowError(f"{what}: expected a text or text parts, got a list")
        if part["type"] != "text" or not isinstance(part.get("text"), str):
            raise RowError(
                f"{what}: a part that is no text cannot be kept", f"type {part['type']!r:.60}"
            )
        check_no_media(part, f"{what}: ")
        _check_marks(part, f"{what}: a part's", ())
        parts.append(part["text"])
    return "".join(parts)


def check_no_media(row: Row, what: str) -> None:
    """Refuse a row, a message or a part of one that has pictures and the like.

    Raises:
        RowError: naming the key.
    """
    for name, value in row.items():
        if name.lower() in MEDIA and value not in ("", [], {}, None, False):
            if not isinstance(value, list) or any(one is not None for one in value):
                raise RowError(f"{what}{name}: text alone cannot keep it")


def decoded(row: Row) -> Row:
    """Read the fields of a row that are messages written as a text of JSON.

    Raises:
        RowError: a text that begins like a list of messages, and is no JSON.
    """
    return {name: _decoded(value, name) for name, value in row.items()}


_TURN = r"\{\s*[\"'](role|from|content|value)[\"']\s*:"
_BEGINS = re.compile(rf"\s*(\[\s*)?{_TURN}")


def _decoded(value: Any, name: str) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], str):
        return [_decoded(one, name) for one in value]
    if not isinstance(value, str) or not (begins := _BEGINS.match(value)):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError) as error:
        if begins.group(1) and re.search("[\"'](role|from)[\"']", value):
            raise RowError(f"{name}: a text that begins like JSON, but is none") from error
        return value
    turns = found if isinstance(found, list) else [found]
    return found if all(is_message(one) for one in turns) else value


def is_message(value: Any) -> bool:
    """Tell whether a value is a message: somebody speaks, and says or calls something."""
    if not isinstance(value, Mapping) or not {"role", "from"} & value.keys():
        return False
    return bool({"content", "value", "tool_calls", "function_call"} & value.keys())


def messages(value: Any, what: str) -> tuple[Message, ...]:
    """Read a list of messages: ``role``/``content``, or ShareGPT's ``from``/``value``.

    Every other key is kept for the chat template, but for the marks of a turn that is not learned.
    A system message that is said twice in a row is one.

    Raises:
        RowError: not a list of such messages, or an unknown role.
    """
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise RowError(f"{what}: expected a list of messages, got {kind_of(value)}")
    found: list[Message] = []
    for one in value:
        turn = _message(one, what)
        if turn["role"] != "system" or not found or turn != found[-1]:
            found.append(turn)
    return tuple(found)


def with_roles(value: Any, roles: Mapping[str, str]) -> Any:
    """Rename the roles of all messages in a row, as ``config.data.roles`` says, in any case."""
    known = {name.strip().lower(): role for name, role in roles.items()}

    def renamed(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [renamed(one) for one in value]
        if not isinstance(value, Mapping):
            return value
        turn = {"role", "from"} & value.keys() and {"content", "value"} & value.keys()
        return {
            key: known.get(inner.strip().lower(), inner)
            if turn and key in ("role", "from") and isinstance(inner, str)
            else renamed(inner)
            for key, inner in value.items()
        }

    return renamed(value)


_PLAIN = {"role", "content"}


def _message(value: Any, what: str) -> Message:
    if not isinstance(value, Mapping) or not {"role", "from"} & value.keys():
        raise RowError(f"{what}: expected messages with role and content, got {kind_of(value)}")
    name = _role(value, what)
    if value.keys() == _PLAIN and isinstance(value["content"], str) and name not in CALLS:
        return {"role": ROLES[name], "content": value["content"]}  # most are, of millions
    check_no_media(value, f"{what}'s ")
    taken = ("role", "from", "content", "value", "function_call", *MARKS)
    found = {
        key: inner
        for key, inner in value.items()
        if key not in taken and inner is not None and inner not in ("", [], {})
    }
    found |= {key: text_of(found[key], f"{what}'s {key}") for key in REASONING if key in found}
    content = value.get(given(value, "content", "value"))
    calls = _calls(found.pop("tool_calls", None), what)
    if name in CALLS:
        calls, content = _calls(content, what, bare=True), ""
    elif value.get("function_call"):
        calls += _calls(value["function_call"], what, bare=True)
    if calls:
        found["tool_calls"] = calls
        content = "" if content in (None, []) else content
    if not learned(value, f"{what}: a turn's"):
        found["loss"] = False
    elif ROLES[name] != "assistant" and any(value.get(mark) is not None for mark in MARKS):
        found["loss"] = True  # asked for in vain, which is told when it is rendered
    return {"role": ROLES[name], "content": text_of(content, f"{what}'s content"), **found}


def _role(value: Row, what: str) -> str:
    """Read who speaks: a key of ``ROLES``."""
    role = value["role"] if "from" not in value else value.get(given(value, "role", "from"))
    if not isinstance(role, str):
        raise RowError(f"{what}: a role is unknown", f"expected a text, got {kind_of(role)}")
    name = role.strip().lower()
    if name in ROLES:
        return name
    hint = ""
    if len(role) <= 40:
        known = json.dumps({role: "assistant"})
        hint = f"; --config.data.roles={shlex.quote(known)} says what it is"
    raise RowError(f"{what}: a role is unknown", f"{role[:40]!r}{nearest(role[:40], ROLES)}{hint}")


def _calls(value: Any, what: str, *, bare: bool = False) -> list[Any]:
    """Read calls of functions, which may be a text of JSON.

    Args:
        value: one or several; None or an empty one is none.
        what: for the message.
        bare: a call is its name and arguments alone, as in ShareGPT's turns and OpenAI's old key.

    Raises:
        RowError: something else.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() or bare else None
        except (ValueError, RecursionError):
            value = 0  # refused below
    calls = value or [] if isinstance(value, (list, type(None))) else [value]
    if bare and not (calls and all(_is_named(call) for call in calls)):
        raise RowError(f"{what}: a function_call turn is no JSON with name and arguments")
    if not all(isinstance(call, Mapping) for call in calls):
        raise RowError(f"{what}: tool_calls: expected a list of dicts, or its JSON")
    if not bare:
        return calls
    named = ({"name": one["name"], "arguments": one.get("arguments", {})} for one in calls)
    return [{"type": "function", "function": call} for call in named]


def _is_named(call: Any) -> bool:
    return isinstance(call, Mapping) and isinstance(call.get("name"), str)


def no_remedy(mark: str) -> str:
    """Say nothing of how else a mark may be read."""
    return ""


def learned(marked: Row, whose: str, remedy: Callable[[str], str] = no_remedy) -> bool:
    """Tell whether the marks of a turn or a row leave it to be learned; a share is refused.

    Args:
        marked: the turn or the row.
        whose: for the message.
        remedy: a mark's name -> what ends the message that refuses it.

    Raises:
        RowError: naming the key.
    """
    _check_marks(marked, whose, MARKS, remedy)
    values = {mark: truth_of(marked[mark]) for mark in MARKS if marked.get(mark) is not None}
    for mark, is_on in values.items():
        if is_on is None:
            raise RowError(f"{whose} {mark} is neither 0 nor 1 (true, false){remedy(mark)}")
    return all(values.values())


def truth_of(value: Any) -> bool | None:
    """Read true or false, as JSON or a table's cell has it; None where it is neither.

    >>> truth_of("False"), truth_of(1.0), truth_of(0.5)
    (False, True, None)
    """
    name = str(value).strip().lower().removesuffix(".0")
    return {"true": True, "1": True, "false": False, "0": False}.get(name)


def _check_marks(
    marked: Row, whose: str, known: tuple[str, ...], remedy: Callable[[str], str] = no_remedy
) -> None:
    """Refuse keys that seem to say what is learned, and are not among the known ones.

    Raises:
        RowError: naming the key.
    """
    for name, value in marked.items():
        if value is not None and name not in known and is_marking(name):
            hint = f"is no known mark; known: {', '.join(MARKS)}{remedy(name)}"
            raise RowError(f"{whose} {name[:40]} {hint}" + ("" if known else ", of a whole turn"))


@functools.lru_cache(4096)
def is_marking(name: str) -> bool:
    """Tell whether a key seems to say what is learned."""
    return _MARKING.search(name) is not None


def given(row: Row, *names: str) -> str:
    """Return the first of these fields that the row has, filled rather than empty; the last where
    it has none.

    Raises:
        RowError: it has several, and they differ.
    """
    has = [name for name in names if row.get(name) is not None]
    has = [name for name in has if row[name] != ""] or has
    if any(row[name] != row[has[0]] for name in has[1:]):
        raise RowError(f"{' and '.join(has)} differ: two names of one thing")
    return has[0] if has else names[-1]


def user(text: str) -> tuple[Message, ...]:
    """Return one turn of a user."""
    return ({"role": "user", "content": text},)


def answer_of(turn: Message) -> str | tuple[Message, ...]:
    """Return an answer of one turn: its text, where it is the assistant's and nothing else."""
    plain = turn["role"] == "assistant" and turn.keys() == {"role", "content"}
    return turn["content"] if plain else (turn,)
