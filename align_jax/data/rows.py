# SPDX-License-Identifier: Apache-2.0
"""Readers of rows whose fields say what they are: prompt, chosen, completion, question ...

Each takes a row and whether the tokenizer has a chat template; ``formats`` has the table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from align_jax.core.schema import Example, Message
from align_jax.data import transcripts
from align_jax.data.messages import (
    MARKS,
    Row,
    answer_of,
    check_no_media,
    given,
    is_marking,
    kind_of,
    learned,
    messages,
    text_of,
    truth_of,
    user,
)
from align_jax.data.transcripts import RowError

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
    "strftime_now",
}


def fields_of(row: Collection[str]) -> str:
    """Return the names of a row's fields for a message, without what makes it endless."""
    names = [f"{name:.40}" for name in sorted(row)]
    more = f" and {len(names) - 40} more" if len(names) > 40 else ""
    return f"{names[:40]}{more}"


def renaming(**columns: str) -> str:
    """Return the flag that gives columns other names."""
    return f"--config.data.columns='{json.dumps(columns)}'"


def number_of(
    value: Any, what: str, *, low: float | int = -math.inf, high: float | int = math.inf
) -> float:
    """Read a finite number of single precision, as batches hold it.

    Raises:
        RowError: no number, NaN, infinite or above 3e38, below ``low`` or above ``high``.
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= LARGEST or number < low or number > high:
        allowed = f" of at least {low:g}" if low > -math.inf else ""
        allowed = f" from {low:g} to {high:g}" if high < math.inf else allowed
        got = f"{value!r:.40}" if isinstance(value, (int, float)) else kind_of(value)
        raise RowError(f"{what}: expected a finite number{allowed}", f"got {got}")
    return number


LARGEST = 3e38  # training keeps numbers in float32
MOST = 1e6  # a row's weight or margin: beside a larger one all others are nothing


def choice_of(row: Row, name: str) -> int:
    """Read which of two answers is meant: 0 or 1.

    Raises:
        RowError: neither.
    """
    choice = number_of(row[name], name)
    if choice not in (0, 1):
        raise RowError(f"{name}: expected 0 or 1", f"got {choice:g}")
    return int(choice)


def words_of(row: Row, *names: str) -> str:
    """Read the text of the first of these fields that is there; "" where there is none.

    Raises:
        RowError: two that differ, or something else than a text, be it 0 or false.
    """
    value = row.get(name := given(row, *names))
    return "" if value is None else text_of(value, name)


def system_of(row: Row) -> tuple[Message, ...]:
    """Read the row's system message, if it has one."""
    text = words_of(row, "system", "system_prompt")
    return ({"role": "system", "content": text},) if text else ()


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


def about(row: Row, *used: str) -> dict[str, Any]:
    """Read margin, weight and what the template is given; keep the columns that are not ``used``.

    A row that a mark, such as ``train: false``, leaves out of the loss has the weight 0.

    Raises:
        RowError: a margin or weight out of range, a mark that is not known or is neither on nor
            off, or pictures and the like.
    """
    check_no_media(row, "")
    if row.get("functions") and "tools" not in row:
        hint = f"{renaming(tools='functions')} makes them so"
        raise RowError("functions: a chat template is given tools", hint)
    margin, weight = row.get("margin"), row.get("weight")
    weight = 1.0 if weight is None else number_of(weight, "weight", low=0, high=MOST)
    margin = 0.0 if margin is None else number_of(margin, "margin", low=-MOST, high=MOST)
    used = (*used, "margin", *MARKS, *TEMPLATE)
    return {
        "margin": margin,
        "weight": weight * _is_learned(row),
        "extras": {key: value for key, value in row.items() if key not in used},
        "template": _template(row),
    }


_LEAVES_OUT = re.compile("mask|ignore|skip|exclude", re.IGNORECASE)  # true, or false, of a mask


def _is_learned(row: Row) -> bool:
    """Tell whether the row's marks, its weight aside, leave it to be learned."""
    marks = {name: one for name, one in row.items() if is_marking(name) and name != "weight"}

    def remedy(mark: str) -> str:
        value, says = marks[mark], ""
        if isinstance(value, (bool, int, float)) and not _LEAVES_OUT.search(mark):
            name = "train" if isinstance(value, bool) else "weight"
            says = f"{renaming(**{name: mark})} makes it the row's {name}, "
        return f"; {says}{renaming(note=mark)} gives it another name"

    return not marks or learned(marks, "the row's", remedy)


