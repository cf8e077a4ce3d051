# SPDX-License-Identifier: Apache-2.0
"""From the rows people publish to Examples: one small function a format, found by its fields or
named.

A function takes a row and whether the tokenizer has a chat template.  Formats without explicit
messages (transcripts, instruction/output, question/answer) make messages where there is a template,
and otherwise the plain text that people used before templates; rows of explicit messages need a
template.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from align_jax.core import own
from align_jax.core.schema import Example, Message
from align_jax.data import published, rows, steps
from align_jax.data.beside import check_beside
from align_jax.data.messages import SAID, Row, is_blank
from align_jax.data.rows import fields_of
from align_jax.data.transcripts import RowError


@dataclasses.dataclass(frozen=True)
class Format:
    """One way of writing preferences down.

    Attributes:
        kind: what a row gives: ``completions``, ``pairs``, ``ranked``, ``unpaired``, ``scored``
            (one response with a number), ``stepwise`` (one response of labeled steps) or
            ``prompts``.
        fields: a row that has all of these is taken for this format, unless an earlier one matches;
            an alternative is written ``a|b``, a value ``type=sample``, a list ``output[]``, a list
            of dicts that have a key ``answers[rank]``.
        read: (row, has a chat template) -> an example, or several.
        beside: columns that it reads where they are there (those of every format aside).
    """

    kind: str
    fields: tuple[str, ...]
    read: Callable[[Row, bool], Example | list[Example]]
    beside: tuple[str, ...] = ()

    def missing(self, row: Row) -> list[str]:
        """Return which of this format's fields the row lacks."""
        return [
            field for field in self.fields if not any(_has(row, name) for name in field.split("|"))
        ]


def _has(row: Row, name: str) -> bool:
    if name.endswith("]"):
        name, _, key = name[:-1].partition("[")
        value = row.get(name)
        if not isinstance(value, (list, tuple)):
            return False
        return all(isinstance(one, Mapping) and key in one for one in value[:1] if key)
    name, _, value = name.partition("=")
    return row.get(name) is not None and (not value or row[name] == value)


def detect(rows: Sequence[Row], kind: str = "") -> str:
    """Return the name of the first format in the table whose fields the rows have, taken together:
    a field that is null in one of them is there if another has it.

    Args:
        rows: the first ones.
        kind: of data that is wanted; "" = any.

    Raises:
        ValueError: none; the rows' fields and those of the formats of that kind are listed.
    """
    together: dict[str, Any] = {}
    for row in rows:
        together |= {
            name: value
            for name, value in row.items()
            if value is not None and together.get(name) is None
        }
    if name := _format_of(together):
        return name
    fields = fields_of({name for row in rows for name in row})
    wanted = {name: form for name, form in FORMATS.items() if form.kind == kind} or FORMATS
    known = "; ".join(f"{name}: {', '.join(form.fields)}" for name, form in wanted.items())
    of = f" of {kind}" if wanted is not FORMATS else ""
    raise ValueError(
        f"no known format has only the fields {fields}; rename them by --config.data.columns, "
        f"or use one{of}: {known}"
    )


def _format_of(row: Row) -> str:
    """Return the first format of whose fields a row has all; "" = none."""
    return next((name for name, form in FORMATS.items() if not form.missing(row)), "")


def columns_for(kind: str, fields: Collection[str]) -> dict[str, str]:
    """Guess which columns hold what a format of this kind needs; {} where none is near.

    >>> columns_for("pairs", ["prompt", "chosen_response", "rejected_response"])
    {'chosen': 'chosen_response', 'rejected': 'rejected_response'}
    """
    guesses = []
    for form in FORMATS.values():
        if form.kind == kind and not any("=" in field for field in form.fields):
            lacks = [name.split("|")[0] for name in form.missing(dict.fromkeys(fields, ()))]
            found = {name: _holding(name, fields) for name in _plain(lacks)}
            if found and all(found.values()) and len(set(found.values())) == len(found):
                guesses.append((_ASKING.isdisjoint(form.fields), len(found), found))
    return min(guesses, key=lambda guess: guess[:2], default=(0, 0, {}))[2]


# fields that ask alone: they set no format apart
_ASKING = {"prompt", "instruction", "question", "prompt|instruction", "conversations", "messages"}


def lacking(kind: str, fields: Collection[str]) -> str:
    """Say which one field more would make a format of this kind; "" where it would take several.

    >>> lacking("pairs", ["prompt", "chosen"])
    "it lacks rejected to be of format 'pairs'"
    >>> lacking("pairs", ["prompt"])
    ''
    """
    for name, form in FORMATS.items():
        wanted = form.fields if form.kind == kind else ()
        missing = form.missing(dict.fromkeys(fields, ()))
        if len(missing) == 1 and "=" not in missing[0] and set(wanted) - _ASKING - set(missing):
            return f"it lacks {missing[0]} to be of format {name!r}"
    return ""


