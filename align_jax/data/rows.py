# SPDX-License-Identifier: Apache-2.0
"""Readers of rows whose fields say what they are: prompt, chosen, completion, question ...

Each takes a row and whether the tokenizer has a chat template; ``formats`` has the table.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from align_jax.core.choose import nearest
from align_jax.core.fields import is_number
from align_jax.core.schema import Example, Message
from align_jax.data import transcripts
from align_jax.data.transcripts import RowError

Row = Mapping[str, Any]
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
MARKS = ("weight", "train", "trainable", "loss")  # on a turn: 0 or false, and it is not learned
TEMPLATE = ("tools", "documents", "chat_template_kwargs", "enable_thinking")  # columns it is given
# what rendering itself says to a chat template
RENDERED = {
    "messages",
    "conversation",
    "add_generation_prompt",
    "header",
    "source",
    "tokenize",
    "chat_template",
    "tokenizer",
    "continue_final_message",
    "return_dict",
    "padding",
    "return_tensors",
    "return_assistant_tokens_mask",
    "truncation",
    "max_length",
    "tokenizer_kwargs",
}
UNREADABLE = ("images", "image", "videos", "audios")  # columns that text alone cannot keep


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


def fields_of(row: Collection[str]) -> str:
    """Return the names of a row's fields for a message, without what makes it endless."""
    names = [f"{name:.40}" for name in sorted(row)]
    more = f" and {len(names) - 40} more" if len(names) > 40 else ""
    return f"{names[:40]}{more}"


def text_of(value: Any, what: str) -> str:
    """Read a text, or a list of text parts, which are joined.

    Raises:
        RowError: anything else, or a part that is no text (an image).
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple)):
        raise RowError(f"{what}: expected a text, got {kind_of(value)}")
    parts = []
    for part in value:
        if not isinstance(part, Mapping) or "type" not in part:
            raise RowError(f"{what}: expected a text or text parts, got a list")
        if part["type"] != "text" or not isinstance(part.get("text"), str):
            raise RowError(
                f"{what}: a part that is no text cannot be kept", f"type {part['type']!r:.60}"
            )
        parts.append(part["text"])
    return "".join(parts)


def number_of(value: Any, what: str, *, low: float | int = -math.inf) -> float:
    """Read a finite number of single precision, as batches hold it.

    Raises:
        RowError: no number, NaN, infinite or above 3e38, or below ``low``.
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= LARGEST or number < low:
        least = f" of at least {low:g}" if low > -math.inf else ""
        got = f"{value!r:.40}" if isinstance(value, (int, float)) else kind_of(value)
        raise RowError(f"{what}: expected a finite number{least}", f"got {got}")
    return number


LARGEST = 3e38  # training keeps numbers in float32


def choice_of(row: Row, name: str) -> int:
    """Read which of two answers is meant: 0 or 1.

    Raises:
        RowError: neither.
    """
    choice = number_of(row[name], name)
    if choice not in (0, 1):
        raise RowError(f"{name}: expected 0 or 1", f"got {choice:g}")
    return int(choice)


def messages(value: Any, what: str) -> tuple[Message, ...]:
    """Read a list of messages: ``role``/``content``, or ShareGPT's ``from``/``value``.

    Every other key is kept for the chat template, but for the marks of a turn that is not learned.

    Raises:
        RowError: not a list of such messages, or an unknown role.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(f"{what}: a text that begins like JSON, but is none") from error
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise RowError(f"{what}: expected a list of messages, got {kind_of(value)}")
    return tuple(_message(one, what) for one in value)


def with_roles(value: Any, roles: Mapping[str, str]) -> Any:
    """Rename the roles of all messages in a row, as ``config.data.roles`` says."""
    if isinstance(value, (list, tuple)):
        return [with_roles(one, roles) for one in value]
    if not isinstance(value, Mapping):
        return value
    turn = {"role", "from"} & value.keys() and {"content", "value"} & value.keys()
    return {
        key: roles.get(inner, inner)
        if turn and key in ("role", "from") and isinstance(inner, str)
        else with_roles(inner, roles)
        for key, inner in value.items()
    }


def _message(value: Any, what: str) -> Message:
    if not isinstance(value, Mapping) or not {"role", "from"} & value.keys():
        raise RowError(f"{what}: expected messages with role and content, got {kind_of(value)}")
    role = value.get(given(value, "role", "from"))
    name = role.lower() if isinstance(role, str) else ""
    if name not in ROLES:
        short = str(role)[:40]
        hint = f"--config.data.roles='{json.dumps({short: 'assistant'})}' says what it is"
        raise RowError(f"{what}: a role is unknown", f"{short!r}{nearest(short, ROLES)}; {hint}")
    taken = ("role", "from", "content", "value", *MARKS)
    found = {
        key: inner
        for key, inner in value.items()
        if key not in taken and inner is not None and inner not in ("", [], {})
    }
    content = value.get(given(value, "content", "value"))
    if name == "function_call":
        found, content = {"tool_calls": [_function_call(content, what)]}, ""
    if content is None and found.get("tool_calls"):
        content = ""
    if not _learned(value, what):
        found["loss"] = False
    return {"role": ROLES[name], "content": text_of(content, f"{what}'s content"), **found}


def _function_call(content: Any, what: str) -> dict[str, Any]:
    """Read ShareGPT's turn that calls a function: its name and arguments as JSON."""
    try:
        call = json.loads(content)
    except (TypeError, ValueError, RecursionError):
        call = None
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise RowError(f"{what}: a function_call turn is no JSON with name and arguments")
    function = {"name": call["name"], "arguments": call.get("arguments", {})}
    return {"type": "function", "function": function}


