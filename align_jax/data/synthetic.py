# SPDX-License-Identifier: Apache-2.0
"""Data sets made by code, whose true preference is known: they need no network and can be scored
exactly.

Someone asks how to do a small job.  An answer has an opening, a hint and a closing; opening and
closing are each kind (+1), plain (0) or rude (-1), and people prefer the answer with the higher sum
(``kindness``).  Questions of the evaluation split never occur in training.  ``arithmetic`` asks for
sums whose answers can be checked.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from align_jax.core.choose import choose

VERSION = 1
VERBS = ("fix", "clean", "paint", "move", "open", "store", "sharpen", "measure")
NOUNS = (
    "lamp",
    "door",
    "clock",
    "kettle",
    "bike",
    "chair",
    "shelf",
    "pump",
    "radio",
    "ladder",
    "window",
    "knife",
    "bucket",
    "drawer",
    "fence",
    "boat",
)
HINTS = (
    "use a soft cloth",
    "work slowly",
    "read the label",
    "ask a friend",
    "start at the top",
    "wear gloves",
    "find good light",
    "take a short break",
)
OPENINGS = {
    1: ("Gladly!", "Of course!", "With pleasure!"),
    0: ("Right.", "So, then.", "As follows."),
    -1: ("Not again.", "Seriously?", "How dull!"),
}
CLOSINGS = {
    1: ("Good luck!", "Well done.", "Enjoy it!"),
    0: ("That is it.", "The end.", "No more."),
    -1: ("Go away.", "You fool.", "Shame!"),
}
SPLITS = {"train": 2048, "eval": 256}  # rows by default
BYTES_OF_ROW = 2048  # that a row takes as an example in memory, about
_EVAL_EVERY = 8  # every eighth question is held out


@dataclasses.dataclass(frozen=True)
class SyntheticDataset:
    """A data set made by code: row ``i`` is a pure function of (name, split, seed, i)."""

    size: int
    row: Callable[[int], Mapping[str, Any]]


def make(
    name: str, split: str = "train", *, seed: int = 0, size: int | None = None
) -> SyntheticDataset:
    """Make a data set by code.

    Args:
        name: ``completions``, ``preferences``, ``unpaired``, ``ranked``, ``arithmetic`` or
            ``verified_steps``.
        split: ``train`` or ``eval``; their questions are disjoint.
        seed: another seed gives other rows.
        size: rows; default 2,048 for train and 256 for eval.

    Raises:
        ValueError: an unknown name or split, or a size below 1 or beyond this machine's memory.
    """
    make_row = choose(BUILTINS, name, "builtin data set")
    default = choose(SPLITS, split, f"split of builtin:{name}")
    size = default if size is None else size
    if size < 1:
        raise ValueError(f"builtin:{name}:{split}: size must be at least 1, got {size}")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size * BYTES_OF_ROW > memory:
        raise ValueError(
            f"builtin:{name}:{split}: size = {size:,} rows take about {size * BYTES_OF_ROW:,} "
            f"bytes; this machine has {memory:,}"
        )
    stream = (sorted(BUILTINS).index(name), list(SPLITS).index(split), seed)

    def row(index: int) -> Mapping[str, Any]:
        return make_row(np.random.default_rng([*stream, index]), split == "eval")

    return SyntheticDataset(size, row)


def eval_split(source: str) -> str:
    """Return the source of the evaluation split of made training data; "" for any other source.

    >>> eval_split("builtin:arithmetic:train?seed=1"), eval_split("pairs.jsonl")
    ('builtin:arithmetic:eval?seed=1', '')
    """
    made = re.fullmatch(r"builtin:(\w+):train(\?[^,]*)?", source)
    return f"builtin:{made[1]}:eval{made[2] or ''}" if made else ""


def kindness(answer: str) -> int:
    """Score an answer by the true preference: kind phrases minus rude ones.

    >>> kindness("Gladly! To fix a lamp, work slowly. Go away."), kindness("Gladly! Enjoy it!")
    (0, 2)
    """
    return sum(
        value
        for table in (OPENINGS, CLOSINGS)
        for value, phrases in table.items()
        if any(phrase in answer for phrase in phrases)
    )


def _question(rng: np.random.Generator, held_out: bool) -> tuple[str, str]:
    """Draw a question and the job it asks about.

    Held out are those whose verb and noun sum to 7 modulo 8: so every verb and every noun occurs in
    both splits.
    """
    verb, noun = int(rng.integers(len(VERBS))), int(rng.integers(len(NOUNS)))
    last = _EVAL_EVERY - 1
    if held_out or (verb + noun) % _EVAL_EVERY == last:
        # another noun of the split wanted: its remainder is fixed, or one of the seven others
        shift = 0 if held_out else int(rng.integers(1, _EVAL_EVERY))
        noun = (last - verb + shift) % _EVAL_EVERY
        noun += _EVAL_EVERY * int(rng.integers(len(NOUNS) // _EVAL_EVERY))
    job = f"{VERBS[verb]} a {NOUNS[noun]}"
    return f"How do I {job}?", job


def _pick(rng: np.random.Generator, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def _answer(rng: np.random.Generator, job: str, total: int) -> str:
    opening = _pick(rng, [value for value in (-1, 0, 1) if total - value in (-1, 0, 1)])
    first, last = _pick(rng, OPENINGS[opening]), _pick(rng, CLOSINGS[total - opening])
    return f"{first} To {job}, {_pick(rng, HINTS)}. {last}"


def _completions(rng: np.random.Generator, held_out: bool) -> Mapping[str, Any]:
    question, job = _question(rng, held_out)
    return {"question": question, "response": _answer(rng, job, int(rng.integers(-2, 3)))}


def _preferences(rng: np.random.Generator, held_out: bool) -> Mapping[str, Any]:
    question, job = _question(rng, held_out)
    low, high = sorted(rng.choice(np.arange(-2, 3), 2, replace=False).tolist())
    return {
        "question": question,
        "chosen": _answer(rng, job, high),
        "rejected": _answer(rng, job, low),
        "gap": high - low,
    }


def _unpaired(rng: np.random.Generator, held_out: bool) -> Mapping[str, Any]:
    question, job = _question(rng, held_out)
    total = _pick(rng, (-2, -1, 1, 2))
    return {"question": question, "response": _answer(rng, job, total), "label": total > 0}


def _ranked(rng: np.random.Generator, held_out: bool) -> Mapping[str, Any]:
    question, job = _question(rng, held_out)
    totals = rng.choice(np.arange(-2, 3), 4, replace=False).tolist()
    return {
        "question": question,
        "responses": [_answer(rng, job, total) for total in totals],
        "scores": totals,
    }


def _arithmetic(rng: np.random.Generator, held_out: bool) -> Mapping[str, Any]:
    while True:
        left, right = rng.integers(0, 10, 2).tolist()
        if ((left * 10 + right) % _EVAL_EVERY == _EVAL_EVERY - 1) == held_out:
            return {"question": f"What is {left}+{right}?", "answer": str(left + right)}


def _verified_steps(rng: np.random.Generator, held_out: bool) -> Mapping[str, Any]:
    """Draw a sum of four digits, added up digit by digit modulo 10; each step has its label."""
    while True:
        digits = rng.integers(0, 10, 4).tolist()
        if (int("".join(map(str, digits))) % _EVAL_EVERY == _EVAL_EVERY - 1) == held_out:
            break
    total, steps, labels = digits[0], [], []
    for digit in digits[1:]:
        slip = 0 if rng.random() < 0.75 else int(rng.integers(1, 10))
        result = (total + digit + slip) % 10
        steps.append(f"{total} + {digit} = {result}")
        labels.append(not slip)
        total = result
    question = " + ".join(map(str, digits))
    return {"question": f"What is {question} ?", "completions": steps, "labels": labels}


BUILTINS: Mapping[str, Callable[[np.random.Generator, bool], Mapping[str, Any]]] = {
    "completions": _completions,
    "preferences": _preferences,
    "unpaired": _unpaired,
    "ranked": _ranked,
    "arithmetic": _arithmetic,
    # by its name the last: a data set's number, from which its rows are drawn, is its name's place
    "verified_steps": _verified_steps,
}