def _template(row: Row) -> dict[str, Any]:
    """Read what the chat template is given beside the messages."""
    found: dict[str, Any] = {}
    for name in TEMPLATE:
        value = row.get(name) if name == "enable_thinking" else _parsed(row.get(name), name)
        if name == "chat_template_kwargs" and value:
            if not isinstance(value, Mapping):
                raise RowError(f"{name}: expected a dict, got {kind_of(value)}")
            if taken := sorted(RENDERED & value.keys()):
                raise RowError(f"{name}: {', '.join(taken)} is no keyword that a row may give")
            found |= value
        elif value is not None and value not in ([], ""):
            if name in found and found[name] != value:
                raise RowError(f"{name} and chat_template_kwargs differ")
            found[name] = value
    for name in ("tools", "documents"):
        if name in found and not isinstance(found[name], (list, tuple)):
            raise RowError(f"{name}: expected a list, got {kind_of(found[name])}")
        if name in found:
            found[name] = [_parsed(one, name) for one in found[name]]
    if "enable_thinking" in found:
        found["enable_thinking"] = _truth(found["enable_thinking"], "enable_thinking")
    return found


def _parsed(value: Any, name: str) -> Any:
    """Read JSON that may be written as a text; a blank one is None.

    Raises:
        RowError: a text that is none.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise RowError(f"{name}: a text that is no JSON") from error


def _truth(value: Any, name: str) -> bool:
    """Read true or false: to a template each text is true, "false" too."""
    if (is_on := truth_of(value)) is None:
        raise RowError(f"{name}: expected true or false", f"got {value!r:.40}")
    return is_on


def prompt_of(row: Row, name: str = "prompt") -> tuple[Message, ...] | str:
    """Read a prompt: text, or messages where it is given as such or there are a system message or
    earlier turns."""
    value, before = row[name], system_of(row) + _turns_before(row)
    if isinstance(value, str):
        return before + user(value) if before else value
    if not isinstance(value, (list, tuple, Mapping)):
        raise RowError(f"{name}: expected a text or messages, got {kind_of(value)}")
    if len(before) > 1:
        raise RowError(f"history: {name} is messages, which have their earlier turns themselves")
    return with_system(row, messages(value, name))


def _turns_before(row: Row) -> tuple[Message, ...]:
    """Read a prompt's earlier turns: a ``history`` of pairs, or of messages.

    Raises:
        RowError: a column of that name that is neither.
    """
    value = row.get("history")
    if not isinstance(value, str):
        return messages(value, "history") if _holds_messages(value) else history_of(row)
    if value.strip() and value[:2] != "[[":
        hint = f"{renaming(note='history')} gives it another name"
        raise RowError("history: expected a prompt's earlier turns, got a text", hint)
    return history_of(row)


def history_of(row: Row) -> tuple[Message, ...]:
    """Read the earlier turns of an instruction: [[what the user said, the answer], ...]."""
    turns: list[Message] = []
    pairs = _parsed(row.get("history"), "history")
    pairs = () if pairs in (None, []) else pairs
    for pair in pairs if isinstance(pairs, (list, tuple)) else [pairs]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowError("history: expected pairs of a text and its answer")
        said, answer = (text_of(one, "history") for one in pair)
        turns += [*user(said), {"role": "assistant", "content": answer}]
    return tuple(turns)


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
    before = user(prompt) if isinstance(prompt, str) else prompt
    if isinstance(value, str):
        return _without_prompt(value, prompt, before, what)
    is_messages = isinstance(value, (list, tuple)) and all(
        isinstance(one, Mapping) and {"role", "from"} & one.keys() for one in value
    )
    if isinstance(value, Mapping) and {"role", "from"} & value.keys():
        is_messages = True
    if not is_messages or not value:
        raise RowError(f"{what}: expected a text or messages, got {kind_of(value)}")
    turns = messages(value, what)
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


def _without_prompt(
    text: str, prompt: tuple[Message, ...] | str, before: tuple[Message, ...], what: str
) -> str | tuple[Message, ...]:
    """Take the prompt off an answer that is a whole transcript; any other text is the answer.

    Raises:
        RowError: a transcript that begins otherwise.
    """
    if not transcripts.is_transcript(text):
        return text
    if isinstance(prompt, str) and prompt and text.startswith(prompt):
        return text[len(prompt) :]
    turns = transcripts.turns(text)
    if before and turns[: len(before)] == before and len(turns) > len(before):
        rest = turns[len(before) :]
        return answer_of(rest[0]) if len(rest) == 1 else rest
    raise RowError(
        f"{what}: its first turns are not the prompt's",
        f"expected {_brief(before)}, got {_brief(turns)}",
    )


def _brief(turns: Sequence[Message]) -> str:
    """Write turns on a line, their first words alone."""
    return " / ".join(f"{turn['role']}: {turn['content'][:40]!r}" for turn in turns[:4])


def list_of(row: Row, name: str) -> Sequence[Any]:
    """Read a list."""
    if not isinstance(row[name], (list, tuple)):
        raise RowError(f"{name}: expected a list, got {kind_of(row[name])}")
    return row[name]


# what people call the scores of the two answers of a pair, chosen then rejected
PAIR_SCORES = tuple(
    (name.format("chosen"), name.format("rejected"))
    for name in (
        *("score_{}", "{}_score", "{}-score", "{}_avg_score", "score_of_{}"),
        *("rating_{}", "{}_rating", "{}-rating", "{}_avg_rating", "avg_rating_{}"),
        *("reward_{}", "{}_reward", "{}-reward", "{}_rm_score", "rm_score_{}"),
    )
)
_SCORE_NAMES = frozenset(name for pair in PAIR_SCORES for name in pair)


def pair_scores(
    row: Row, names: Sequence[tuple[str, str]] = PAIR_SCORES
) -> tuple[float, float] | None:
    """Read the scores of chosen and rejected, under any of the names in use; None where there are
    none.

    Args:
        row: the row.
        names: of the two columns; the first two that are filled count.

    Raises:
        RowError: no finite number, or one of two alone.
    """
    # SimPO's on-policy data: chosen has the highest score, rejected the lowest
    if row.get("all_rm_scores"):
        scores = list_of(row, "all_rm_scores")
        found = [number_of(score, "all_rm_scores") for score in scores]
        return max(found), min(found)
    both: tuple[float, float] | None = None
    if names is PAIR_SCORES and row.keys().isdisjoint(_SCORE_NAMES):
        return None
    for pair in names:
        here = [name for name in pair if row.get(name) is not None]
        if len(here) == 1:
            (other,) = set(pair) - set(here)
            raise RowError(
                f"{here[0]}: no {other} beside it",
                "a pair has the scores of both answers, or none; "
                f"{renaming(note=here[0])} gives it another name",
            )
        if here and both is None:
            both = number_of(row[pair[0]], pair[0]), number_of(row[pair[1]], pair[1])
    return both


def score_of(row: Row) -> tuple[float] | None:
    """Read a single response's score, from a column ``score`` or ``reward`` that holds a finite
    number; NaN is a missing one."""
    for name in ("score", "reward"):
        with contextlib.suppress(RowError):
            return (number_of(row.get(name), name),)
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
    if given_scores and row.get("ranks") is not None:
        raise RowError("ranks and scores: give one of them")
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
    alike.

    Raises:
        RowError: they share no prompt, or are answers to one that stands in another column.
    """
    sides = row["chosen"], row["rejected"]
    known = {"scores": pair_scores(row), **about(row, "chosen", "rejected")}
    if all(isinstance(side, str) for side in sides):
        if not all(map(transcripts.is_transcript, sides)):
            _check_asked_here(row, *sides)
        return Example(*transcripts.split_pair(*sides, chat=chat), **known)
    chosen, rejected = messages(sides[0], "chosen"), messages(sides[1], "rejected")
    if all(turns and turns[0]["role"] == "assistant" for turns in (chosen, rejected)):
        _check_asked_here(row)
    prompt, *rests = transcripts.split_messages(chosen, rejected)
    responses = tuple(response_of(rest, (), "response") for rest in rests)
    return Example(with_system(row, prompt), responses, **known)


