# SPDX-License-Identifier: Apache-2.0
"""From the rows people publish to Examples: one small function a format, found by its fields or named.

A function takes a row and whether the tokenizer has a chat template.  Formats without explicit messages (transcripts,
instruction/output, question/answer) make messages where there is a template, and otherwise the plain text that people
used before templates; rows of explicit messages need a template.
"""
from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from align_jax.core.schema import Example, Message
from align_jax.data import transcripts
from align_jax.data.transcripts import Unusable

Row = Mapping[str, Any]
ROLES = {"system": "system", "user": "user", "human": "user", "prompter": "user", "assistant": "assistant",
         "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant", "tool": "tool",
         "observation": "tool", "function": "tool"}


@dataclasses.dataclass(frozen=True)
class Format:
    """One way of writing preferences down.

    Attributes:
        kind: what a row gives: ``completions``, ``pairs``, ``ranked``, ``unpaired``, ``scored`` (one response with a
            number) or ``prompts``.
        fields: a row that has all of these is taken for this format, unless an earlier one matches; an alternative is
            written ``a|b``, a value ``type=sample``.
        read: (row, has a chat template) -> examples.
        flawed: public data of this kind is known to hold a few unusable rows; they are dropped and counted instead of
            refused.
    """

    kind: str
    fields: tuple[str, ...]
    read: Callable[[Row, bool], Sequence[Example]]
    flawed: bool = False

    def matches(self, row: Row) -> bool:
        """Tell whether the row has this format's fields."""
        return all(any(_has(row, name) for name in field.split("|")) for field in self.fields)


def _has(row: Row, name: str) -> bool:
    name, _, value = name.partition("=")
    return row.get(name) is not None and (not value or row[name] == value)


def detect(row: Row) -> str:
    """Return the name of the first format in the table whose fields the row has.

    Raises:
        ValueError: none; the row's fields and the known formats' are listed.
    """
    for name, form in FORMATS.items():
        if form.matches(row):
            return name
    known = "; ".join(f"{name}: {', '.join(form.fields)}" for name, form in FORMATS.items())
    raise ValueError(f"no known format has only the fields {sorted(row)}; rename them by data.columns, "
                     f"or use one of {known}")


def read(row: Row, name: str, *, chat: bool) -> list[Example]:
    """Read a row's examples.

    Args:
        row: the row, columns already renamed.
        name: a key of ``FORMATS``.
        chat: whether the tokenizer has a chat template.

    Raises:
        KeyError: an unknown format.
        ValueError: a needed field is missing.
        Unusable: a response is empty, or the row contradicts itself.
    """
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        raise KeyError(f"unknown data format {name!r}" + (f" (did you mean {near[0]!r}?)" if near else "")
                       + f"; known: {sorted(FORMATS)}")
    form = FORMATS[name]
    missing = [field for field in form.fields if not any(_has(row, part) for part in field.split("|"))]
    if missing:
        raise ValueError(f"format {name!r} needs {', '.join(form.fields)}; the row has no {', '.join(missing)}, "
                         f"only {sorted(row)}; name the columns by data.columns")
    examples = list(form.read(row, chat))
    for example in examples:
        for response in example.responses:
            texts = [response] if isinstance(response, str) else [
                message["content"] for message in response if message["role"] == "assistant"]
            if not texts or not all(text.strip() for text in texts):
                raise Unusable("empty response")
        if isinstance(example.prompt, tuple) and not example.prompt:
            raise Unusable("empty prompt")
    return examples


