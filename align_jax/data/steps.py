# SPDX-License-Identifier: Apache-2.0
"""Readers of rows whose steps are labeled: a question, an answer in steps, which of them are right.

An ``Example`` of kind ``stepwise`` has one response, the steps line by line, and ``steps``: each
one's text with its label, 1 right, 0 wrong, between them a probability, None where nobody said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align_jax.core.schema import Example, Step
from align_jax.data.messages import Row, given, kind_of, text_of, user
from align_jax.data.rows import about, label_of, number_of, prompt_of, with_system
from align_jax.data.transcripts import RowError

TAG = "ки"  # Math-Shepherd's, behind each step
_FIRST = ("Step 1:", "step 1:")


def _example(prompt: Any, steps: Sequence[Step], known: Mapping[str, Any]) -> Example:
    """Make an example of steps.

    Raises:
        RowError: no steps or no labels, an empty step, or no prompt.
    """
    if not steps or all(label is None for _, label in steps):
        raise RowError("no step has a label")
    if not all(text.strip() for text, _ in steps):
        raise RowError("empty step")
    if not prompt:
        raise RowError("empty prompt")
    return Example(prompt, ("\n".join(text for text, _ in steps),), steps=tuple(steps), **known)


def step_label(value: Any) -> float | None:
    """Read a step's label: true or false, or a number from 0 to 1; None: nobody said.

    Raises:
        RowError: anything else.
    """
    if value is None or isinstance(value, bool):
        return None if value is None else float(value)
    if isinstance(value, str):
        return float(label_of(value))
    number = number_of(value, "labels", low=0)
    if number > 1:
        raise RowError("labels: expected true, false, or from 0 to 1", f"got {number:g}")
    return number


def read_stepwise(row: Row, chat: bool) -> Example:
    """Read prompt (or question), completions (the steps), labels: TRL's stepwise supervision."""
    name = given(row, "prompt", "question")
    prompt = prompt_of(row, name)
    if name == "question" and isinstance(prompt, str):
        prompt = with_system(row, user(prompt)) if chat else f"Question: {prompt}\nAnswer:\n"
    texts, labels = row["completions"], row["labels"]
    if len(texts) != len(labels):
        raise RowError(
            "another number of completions (steps) than of labels", f"{len(texts)}, {len(labels)}"
        )
    steps = [
        (text_of(text, "completions"), step_label(label))
        for text, label in zip(texts, labels, strict=True)
    ]
    return _example(prompt, steps, about(row, name, "completions", "labels"))


def read_math_shepherd(row: Row, chat: bool) -> Example:
    """Read input, label: the same text, with a tag behind each step in the one, + or - in the
    other.

    The question ends where the first step begins, at "Step 1:".
    """
    tagged, labeled = text_of(row["input"], "input"), text_of(row["label"], "label")
    pieces = tagged.split(TAG)
    labels, at = [], 0
    for piece in pieces[:-1]:
        mark = labeled[at + len(piece) : at + len(piece) + 1]
        if labeled[at : at + len(piece)] != piece or mark not in ("+", "-"):
            raise RowError(
                f"label: expected the text of input with + or - for each {TAG!r}",
                f"at character {at + len(piece)} is {mark!r}",
            )
        labels.append(float(mark == "+"))
        at += len(piece) + 1
    first = next((mark for mark in _FIRST if mark in pieces[0]), "")
    if not first:
        raise RowError("input: expected a question, then 'Step 1:'", f"{pieces[0]!r:.60}")
    question, _, begun = pieces[0].partition(first)
    texts = [first + begun, *pieces[1:-1]]
    steps = [(text.strip(), label) for text, label in zip(texts, labels, strict=True)]
    prompt = user(question.strip()) if chat else question.strip()
    return _example(prompt, steps, about(row, "input", "label"))


def _dict(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RowError(f"{what}: expected a dict, got {kind_of(value)}")
    return value


def _rated(completion: Any) -> Step:
    one = _dict(completion, "label.steps[].completions[]")
    rating = one.get("rating")
    if rating not in (-1, 0, 1, None):
        raise RowError("rating: expected -1, 0, 1 or null", f"got {rating!r:.40}")
    return text_of(one.get("text"), "text"), None if rating is None else float(rating == 1)


def read_prm800k(row: Row, chat: bool) -> list[Example]:
    """Read PRM800K: question.problem, label.steps[].completions[] with text and rating.

    Each alternative that was not chosen ends a solution, and so do the chosen ones together.  A
    rating of 1 is right; 0 (neutral) and -1 are not, as in TRL's conversion; a null says nothing.
    A step that the labeler wrote is right.
    """
    question = text_of(_dict(row["question"], "question").get("problem"), "question.problem")
    prompt, known = user(question) if chat else question, about(row, "question", "label")
    rows = _dict(row["label"], "label").get("steps")
    if not isinstance(rows, (list, tuple)):
        raise RowError(f"label.steps: expected a list, got {kind_of(rows)}")
    found: list[list[Step]] = []
    before: list[Step] = []
    for number, step in enumerate(rows):
        one = _dict(step, f"label.steps[{number}]")
        offered = [_rated(completion) for completion in one.get("completions") or ()]
        chosen, written = one.get("chosen_completion"), one.get("human_completion")
        found += [[*before, other] for place, other in enumerate(offered) if place != chosen]
        if chosen is not None:
            if isinstance(chosen, bool) or chosen not in range(len(offered)):
                raise RowError(
                    "chosen_completion: expected the place of a completion", f"got {chosen!r:.40}"
                )
            before.append(offered[chosen])
        elif written is not None:
            before.append((_rated(written)[0], 1.0))
        else:
            break
    if before:
        found.append(before)
    labeled = [one for one in found if any(label is not None for _, label in one)]
    if not labeled:
        raise RowError("no step has a label")
    return [_example(prompt, one, known) for one in labeled]