# columns that hold a prompt under another name
PROMPT_COLUMNS = (
    *("prompt", "instruction", "question", "query", "problem", "input", "inputs", "context"),
    *("messages", "conversation", "conversations", "dialogue", "dialog", "trajectory", "post"),
)


def _check_asked_here(row: Row, *texts: str) -> None:
    """Refuse two answers whose prompt stands in a column of its own: the words with which both
    begin are none.

    Raises:
        RowError: naming the column.
    """
    near = [one for one in row if difflib.get_close_matches(one.lower(), ["prompt"], cutoff=0.9)]
    for name in (*PROMPT_COLUMNS, *near):
        value = row.get(name)
        if isinstance(value, str):
            asks = bool(value.strip()) and not all(value in text for text in texts or [""])
        else:
            asks = _holds_messages(value)
        if asks:
            raise RowError(
                f"chosen and rejected are answers, and {name} seems to be their prompt",
                f"{renaming(prompt=name)} makes it so",
            )


# columns of an answer, beside messages that end with the user
_ANSWERS = ("completion", "response", "output", "answer")


def _check_answered_here(row: Row, name: str, turns: Sequence[Message]) -> None:
    """Refuse messages whose last turn is answered in a column of its own, or not at all.

    Raises:
        RowError: naming the column.
    """
    if turns and turns[-1]["role"] != "assistant":
        for answer in _ANSWERS:
            if row.get(answer):
                columns = {"prompt": name, "completion": answer}
                if answer in ("completion", "response"):
                    del columns["completion"]
                raise RowError(
                    f"{name} do not end with the assistant, and {answer} seems to be the answer",
                    f"{renaming(**columns)} makes it so",
                )
    if first_answer(turns) == len(turns):
        hint = f"as prompts alone {renaming(prompt=name)} reads them"
        raise RowError("no turn of the assistant", hint)