def messages(value: Any, what: str) -> tuple[Message, ...]:
    """Read a list of messages: ``role``/``content``, or ShareGPT's ``from``/``value``.

    Raises:
        Unusable: not a list of such messages, or an unknown role.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = json.loads(value)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise Unusable(f"{what}: expected a list of messages, got {type(value).__name__}")
    found = []
    for message in value:
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if role not in ROLES or not isinstance(content, str):
            raise Unusable(f"{what}: expected messages with a known role and a text, got {dict(message)!r:.200}")
        found.append({"role": ROLES[role], "content": content})
    return tuple(found)


def _system(row: Row) -> tuple[Message, ...]:
    text = row.get("system") or row.get("system_prompt")
    return ({"role": "system", "content": text},) if text else ()


def _extras(row: Row, *used: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in used}


def _number(row: Row, name: str, default: float) -> float:
    value = row.get(name)
    return default if value is None else float(value)


def _about(row: Row, *used: str) -> dict[str, Any]:
    return {"margin": _number(row, "margin", 0.0), "weight": _number(row, "weight", 1.0),
            "extras": _extras(row, *used, "margin", "weight")}


def _prompt(row: Row, name: str = "prompt") -> tuple[Message, ...] | str:
    value = row[name]
    if isinstance(value, str):
        if _system(row):
            return _system(row) + ({"role": "user", "content": value},)
        return value
    return _system(row) + messages(value, name)


def _response(value: Any, prompt: tuple[Message, ...] | str, what: str) -> str | tuple[Message, ...]:
    """Read a response to a prompt; messages that repeat the prompt lose it; one assistant turn becomes text."""
    if isinstance(value, str):
        return value
    turns = messages(value, what)
    if isinstance(prompt, tuple) and turns[:len(prompt)] == prompt:
        turns = turns[len(prompt):]
    elif turns and turns[0]["role"] != "assistant":
        first = next((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), len(turns))
        turns = turns[first:]
    return turns[0]["content"] if len(turns) == 1 and turns[0]["role"] == "assistant" else turns


def _pair_scores(row: Row) -> tuple[float, float] | None:
    for chosen, rejected in (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"),
                             ("chosen_rating", "rejected_rating")):
        if row.get(chosen) is not None and row.get(rejected) is not None:
            return float(row[chosen]), float(row[rejected])
    return None


def _pairs(row: Row, chat: bool) -> list[Example]:
    prompt = _prompt(row)
    if isinstance(prompt, str) and not isinstance(row["chosen"], str):
        # UltraFeedback's way: a prompt as text beside whole conversations that repeat it
        return _implicit({**row, "prompt": None}, chat)
    responses = tuple(_response(row[side], prompt, side) for side in ("chosen", "rejected"))
    return [Example(prompt, responses, scores=_pair_scores(row), **_about(row, "prompt", "chosen", "rejected"))]


def _implicit(row: Row, chat: bool) -> list[Example]:
    about = {"scores": _pair_scores(row), **_about(row, "chosen", "rejected")}
    if isinstance(row["chosen"], str):
        prompt, responses = transcripts.split_pair(row["chosen"], row["rejected"], chat=chat)
        return [Example(prompt, responses, **about)]
    prompt, *rests = transcripts.split_messages(messages(row["chosen"], "chosen"),
                                                messages(row["rejected"], "rejected"))
    return [Example(_system(row) + prompt, tuple(_response(rest, (), "response") for rest in rests), **about)]


def _conversation(row: Row, name: str) -> tuple[tuple[Message, ...], str | tuple[Message, ...]]:
    turns = _system(row) + messages(row[name], name)
    first = next((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), None)
    if first is None:
        return turns, ()
    return turns[:first], _response(turns[first:], (), name)


def _messages(row: Row, chat: bool) -> list[Example]:
    prompt, response = _conversation(row, "messages")
    return [Example(prompt, (response,) if response else (), **_about(row, "messages"))]


def _messages_label(row: Row, chat: bool) -> list[Example]:
    # feedback is about the last answer; the turns before it are context
    turns = _system(row) + messages(row["messages"], "messages")
    if not turns or turns[-1]["role"] != "assistant":
        raise Unusable("the labelled conversation does not end with the assistant")
    return [Example(turns[:-1], (turns[-1]["content"],), label=_label(row["label"]),
                    **_about(row, "messages", "label"))]


def _label(value: Any) -> bool:
    words = {"true": True, "1": True, "desirable": True, "chosen": True, "false": False, "0": False, "-1": False,
             "undesirable": False, "rejected": False}
    name = str(value).strip().lower().removesuffix(".0")
    if name not in words:
        raise Unusable(f"label: expected true or false, got {value!r}")
    return words[name]


def _unpaired(row: Row, chat: bool) -> list[Example]:
    prompt = _prompt(row)
    name = "completion" if row.get("completion") is not None else "response"
    return [Example(prompt, (_response(row[name], prompt, name),), label=_label(row["label"]),
                    **_about(row, "prompt", name, "label"))]


def _completion(row: Row, chat: bool) -> list[Example]:
    prompt = _prompt(row)
    name = "completion" if row.get("completion") is not None else "response"
    return [Example(prompt, (_response(row[name], prompt, name),), **_about(row, "prompt", name))]


def _only_prompt(row: Row, chat: bool) -> list[Example]:
    return [Example(_prompt(row), (), **_about(row, "prompt"))]


def _text(row: Row, chat: bool) -> list[Example]:
    return [Example("", (row["text"],), **_about(row, "text"))]


def _alpaca_prompt(row: Row, chat: bool) -> tuple[Message, ...] | str:
    extra = row.get("input") or ""
    if chat:
        content = f"{row['instruction']}\n\n{extra}" if extra else row["instruction"]
        return _system(row) + ({"role": "user", "content": content},)
    lead = "Below is an instruction that describes a task" + (
        ", paired with an input that provides further context. " if extra else ". ")
    lead += "Write a response that appropriately completes the request.\n\n"
    return (lead + f"### Instruction:\n{row['instruction']}\n\n" + (f"### Input:\n{extra}\n\n" if extra else "")
            + "### Response:\n")


def _alpaca_pairs(row: Row, chat: bool) -> list[Example]:
    return [Example(_alpaca_prompt(row, chat), (row["chosen"], row["rejected"]), scores=_pair_scores(row),
                    **_about(row, "chosen", "rejected"))]


def _alpaca(row: Row, chat: bool) -> list[Example]:
    return [Example(_alpaca_prompt(row, chat), (row["output"],), **_about(row, "output"))]


def _question_prompt(row: Row, chat: bool) -> tuple[Message, ...] | str:
    if chat:
        return _system(row) + ({"role": "user", "content": row["question"]},)
    lead = "".join(f"{message['content']}\n\n" for message in _system(row))
    return f"{lead}Question: {row['question']}\nAnswer:"


def _answered(row: Row, chat: bool, names: Sequence[str], **known: Any) -> list[Example]:
    lead = "" if chat else " "
    texts = [text for name in names for text in ([row[name]] if isinstance(row[name], str) else row[name])]
    responses = tuple(lead + text for text in texts)
    return [Example(_question_prompt(row, chat), responses, **known, **_about(row, "question"))]


def _question_pairs(row: Row, chat: bool) -> list[Example]:
    return _answered(row, chat, ("chosen", "rejected"), scores=_pair_scores(row))


def _question_ranked(row: Row, chat: bool) -> list[Example]:
    return [order(example, row) for example in _answered(row, chat, ("responses",))]


def _question(row: Row, chat: bool) -> list[Example]:
    return _answered(row, chat, ("response" if row.get("response") is not None else "answer",))


def _question_label(row: Row, chat: bool) -> list[Example]:
    return _answered(row, chat, ("response" if row.get("response") is not None else "answer",),
                     label=_label(row["label"]))


def order(example: Example, row: Row) -> Example:
    """Order an example's responses from best to worst by the row's ``ranks`` (0 is best) or ``scores``."""
    values = row["scores"] if row.get("scores") is not None else [-float(rank) for rank in row["ranks"]]
    if len(values) != len(example.responses):
        raise Unusable(f"{len(example.responses)} responses, but {len(values)} ranks or scores")
    best_first = sorted(range(len(values)), key=lambda i: -float(values[i]))
    scores = tuple(float(values[i]) for i in best_first) if row.get("scores") is not None else None
    return dataclasses.replace(example, responses=tuple(example.responses[i] for i in best_first), scores=scores)


def _ranked(row: Row, chat: bool) -> list[Example]:
    prompt = _prompt(row)
    responses = tuple(_response(value, prompt, "responses") for value in row["responses"])
    return [order(Example(prompt, responses, **_about(row, "prompt", "responses", "ranks", "scores")), row)]


FORMATS: Mapping[str, Format] = {
    "ranked": Format("ranked", ("prompt", "responses", "ranks|scores"), _ranked),
    "question_ranked": Format("ranked", ("question", "responses", "ranks|scores"), _question_ranked),
    "pairs": Format("pairs", ("prompt", "chosen", "rejected"), _pairs),
    "alpaca_pairs": Format("pairs", ("instruction", "chosen", "rejected"), _alpaca_pairs),
    "question_pairs": Format("pairs", ("question", "chosen", "rejected"), _question_pairs),
    "implicit_pairs": Format("pairs", ("chosen", "rejected"), _implicit, flawed=True),
    "messages_label": Format("unpaired", ("messages", "label"), _messages_label),
    "unpaired": Format("unpaired", ("prompt", "completion|response", "label"), _unpaired),
    "question_label": Format("unpaired", ("question", "response|answer", "label"), _question_label),
    "messages": Format("completions", ("messages",), _messages),
    "completion": Format("completions", ("prompt", "completion|response"), _completion),
    "alpaca": Format("completions", ("instruction", "output"), _alpaca),
    "question": Format("completions", ("question", "response|answer"), _question),
    "text": Format("completions", ("text",), _text),
    "prompt": Format("prompts", ("prompt",), _only_prompt),
}
