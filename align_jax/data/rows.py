# SPDX-License-Identifier: Apache-2.0
"""Readers of rows whose fields say what they are: prompt, chosen, rejected, completion, messages,
question ...

Each takes a row and whether the tokenizer has a chat template, and returns Examples; ``formats``
has the table.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from align_jax.core.schema import Example, Message
from align_jax.data import transcripts
from align_jax.data.transcripts import RowError

Row = Mapping[str, Any]
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}


def messages(value: Any, what: str) -> tuple[Message, ...]:
    """Read a list of messages: ``role``/``content``, or ShareGPT's ``from``/``value``.

    Raises:
        RowError: not a list of such messages, or an unknown role.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = json.loads(value)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise RowError(f"{what}: expected a list of messages, got {type(value).__name__}")
    found = []
    for message in value:
        role, content = (
            message.get("role", message.get("from")),
            message.get("content", message.get("value")),
        )
        if role not in ROLES or not isinstance(content, str):
            raise RowError(
                f"{what}: expected messages with a known role and a text, got "
                f"{dict(message)!r:.200}"
            )
        found.append({"role": ROLES[role], "content": content})
    return tuple(found)


def system_of(row: Row) -> tuple[Message, ...]:
    """Read the row's system message, if it has one."""
    text = row.get("system") or row.get("system_prompt")
    return ({"role": "system", "content": text},) if text else ()


def _extras(row: Row, *used: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in used}


def _number(row: Row, name: str, default: float) -> float:
    value = row.get(name)
    return default if value is None else float(value)


def about(row: Row, *used: str) -> dict[str, Any]:
    """Read margin and weight, and keep the columns that are not ``used``."""
    return {
        "margin": _number(row, "margin", 0.0),
        "weight": _number(row, "weight", 1.0),
        "extras": _extras(row, *used, "margin", "weight"),
    }


def prompt_of(row: Row, name: str = "prompt") -> tuple[Message, ...] | str:
    """Read a prompt: text, or messages where it is given as such or there is a system message."""
    value = row[name]
    if isinstance(value, str):
        if system_of(row):
            return system_of(row) + ({"role": "user", "content": value},)
        return value
    return system_of(row) + messages(value, name)


def response_of(
    value: Any, prompt: tuple[Message, ...] | str, what: str
) -> str | tuple[Message, ...]:
    """Read a response; messages that repeat the prompt lose it; one assistant turn becomes text."""
    if isinstance(value, str):
        return value
    turns = messages(value, what)
    if isinstance(prompt, tuple) and turns[: len(prompt)] == prompt:
        turns = turns[len(prompt) :]
    elif turns and turns[0]["role"] != "assistant":
        first = next((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), len(turns))
        turns = turns[first:]
    return turns[0]["content"] if len(turns) == 1 and turns[0]["role"] == "assistant" else turns


def pair_scores(row: Row) -> tuple[float, float] | None:
    """Read the scores of chosen and rejected, under any of the names in use; None where there are
    none."""
    # SimPO's on-policy data: chosen has the highest score, rejected the lowest
    if row.get("all_rm_scores"):
        return float(max(row["all_rm_scores"])), float(min(row["all_rm_scores"]))
    for chosen, rejected in (
        ("score_chosen", "score_rejected"),
        ("chosen_score", "rejected_score"),
        ("chosen_rating", "rejected_rating"),
    ):
        if row.get(chosen) is not None and row.get(rejected) is not None:
            return float(row[chosen]), float(row[rejected])
    return None


def read_pairs(row: Row, chat: bool) -> list[Example]:
    """Read prompt, chosen, rejected: texts or messages; whole conversations may repeat the
    prompt."""
    name = "prompt" if row.get("prompt") is not None else "conversations"
    prompt = prompt_of(row, name)
    if isinstance(prompt, str) and not isinstance(row["chosen"], str):
        # UltraFeedback's way: a prompt as text beside whole conversations that repeat it
        return read_implicit({**row, "prompt": None}, chat)
    responses = tuple(response_of(row[side], prompt, side) for side in ("chosen", "rejected"))
    return [
        Example(
            prompt, responses, scores=pair_scores(row), **about(row, name, "chosen", "rejected")
        )
    ]


def read_implicit(row: Row, chat: bool) -> list[Example]:
    """Read chosen, rejected: two conversations (texts, transcripts or messages) that begin
    alike."""
    known = {"scores": pair_scores(row), **about(row, "chosen", "rejected")}
    if isinstance(row["chosen"], str):
        prompt, responses = transcripts.split_pair(row["chosen"], row["rejected"], chat=chat)
        return [Example(prompt, responses, **known)]
    prompt, *rests = transcripts.split_messages(
        messages(row["chosen"], "chosen"), messages(row["rejected"], "rejected")
    )
    return [
        Example(
            system_of(row) + prompt,
            tuple(response_of(rest, (), "response") for rest in rests),
            **known,
        )
    ]


def read_conversation_completion(row: Row, chat: bool) -> list[Example]:
    """Read messages: the assistant's turns, from the first on, are the completion."""
    name = "messages" if row.get("messages") is not None else "conversations"
    turns = system_of(row) + messages(row[name], name)
    first = next((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), None)
    if first is None:
        raise RowError("no turn of the assistant")
    return [Example(turns[:first], (response_of(turns[first:], (), name),), **about(row, name))]