# names under which people publish a field
_ALSO = {
    "prompt": rows.PROMPT_COLUMNS,
    "completion": ("targets", "target", "output", "answer", "answers", "solution"),
    "messages": ("conversation", "dialogue", "dialog"),
}


def _holding(name: str, fields: Collection[str]) -> str:
    """Return the column whose name holds a field's, as chosen_response holds chosen, or another
    word for it; "" = none."""
    held = [field for field in sorted(fields) if name in field.split("_")]
    return next(iter([*held, *(one for one in _ALSO.get(name, ()) if one in fields)]), "")


def read(row: Row, name: str, *, chat: bool) -> list[Example]:
    """Read a row's examples.

    Args:
        row: the row, columns already renamed.
        name: a key of ``FORMATS``, or ``module:name`` of a ``Format`` of one's own.
        chat: whether the tokenizer has a chat template.

    Raises:
        ValueError: an unknown format, or a needed field is missing.
        RowError: a response is empty, or the row contradicts itself.
    """
    form = own.row(FORMATS, name, "config.data.format")
    missing = form.missing(row)
    if null := [name for name in _plain(missing) if name in row and row[name] is None]:
        raise RowError(f"{', '.join(null)}: null")
    if missing:
        other = _format_of(row)
        remedy = "; name the columns by --config.data.columns"
        if other and FORMATS[other].kind != "prompts":
            remedy = f", format {other!r}: rows of another format go into a file of their own"
        raise RowError(
            f"format {name!r} needs {', '.join(form.fields)}; the row has no {', '.join(missing)}",
            f"only {fields_of(row)}{remedy}",
        )
    found = form.read(row, chat)
    examples = [found] if isinstance(found, Example) else found
    examples = [_with_system(one, row) for one in examples]
    if form.kind == "completions":
        examples = [dataclasses.replace(one, scores=rows.score_of(row)) for one in examples]
    if name in FORMATS:  # an own one may read what it does not declare
        check_beside(row, unread(form, row), form.kind, examples)
    for example in examples:
        if any(_is_empty(response) for response in example.responses):
            raise RowError("empty response")
        if _is_silent(example.prompt) and name != "text":
            raise RowError("empty prompt")
        _check_encodable(example)
    return examples


def unread(form: Format, fields: Collection[str]) -> set[str]:
    """Return which of a row's columns make nothing of its examples: they are kept for rewards and
    reports alone."""
    return set(fields) - {*_plain(form.fields), *form.beside, "system", "system_prompt"}


def _plain(fields: Sequence[str]) -> list[str]:
    """Return the names of fields, alternatives one by one."""
    return [re.split(r"[=\[]", name)[0] for field in fields for name in field.split("|")]


def _with_system(example: Example, row: Row) -> Example:
    """Put the row's system message before a prompt whose format has none of its own.

    Raises:
        RowError: the prompt is a text that does not hold it, where no template could render it.
    """
    system, prompt = rows.system_of(row), example.prompt
    if not system or (isinstance(prompt, str) and system[0]["content"] in prompt):
        return example
    if isinstance(prompt, str):
        raise RowError("system: the prompt is plain text, which has no system message")
    return dataclasses.replace(example, prompt=rows.with_system(row, prompt))


def _is_silent(prompt: str | tuple[Message, ...]) -> bool:
    """Tell whether a prompt says nothing."""
    if isinstance(prompt, str):
        return is_blank(prompt)
    turns = [turn for turn in prompt if turn["role"] != "system"] or prompt
    return all(is_blank(turn["content"]) and not turn.get("tool_calls") for turn in turns)