def _learned(turn: Mapping[str, Any], what: str) -> bool:
    """Tell whether a turn's marks leave it to be learned; a share of a turn is refused."""
    for mark in MARKS:
        value = turn.get(mark)
        if value is not None and value not in (0, 1):
            raise RowError(f"{what}: a turn's {mark} is neither 0 nor 1 (true, false)")
        if value is not None and not value:
            return False
    return True


def given(row: Row, *names: str) -> str:
    """Return the first of these fields that the row has; the last where it has none.

    Raises:
        RowError: it has several, and they differ.
    """
    has = [name for name in names if row.get(name) is not None]
    if any(row[name] != row[has[0]] for name in has):
        raise RowError(f"{' and '.join(has)} differ: two names of one thing")
    return has[0] if has else names[-1]


def system_of(row: Row) -> tuple[Message, ...]:
    """Read the row's system message, if it has one."""
    name = given(row, "system", "system_prompt")
    text = row.get(name)
    return ({"role": "system", "content": text_of(text, name)},) if text else ()


def with_system(row: Row, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """Put the row's system message before its turns, once.

    Raises:
        RowError: the turns begin with another one.
    """
    system = system_of(row)
    if system and turns and turns[0]["role"] == "system":
        if turns[0] != system[0]:
            raise RowError("two different system messages: the row's own, and the messages' first")
        return turns
    return system + turns


def user(text: str) -> tuple[Message, ...]:
    """Return one turn of a user."""
    return ({"role": "user", "content": text},)


def about(row: Row, *used: str) -> dict[str, Any]:
    """Read margin, weight and what the template is given; keep the columns that are not ``used``.

    Raises:
        RowError: a margin that is no number, a negative weight, or pictures and the like.
    """
    for name in UNREADABLE:
        if row.get(name):
            raise RowError(f"{name}: a column that text alone cannot keep")
    margin, weight = row.get("margin"), row.get("weight")
    used = (*used, "margin", "weight", *TEMPLATE)
    return {
        "margin": 0.0 if margin is None else number_of(margin, "margin"),
        "weight": 1.0 if weight is None else number_of(weight, "weight", low=0),
        "extras": {key: value for key, value in row.items() if key not in used},
        "template": _template(row),
    }


def _template(row: Row) -> dict[str, Any]:
    """Read what the chat template is given beside the messages."""
    found: dict[str, Any] = {}
    for name in TEMPLATE:
        value = row.get(name)
        if isinstance(value, str) and name != "enable_thinking":
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise RowError(f"{name}: a text that is no JSON") from error
        if name == "chat_template_kwargs" and value:
            if not isinstance(value, Mapping):
                raise RowError(f"{name}: expected a dict, got {kind_of(value)}")
            if taken := sorted(RENDERED & value.keys()):
                raise RowError(f"{name}: {', '.join(taken)} is no keyword that a row may give")
            found |= value
        elif value is not None and value not in ([], ""):
            found[name] = value
    for name in ("tools", "documents"):
        if name in found and not isinstance(found[name], (list, tuple)):
            raise RowError(f"{name}: expected a list, got {kind_of(found[name])}")
    return found


def prompt_of(row: Row, name: str = "prompt") -> tuple[Message, ...] | str:
    """Read a prompt: text, or messages where it is given as such or there is a system message."""
    value, system = row[name], system_of(row)
    if isinstance(value, str):
        return system + user(value) if system else value
    if not isinstance(value, (list, tuple, Mapping)):
        raise RowError(f"{name}: expected a text or messages, got {kind_of(value)}")
    return with_system(row, messages(value, name))


def first_answer(turns: Sequence[Message]) -> int:
    """Return where the assistant speaks first; the number of turns where it does not."""
    return next((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), len(turns))


def response_of(
    value: Any, prompt: tuple[Message, ...] | str, what: str
) -> str | tuple[Message, ...]:
    """Read a response: one text, or one list of messages, which may repeat the prompt.

    Messages that repeat the prompt lose it; a lone turn of the assistant that is text becomes it.

    Raises:
        RowError: anything else, or messages that begin with other turns than the prompt's.
    """
    if isinstance(value, str):
        return value
    is_messages = isinstance(value, (list, tuple)) and all(
        isinstance(one, Mapping) and {"role", "from"} & one.keys() for one in value
    )
    if isinstance(value, Mapping) and {"role", "from"} & value.keys():
        is_messages = True
    if not is_messages or not value:
        raise RowError(f"{what}: expected a text or messages, got {kind_of(value)}")
    turns = messages(value, what)
    before = user(prompt) if isinstance(prompt, str) else prompt
    for repeated in (before, before[1:] if before and before[0]["role"] == "system" else before):
        if repeated and turns[: len(repeated)] == repeated:
            turns = turns[len(repeated) :]
            break
    else:
        if turns[0]["role"] not in ("assistant", "tool"):
            raise RowError(
                f"{what}: its first turns are not the prompt's",
                f"expected {_brief(before)} or the assistant, got {_brief(turns)}",
            )
    if not any(turn["role"] == "assistant" for turn in turns):
        raise RowError(f"{what}: no turn of the assistant follows the prompt")
    return answer_of(turns[0]) if len(turns) == 1 else turns


def answer_of(turn: Message) -> str | tuple[Message, ...]:
    """Return an answer of one turn: its text, where it is the assistant's and nothing else."""
    plain = turn["role"] == "assistant" and turn.keys() == {"role", "content"}
    return turn["content"] if plain else (turn,)


def _brief(turns: Sequence[Message]) -> str:
    """Write turns on a line, their first words alone."""
    return " / ".join(f"{turn['role']}: {turn['content'][:40]!r}" for turn in turns[:4])


def pair_scores(row: Row) -> tuple[float, float] | None:
    """Read the scores of chosen and rejected, under any of the names in use; None where there are
    none."""
    # SimPO's on-policy data: chosen has the highest score, rejected the lowest
    if row.get("all_rm_scores"):
        found = [number_of(score, "all_rm_scores") for score in row["all_rm_scores"]]
        return max(found), min(found)
    for chosen, rejected in (
        ("score_chosen", "score_rejected"),
        ("chosen_score", "rejected_score"),
        ("chosen_rating", "rejected_rating"),
    ):
        if row.get(chosen) is not None and row.get(rejected) is not None:
            return number_of(row[chosen], chosen), number_of(row[rejected], rejected)
    return None


def score_of(row: Row) -> tuple[float] | None:
    """Read a single response's score, from a column ``score`` or ``reward`` that holds a number."""
    for name in ("score", "reward"):
        if is_number(row.get(name)):
            return (number_of(row[name], name),)
    return None


def label_of(value: Any) -> bool:
    """Read a label: true/false, 1/0, 1/-1, or desirable/undesirable."""
    name = str(value).strip().lower().removesuffix(".0")
    if name in ("true", "1", "desirable", "chosen"):
        return True
    if name in ("false", "0", "-1", "undesirable", "rejected"):
        return False
    raise RowError("label: expected true or false", f"got {value!r:.40}")


def order(example: Example, row: Row) -> Example:
    """Order an example's responses from best to worst by the row's ``ranks`` (0 is best) or
    ``scores``.

    Ranks that are not all different become scores, so that equal ones are no preference.
    """
    given_scores = row.get("scores") is not None
    name = "scores" if given_scores else "ranks"
    if not isinstance(row[name], (list, tuple)):
        raise RowError(f"{name}: expected a list of numbers, got {kind_of(row[name])}")
    values = [number_of(value, name) for value in row[name]]
    values = values if given_scores else [-value for value in values]
    if len(values) != len(example.responses):
        raise RowError(
            "another number of responses than of ranks or scores",
            f"{len(example.responses)} and {len(values)}",
        )
    best_first = sorted(range(len(values)), key=lambda i: -values[i])
    known = given_scores or len(set(values)) < len(values)
    return dataclasses.replace(
        example,
        responses=tuple(example.responses[i] for i in best_first),
        scores=tuple(values[i] for i in best_first) if known else None,
    )


def read_pairs(row: Row, chat: bool) -> Example:
    """Read prompt, chosen, rejected: texts or messages; whole conversations may repeat the
    prompt."""
    name = given(row, "prompt", "conversations")
    prompt = prompt_of(row, name)
    sides = ("chosen", "rejected")
    if isinstance(prompt, str) and not any(isinstance(row[side], str) for side in sides):
        # UltraFeedback's way: a prompt as text beside whole conversations that begin with it
        prompt = _shared_prompt(row, prompt)
    responses = tuple(response_of(row[side], prompt, side) for side in sides)
    known = about(row, name, *sides)
    return Example(as_messages(prompt, responses), responses, scores=pair_scores(row), **known)


def _shared_prompt(row: Row, prompt: str) -> tuple[Message, ...]:
    """Return the turns that a text prompt's two conversations share, and that hold it."""
    chosen, rejected = (
        messages(value, side) if _holds_messages(value := row[side]) else ()
        for side in ("chosen", "rejected")
    )
    if all(turns and turns[0]["role"] in ("user", "system") for turns in (chosen, rejected)):
        shared, *_ = transcripts.split_messages(chosen, rejected)
        if any(turn["content"] == prompt for turn in shared):
            return shared
    return user(prompt)


def _holds_messages(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Mapping)


def as_messages(
    prompt: tuple[Message, ...] | str, responses: Sequence[str | tuple[Message, ...]]
) -> tuple[Message, ...] | str:
    """Return a prompt as messages where an answer is: a text beside them is one turn of a user."""
    if isinstance(prompt, str) and any(not isinstance(one, str) for one in responses):
        return user(prompt)
    return prompt


def read_implicit(row: Row, chat: bool) -> Example:
    """Read chosen, rejected: two conversations (texts, transcripts or messages) that begin
    alike."""
    known = {"scores": pair_scores(row), **about(row, "chosen", "rejected")}
    if isinstance(row["chosen"], str) and isinstance(row["rejected"], str):
        return Example(*transcripts.split_pair(row["chosen"], row["rejected"], chat=chat), **known)
    prompt, *rests = transcripts.split_messages(
        messages(row["chosen"], "chosen"), messages(row["rejected"], "rejected")
    )
    responses = tuple(response_of(rest, (), "response") for rest in rests)
    return Example(with_system(row, prompt), responses, **known)


def read_conversation_completion(row: Row, chat: bool) -> Example:
    """Read messages: the assistant's turns, from the first on, are the completion."""
    name = given(row, "messages", "conversations")
    turns = with_system(row, messages(row[name], name))
    first = first_answer(turns)
    if first == len(turns):
        raise RowError("no turn of the assistant")
    return Example(turns[:first], (response_of(turns[first:], (), name),), **about(row, name))


def read_conversation_label(row: Row, chat: bool) -> Example:
    """Read messages, label: feedback on the last answer; the turns before it are context."""
    name, label = given(row, "messages", "conversations"), given(row, "label", "kto_tag")
    turns = with_system(row, messages(row[name], name))
    if not turns or turns[-1]["role"] != "assistant":
        raise RowError("the labeled conversation does not end with the assistant")
    known = about(row, name, label)
    response = response_of(turns[-1:], (), name)
    return Example(turns[:-1], (response,), label=label_of(row[label]), **known)


def read_completion(row: Row, chat: bool) -> Example:
    """Read prompt, completion."""
    prompt, name = prompt_of(row), given(row, "completion", "response")
    response = response_of(row[name], prompt, name)
    return Example(as_messages(prompt, [response]), (response,), **about(row, "prompt", name))


def read_unpaired(row: Row, chat: bool) -> Example:
    """Read prompt, completion, label."""
    prompt, name = prompt_of(row), given(row, "completion", "response")
    known = about(row, "prompt", name, "label")
    response = response_of(row[name], prompt, name)
    label = label_of(row["label"])
    return Example(as_messages(prompt, [response]), (response,), label=label, **known)


def read_ranked(row: Row, chat: bool) -> Example:
    """Read prompt, responses, ranks or scores."""
    prompt = prompt_of(row)
    responses = tuple(response_of(one, prompt, "responses") for one in _list_of(row, "responses"))
    known = about(row, "prompt", "responses", "ranks", "scores")
    return order(Example(as_messages(prompt, responses), responses, **known), row)


def _list_of(row: Row, name: str) -> Sequence[Any]:
    if not isinstance(row[name], (list, tuple)):
        raise RowError(f"{name}: expected a list of answers, got {kind_of(row[name])}")
    return row[name]


def read_only_prompt(row: Row, chat: bool) -> Example:
    """Read prompt, and nothing else that is known."""
    return Example(prompt_of(row), (), **about(row, "prompt"))


def read_text(row: Row, chat: bool) -> Example:
    """Read text: all of it is learned."""
    return Example("", (text_of(row["text"], "text"),), **about(row, "text"))


def _alpaca_prompt(row: Row, chat: bool) -> tuple[Message, ...] | str:
    instruction = text_of(row["instruction"], "instruction")
    extra = text_of(row.get(given(row, "input", "context")) or "", "input")
    history = _history(row)
    if chat:
        return with_system(
            row, history + user(f"{instruction}\n\n{extra}" if extra else instruction)
        )
    if history:
        raise RowError("history: turns need a tokenizer with a chat template")
    lead = "".join(f"{turn['content']}\n\n" for turn in system_of(row))
    lead += "Below is an instruction that describes a task"
    lead += ", paired with an input that provides further context. " if extra else ". "
    lead += "Write a response that appropriately completes the request.\n\n"
    given_input = f"### Input:\n{extra}\n\n" if extra else ""
    return f"{lead}### Instruction:\n{instruction}\n\n{given_input}### Response:\n"


def _history(row: Row) -> tuple[Message, ...]:
    """Read the earlier turns of an instruction: [[what the user said, the answer], ...]."""
    turns: list[Message] = []
    for pair in row.get("history") or ():
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowError("history: expected pairs of a text and its answer")
        said, answer = (text_of(one, "history") for one in pair)
        turns += [*user(said), {"role": "assistant", "content": answer}]
    return tuple(turns)


def read_alpaca_pairs(row: Row, chat: bool) -> Example:
    """Read instruction, input, chosen, rejected."""
    return _alpaca_answers(row, chat, row["chosen"], row["rejected"], used=("chosen", "rejected"))


def read_alpaca_outputs(row: Row, chat: bool) -> Example:
    """Read instruction, input, output: the better answer and the worse."""
    outputs = _list_of(row, "output")
    if len(outputs) != 2:
        raise RowError(f"output: expected two answers, the better first, got {len(outputs)}")
    return _alpaca_answers(row, chat, *outputs, used=("output",))


def _alpaca_answers(row: Row, chat: bool, *answers: Any, used: tuple[str, ...]) -> Example:
    prompt = _alpaca_prompt(row, chat)
    responses = tuple(
        response_of(one, prompt, used[i % len(used)]) for i, one in enumerate(answers)
    )
    known = about(row, *used)
    return Example(as_messages(prompt, responses), responses, scores=pair_scores(row), **known)


def read_alpaca(row: Row, chat: bool) -> Example:
    """Read instruction, input, output."""
    prompt = _alpaca_prompt(row, chat)
    response = response_of(row["output"], prompt, "output")
    return Example(as_messages(prompt, [response]), (response,), **about(row, "output"))


def _answered(row: Row, chat: bool, *names: str, several: bool = False, **known: Any) -> Example:
    """Read a question and the answers in these fields: one in each, or (``several``) a list."""
    question = text_of(row["question"], "question")
    values = [
        (name, one) for name in names for one in (_list_of(row, name) if several else [row[name]])
    ]
    known |= about(row, "question", "chosen", "rejected", "responses", "response")
    prompt = with_system(row, user(question))
    responses = tuple(response_of(value, prompt, name) for name, value in values)
    if chat or any(not isinstance(one, str) for one in responses):
        return Example(prompt, responses, **known)
    lead = "".join(f"{message['content']}\n\n" for message in prompt[:-1])
    text = f"{lead}Question: {question}\nAnswer:"
    return Example(text, tuple(f" {answer}" for answer in responses), **known)


def read_question_pairs(row: Row, chat: bool) -> Example:
    """Read question, chosen, rejected."""
    return _answered(row, chat, "chosen", "rejected", scores=pair_scores(row))


def read_question_ranked(row: Row, chat: bool) -> Example:
    """Read question, responses, ranks or scores."""
    return order(_answered(row, chat, "responses", several=True), row)


def read_question(row: Row, chat: bool) -> Example:
    """Read question, answer."""
    return _answered(row, chat, given(row, "response", "answer"))


def read_question_label(row: Row, chat: bool) -> Example:
    """Read question, response, label."""
    return _answered(row, chat, given(row, "response", "answer"), label=label_of(row["label"]))
