# SPDX-License-Identifier: Apache-2.0
"""Readers of rows whose fields say what they are: prompt, chosen, completion, question ...

Each takes a row and whether the tokenizer has a chat template; ``formats`` has the table.
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
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if role not in ROLES or not isinstance(content, str):
            raise RowError(
                f"{what}: expected messages with a known role and a text, got "
                f"{dict(message)!r:.200}"
            )
        found.append({"role": ROLES[role], "content": content})
    return tuple(found)


def given(row: Row, *names: str) -> str:
    """Return the first of these fields that the row has; the last where it has none."""
    return next((name for name in names if row.get(name) is not None), names[-1])


def system_of(row: Row) -> tuple[Message, ...]:
    """Read the row's system message, if it has one."""
    text = row.get("system") or row.get("system_prompt")
    return ({"role": "system", "content": text},) if text else ()


def user(text: str) -> tuple[Message, ...]:
    """Return one turn of a user."""
    return ({"role": "user", "content": text},)


def about(row: Row, *used: str) -> dict[str, Any]:
    """Read margin and weight, and keep the columns that are not ``used``."""
    margin, weight = row.get("margin"), row.get("weight")
    used = (*used, "margin", "weight")
    return {
        "margin": 0.0 if margin is None else float(margin),
        "weight": 1.0 if weight is None else float(weight),
        "extras": {key: value for key, value in row.items() if key not in used},
    }


def prompt_of(row: Row, name: str = "prompt") -> tuple[Message, ...] | str:
    """Read a prompt: text, or messages where it is given as such or there is a system message."""
    value, system = row[name], system_of(row)
    if isinstance(value, str):
        return system + user(value) if system else value
    return system + messages(value, name)


def first_answer(turns: Sequence[Message]) -> int:
    """Return where the assistant speaks first; the number of turns where it does not."""
    return next((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), len(turns))


def response_of(
    value: Any, prompt: tuple[Message, ...] | str, what: str
) -> str | tuple[Message, ...]:
    """Read a response; messages that repeat the prompt lose it; one assistant turn becomes text."""
    if isinstance(value, str):
        return value
    turns = messages(value, what)
    if isinstance(prompt, tuple) and turns[: len(prompt)] == prompt:
        turns = turns[len(prompt) :]
    else:
        turns = turns[first_answer(turns) :]
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


def label_of(value: Any) -> bool:
    """Read a label: true/false, 1/0, 1/-1, or desirable/undesirable."""
    name = str(value).strip().lower().removesuffix(".0")
    if name in ("true", "1", "desirable", "chosen"):
        return True
    if name in ("false", "0", "-1", "undesirable", "rejected"):
        return False
    raise RowError(f"label: expected true or false, got {value!r}")


def order(example: Example, row: Row) -> Example:
    """Order an example's responses from best to worst by the row's ``ranks`` (0 is best) or
    ``scores``."""
    given_scores = row.get("scores") is not None
    values = row["scores"] if given_scores else [-float(rank) for rank in row["ranks"]]
    if len(values) != len(example.responses):
        raise RowError(f"{len(example.responses)} responses, but {len(values)} ranks or scores")
    best_first = sorted(range(len(values)), key=lambda i: -float(values[i]))
    return dataclasses.replace(
        example,
        responses=tuple(example.responses[i] for i in best_first),
        scores=tuple(float(values[i]) for i in best_first) if given_scores else None,
    )


def read_pairs(row: Row, chat: bool) -> Example:
    """Read prompt, chosen, rejected: texts or messages; whole conversations may repeat the
    prompt."""
    name = given(row, "prompt", "conversations")
    prompt = prompt_of(row, name)
    if isinstance(prompt, str) and not isinstance(row["chosen"], str):
        # UltraFeedback's way: a prompt as text beside whole conversations that repeat it
        return read_implicit({**row, "prompt": None}, chat)
    responses = tuple(response_of(row[side], prompt, side) for side in ("chosen", "rejected"))
    known = about(row, name, "chosen", "rejected")
    return Example(prompt, responses, scores=pair_scores(row), **known)


def read_implicit(row: Row, chat: bool) -> Example:
    """Read chosen, rejected: two conversations (texts, transcripts or messages) that begin
    alike."""
    known = {"scores": pair_scores(row), **about(row, "chosen", "rejected")}
    if isinstance(row["chosen"], str):
        return Example(*transcripts.split_pair(row["chosen"], row["rejected"], chat=chat), **known)
    prompt, *rests = transcripts.split_messages(
        messages(row["chosen"], "chosen"), messages(row["rejected"], "rejected")
    )
    responses = tuple(response_of(rest, (), "response") for rest in rests)
    return Example(system_of(row) + prompt, responses, **known)