def _check_encodable(example: Example) -> None:
    """Refuse texts that no tokenizer can read: half of a surrogate pair."""
    parts = {"prompt": example.prompt, "response": example.responses, **example.template}
    for name, value in parts.items():
        try:
            json.dumps(value, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            raise RowError(f"{name}: a text with half a character (a lone surrogate)") from error


def _is_empty(response: str | tuple[Message, ...]) -> bool:
    """Tell whether a response, or one of its turns of the assistant, says nothing."""
    if isinstance(response, str):
        return is_blank(response)
    turns = [message for message in response if message["role"] == "assistant"]
    return not turns or any(
        is_blank(turn["content"]) and not turn.keys() & set(SAID) for turn in turns
    )


_HISTORY = ("history",)
_QUESTION = ("history", "input", "context")
_SCORED = ("score", "reward")
_PAIRED = ("all_rm_scores", *(name for pair in rows.PAIR_SCORES for name in pair))
FORMATS: Mapping[str, Format] = {
    # files that HALOs' sample and label programs (and ours) write
    "binary_feedback": Format(
        "unpaired",
        ("type=binary_feedback", "prompt|instruction", "output", "label"),
        published.read_binary_feedback,
        _HISTORY + ("reward",),
    ),
    "pairwise_feedback": Format(
        "pairs",
        ("type=pairwise_feedback", "prompt|instruction", "output_A", "output_B", "label"),
        published.read_pairwise_feedback,
        _HISTORY + ("reward_A", "reward_B"),
    ),
    "scalar_feedback": Format(
        "scored",
        ("type=scalar_feedback", "prompt|instruction", "output", "reward"),
        published.read_scalar_feedback,
        _HISTORY,
    ),
    "sample": Format(
        "completions",
        ("type=sample", "prompt|instruction", "output"),
        published.read_sample,
        _HISTORY + _SCORED,
    ),
    # public data sets with fields of their own
    "oasst_tree": Format("ranked", ("message_tree_id", "prompt"), published.read_oasst_tree),
    "shp": Format(
        "pairs",
        ("history", "human_ref_A", "human_ref_B", "labels"),
        published.read_shp,
        ("score_A", "score_B"),
    ),
    "safe_rlhf": Format(
        "pairs",
        ("prompt", "response_0", "response_1", "better_response_id"),
        published.read_safe_rlhf,
    ),
    "comparisons": Format("pairs", ("info", "summaries", "choice"), published.read_comparisons),
    "scored_completions": Format(
        "ranked", ("instruction", "completions"), published.read_scored_completions
    ),
    "openai_pairs": Format(
        "pairs", ("input", "preferred_output", "non_preferred_output"), published.read_openai_pairs
    ),
    "preference_strength": Format(
        "ranked",
        (
            "prompt|context",
            "response_1|response1",
            "response_2|response2",
            "preference_strength|overall_preference",
        ),
        published.read_strength,
    ),
    "ranked_answers": Format(
        "ranked", ("prompt", "answers[rank]"), published.read_ranked_answers, ("num_responses",)
    ),
    "webgpt": Format(
        "ranked", ("question", "answer_0", "answer_1", "score_0", "score_1"), published.read_webgpt
    ),
    "arena": Format("ranked", ("conversation_a", "conversation_b", "winner"), published.read_arena),
    "prm800k": Format("stepwise", ("question", "label", "labeler"), steps.read_prm800k),
    "math_shepherd": Format("stepwise", ("input", "label", "task"), steps.read_math_shepherd),
    # fields that say what they are
    "stepwise": Format(
        "stepwise", ("prompt|question", "completions[]", "labels[]"), steps.read_stepwise, _HISTORY
    ),
    "ranked": Format("ranked", ("prompt", "responses", "ranks|scores"), rows.read_ranked, _HISTORY),
    "question_ranked": Format(
        "ranked", ("question", "responses", "ranks|scores"), rows.read_question_ranked, _QUESTION
    ),
    "pairs": Format("pairs", ("prompt", "chosen", "rejected"), rows.read_pairs, _HISTORY + _PAIRED),
    "sharegpt_pairs": Format(
        "pairs", ("conversations", "chosen", "rejected"), rows.read_pairs, _PAIRED
    ),
    "alpaca_pairs": Format(
        "pairs", ("instruction", "chosen", "rejected"), rows.read_alpaca_pairs, _QUESTION + _PAIRED
    ),
    "question_pairs": Format(
        "pairs", ("question", "chosen", "rejected"), rows.read_question_pairs, _QUESTION + _PAIRED
    ),
    "implicit_pairs": Format("pairs", ("chosen", "rejected"), rows.read_implicit, _PAIRED),
    "messages_label": Format("unpaired", ("messages", "label"), rows.read_conversation_label),
    "sharegpt_label": Format(
        "unpaired", ("conversations", "label|kto_tag"), rows.read_conversation_label
    ),
    "unpaired": Format(
        "unpaired", ("prompt", "completion|response", "label"), rows.read_unpaired, _HISTORY
    ),
    "question_label": Format(
        "unpaired", ("question", "response|answer", "label"), rows.read_question_label, _QUESTION
    ),
    "messages": Format("completions", ("messages",), rows.read_conversation_completion, _SCORED),
    "sharegpt": Format(
        "completions", ("conversations",), rows.read_conversation_completion, _SCORED
    ),
    "completion": Format(
        "completions", ("prompt", "completion|response"), rows.read_completion, _HISTORY + _SCORED
    ),
    "alpaca_outputs": Format(
        "pairs", ("instruction", "output[]"), rows.read_alpaca_outputs, _QUESTION + _PAIRED
    ),
    "alpaca": Format(
        "completions", ("instruction", "output|response"), rows.read_alpaca, _QUESTION + _SCORED
    ),
    "question": Format(
        "completions", ("question", "response|answer"), rows.read_question, _QUESTION + _SCORED
    ),
    "text": Format("completions", ("text",), rows.read_text, _SCORED),
    "prompt": Format("prompts", ("prompt",), rows.read_only_prompt, _HISTORY),
}