def read_conversation_label(row: Row, chat: bool) -> list[Example]:
    """Read messages, label: feedback on the last answer; the turns before it are context."""
    name = "messages" if row.get("messages") is not None else "conversations"
    given = "label" if row.get("label") is not None else "kto_tag"
    turns = system_of(row) + messages(row[name], name)
    if not turns or turns[-1]["role"] != "assistant":
        raise RowError("the labeled conversation does not end with the assistant")
    return [
        Example(
            turns[:-1],
            (turns[-1]["content"],),
            label=label_of(row[given]),
            **about(row, name, given),
        )
    ]


def label_of(value: Any) -> bool:
    """Read a label: true/false, 1/0, 1/-1, or desirable/undesirable."""
    words = {
        "true": True,
        "1": True,
        "desirable": True,
        "chosen": True,
        "false": False,
        "0": False,
        "-1": False,
        "undesirable": False,
        "rejected": False,
    }
    name = str(value).strip().lower().removesuffix(".0")
    if name not in words:
        raise RowError(f"label: expected true or false, got {value!r}")
    return words[name]


def read_unpaired(row: Row, chat: bool) -> list[Example]:
    """Read prompt, completion, label."""
    prompt = prompt_of(row)
    name = "completion" if row.get("completion") is not None else "response"
    return [
        Example(
            prompt,
            (response_of(row[name], prompt, name),),
            label=label_of(row["label"]),
            **about(row, "prompt", name, "label"),
        )
    ]


def read_completion(row: Row, chat: bool) -> list[Example]:
    """Read prompt, completion."""
    prompt = prompt_of(row)
    name = "completion" if row.get("completion") is not None else "response"
    return [Example(prompt, (response_of(row[name], prompt, name),), **about(row, "prompt", name))]


def read_only_prompt(row: Row, chat: bool) -> list[Example]:
    """Read prompt, and nothing else that is known."""
    return [Example(prompt_of(row), (), **about(row, "prompt"))]


def read_text(row: Row, chat: bool) -> list[Example]:
    """Read text: all of it is learned."""
    return [Example("", (row["text"],), **about(row, "text"))]


def _alpaca_prompt(row: Row, chat: bool) -> tuple[Message, ...] | str:
    extra = row.get("input") or ""
    if chat:
        content = f"{row['instruction']}\n\n{extra}" if extra else row["instruction"]
        return system_of(row) + ({"role": "user", "content": content},)
    lead = "Below is an instruction that describes a task" + (
        ", paired with an input that provides further context. " if extra else ". "
    )
    lead += "Write a response that appropriately completes the request.\n\n"
    return (
        lead
        + f"### Instruction:\n{row['instruction']}\n\n"
        + (f"### Input:\n{extra}\n\n" if extra else "")
        + "### Response:\n"
    )


def read_alpaca_pairs(row: Row, chat: bool) -> list[Example]:
    """Read instruction, input, chosen, rejected."""
    return [
        Example(
            _alpaca_prompt(row, chat),
            (row["chosen"], row["rejected"]),
            scores=pair_scores(row),
            **about(row, "chosen", "rejected"),
        )
    ]


def read_alpaca(row: Row, chat: bool) -> list[Example]:
    """Read instruction, input, output."""
    return [Example(_alpaca_prompt(row, chat), (row["output"],), **about(row, "output"))]


def _question_prompt(row: Row, chat: bool) -> tuple[Message, ...] | str:
    if chat:
        return system_of(row) + ({"role": "user", "content": row["question"]},)
    lead = "".join(f"{message['content']}\n\n" for message in system_of(row))
    return f"{lead}Question: {row['question']}\nAnswer:"


def _answered(row: Row, chat: bool, names: Sequence[str], **known: Any) -> list[Example]:
    lead = "" if chat else " "
    texts = [
        text
        for name in names
        for text in ([row[name]] if isinstance(row[name], str) else row[name])
    ]
    responses = tuple(lead + text for text in texts)
    return [
        Example(
            _question_prompt(row, chat),
            responses,
            **known,
            **about(row, "question", "chosen", "rejected", "responses", "response"),
        )
    ]


def read_question_pairs(row: Row, chat: bool) -> list[Example]:
    """Read question, chosen, rejected."""
    return _answered(row, chat, ("chosen", "rejected"), scores=pair_scores(row))


def read_question_ranked(row: Row, chat: bool) -> list[Example]:
    """Read question, responses, ranks or scores."""
    return [order(example, row) for example in _answered(row, chat, ("responses",))]


def read_question(row: Row, chat: bool) -> list[Example]:
    """Read question, answer."""
    return _answered(row, chat, ("response" if row.get("response") is not None else "answer",))


def read_question_label(row: Row, chat: bool) -> list[Example]:
    """Read question, response, label."""
    return _answered(
        row,
        chat,
        ("response" if row.get("response") is not None else "answer",),
        label=label_of(row["label"]),
    )


def order(example: Example, row: Row) -> Example:
    """Order an example's responses from best to worst by the row's ``ranks`` (0 is best) or
    ``scores``."""
    values = (
        row["scores"] if row.get("scores") is not None else [-float(rank) for rank in row["ranks"]]
    )
    if len(values) != len(example.responses):
        raise RowError(f"{len(example.responses)} responses, but {len(values)} ranks or scores")
    best_first = sorted(range(len(values)), key=lambda i: -float(values[i]))
    scores = tuple(float(values[i]) for i in best_first) if row.get("scores") is not None else None
    return dataclasses.replace(
        example, responses=tuple(example.responses[i] for i in best_first), scores=scores
    )


def read_ranked(row: Row, chat: bool) -> list[Example]:
    """Read prompt, responses, ranks or scores."""
    prompt = prompt_of(row)
    responses = tuple(response_of(value, prompt, "responses") for value in row["responses"])
    return [
        order(
            Example(prompt, responses, **about(row, "prompt", "responses", "ranks", "scores")), row
        )
    ]