def read_conversation_completion(row: Row, chat: bool) -> Example:
    """Read messages: the assistant's turns, from the first on, are the completion."""
    name = given(row, "messages", "conversations")
    turns = system_of(row) + messages(row[name], name)
    first = first_answer(turns)
    if first == len(turns):
        raise RowError("no turn of the assistant")
    return Example(turns[:first], (response_of(turns[first:], (), name),), **about(row, name))


def read_conversation_label(row: Row, chat: bool) -> Example:
    """Read messages, label: feedback on the last answer; the turns before it are context."""
    name, label = given(row, "messages", "conversations"), given(row, "label", "kto_tag")
    turns = system_of(row) + messages(row[name], name)
    if not turns or turns[-1]["role"] != "assistant":
        raise RowError("the labeled conversation does not end with the assistant")
    known = about(row, name, label)
    return Example(turns[:-1], (turns[-1]["content"],), label=label_of(row[label]), **known)


def read_completion(row: Row, chat: bool) -> Example:
    """Read prompt, completion."""
    prompt, name = prompt_of(row), given(row, "completion", "response")
    return Example(prompt, (response_of(row[name], prompt, name),), **about(row, "prompt", name))


def read_unpaired(row: Row, chat: bool) -> Example:
    """Read prompt, completion, label."""
    prompt, name = prompt_of(row), given(row, "completion", "response")
    known = about(row, "prompt", name, "label")
    response = response_of(row[name], prompt, name)
    return Example(prompt, (response,), label=label_of(row["label"]), **known)


def read_ranked(row: Row, chat: bool) -> Example:
    """Read prompt, responses, ranks or scores."""
    prompt = prompt_of(row)
    responses = tuple(response_of(value, prompt, "responses") for value in row["responses"])
    known = about(row, "prompt", "responses", "ranks", "scores")
    return order(Example(prompt, responses, **known), row)


def read_only_prompt(row: Row, chat: bool) -> Example:
    """Read prompt, and nothing else that is known."""
    return Example(prompt_of(row), (), **about(row, "prompt"))


def read_text(row: Row, chat: bool) -> Example:
    """Read text: all of it is learned."""
    return Example("", (row["text"],), **about(row, "text"))


def _alpaca_prompt(row: Row, chat: bool) -> tuple[Message, ...] | str:
    instruction, extra = row["instruction"], row.get("input") or ""
    if chat:
        return system_of(row) + user(f"{instruction}\n\n{extra}" if extra else instruction)
    lead = "Below is an instruction that describes a task"
    lead += ", paired with an input that provides further context. " if extra else ". "
    lead += "Write a response that appropriately completes the request.\n\n"
    given_input = f"### Input:\n{extra}\n\n" if extra else ""
    return f"{lead}### Instruction:\n{instruction}\n\n{given_input}### Response:\n"


def read_alpaca_pairs(row: Row, chat: bool) -> Example:
    """Read instruction, input, chosen, rejected."""
    responses, known = (row["chosen"], row["rejected"]), about(row, "chosen", "rejected")
    return Example(_alpaca_prompt(row, chat), responses, scores=pair_scores(row), **known)


def read_alpaca(row: Row, chat: bool) -> Example:
    """Read instruction, input, output."""
    return Example(_alpaca_prompt(row, chat), (row["output"],), **about(row, "output"))


def _answered(row: Row, chat: bool, *names: str, **known: Any) -> Example:
    """Read a question and the answers in these fields, a text or several in each."""
    answers: list[str] = []
    for name in names:
        answers += [row[name]] if isinstance(row[name], str) else row[name]
    known |= about(row, "question", "chosen", "rejected", "responses", "response")
    system = system_of(row)
    if chat:
        return Example(system + user(row["question"]), tuple(answers), **known)
    lead = "".join(f"{message['content']}\n\n" for message in system)
    prompt = f"{lead}Question: {row['question']}\nAnswer:"
    return Example(prompt, tuple(f" {answer}" for answer in answers), **known)


def read_question_pairs(row: Row, chat: bool) -> Example:
    """Read question, chosen, rejected."""
    return _answered(row, chat, "chosen", "rejected", scores=pair_scores(row))


def read_question_ranked(row: Row, chat: bool) -> Example:
    """Read question, responses, ranks or scores."""
    return order(_answered(row, chat, "responses"), row)


def read_question(row: Row, chat: bool) -> Example:
    """Read question, answer."""
    return _answered(row, chat, given(row, "response", "answer"))


def read_question_label(row: Row, chat: bool) -> Example:
    """Read question, response, label."""
    return _answered(row, chat, given(row, "response", "answer"), label=label_of(row["label"]))