def read_conversation_completion(row: Row, chat: bool) -> Example:
    """Read messages: the assistant's turns, from the first on, are the completion."""
    name = given(row, "messages", "conversations")
    turns = with_system(row, messages(row[name], name))
    _check_answered_here(row, name, turns)
    first = first_answer(turns)
    return Example(turns[:first], (response_of(turns[first:], (), name),), **about(row, name))


def read_conversation_label(row: Row, chat: bool) -> Example:
    """Read messages, label: feedback on the last answer; the turns before it are context."""
    name, label = given(row, "messages", "conversations"), given(row, "label", "kto_tag")
    turns = with_system(row, messages(row[name], name))
    if not turns or turns[-1]["role"] != "assistant":
        _check_answered_here(row, name, turns)
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
    responses = tuple(response_of(one, prompt, "responses") for one in list_of(row, "responses"))
    known = about(row, "prompt", "responses", "ranks", "scores")
    return order(Example(as_messages(prompt, responses), responses, **known), row)


def read_only_prompt(row: Row, chat: bool) -> Example:
    """Read prompt, and nothing else that is known."""
    return Example(prompt_of(row), (), **about(row, "prompt"))


def read_text(row: Row, chat: bool) -> Example:
    """Read text: all of it is learned.

    Raises:
        RowError: it is a message of a tree, which somebody says to somebody.
    """
    if row.keys() >= {"message_id", "parent_id", "role"}:
        hint = "--config.data.format=oasst makes trees of Open-Assistant's messages"
        raise RowError("text: a message that has a role and a parent, not a text alone", hint)
    return Example("", (text_of(row["text"], "text"),), **about(row, "text"))


def _alpaca_prompt(row: Row, chat: bool) -> tuple[Message, ...] | str:
    instruction = text_of(row["instruction"], "instruction")
    extra, history = words_of(row, "input", "context"), _turns_before(row)
    if chat:
        return with_system(
            row, history + user(f"{instruction}\n\n{extra}" if extra else instruction)
        )
    _check_no_history(history)
    lead = "".join(f"{turn['content']}\n\n" for turn in system_of(row))
    lead += "Below is an instruction that describes a task"
    lead += ", paired with an input that provides further context. " if extra else ". "
    lead += "Write a response that appropriately completes the request.\n\n"
    given_input = f"### Input:\n{extra}\n\n" if extra else ""
    return f"{lead}### Instruction:\n{instruction}\n\n{given_input}### Response:\n"


def _check_no_history(history: tuple[Message, ...]) -> None:
    if history:
        raise RowError("history: turns need a tokenizer with a chat template")


def read_alpaca_pairs(row: Row, chat: bool) -> Example:
    """Read instruction, input, chosen, rejected."""
    return _alpaca_answers(row, chat, row["chosen"], row["rejected"], used=("chosen", "rejected"))


def read_alpaca_outputs(row: Row, chat: bool) -> Example:
    """Read instruction, input, output: the better answer and the worse."""
    outputs = list_of(row, "output")
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
    """Read instruction, input, output (or response)."""
    prompt = _alpaca_prompt(row, chat)
    name = given(row, "output", "response")
    response = response_of(row[name], prompt, name)
    return Example(as_messages(prompt, [response]), (response,), **about(row, name))


def _answered(row: Row, chat: bool, *names: str, several: bool = False, **known: Any) -> Example:
    """Read a question and the answers in these fields: one in each, or (``several``) a list."""
    question, extra = text_of(row["question"], "question"), words_of(row, "input", "context")
    question = f"{question}\n\n{extra}" if extra else question
    values = [
        (name, one) for name in names for one in (list_of(row, name) if several else [row[name]])
    ]
    known |= about(row, "question", "chosen", "rejected", "responses", "response")
    history = _turns_before(row)
    prompt = with_system(row, history + user(question))
    responses = tuple(response_of(value, prompt, name) for name, value in values)
    if chat or any(not isinstance(one, str) for one in responses):
        return Example(prompt, responses, **known)
    _check_no_history(history)
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
