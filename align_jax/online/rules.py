# SPDX-License-Identifier: Apache-2.0
"""Rewards by rules on a completion's text: a gold answer, a pattern, a length, a lexicon.

Nothing here is random, and nothing depends on the other completions of the batch.
"""

from __future__ import annotations

import functools
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from align_jax.core.choose import choose
from align_jax.core.fields import is_number, number_in
from align_jax.online.functions import Columned, Extras, RewardFunction, Scores

_NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|-?\.\d+"
_MARKED = (
    rf"####\s*\$?\s*({_NUMBER})",
    rf"\\boxed\{{\s*\$?\s*({_NUMBER})[^}}]*\}}",
    rf"(?i)answer(?:\s+is|\s*:)\s*:?\s*\$?\s*({_NUMBER})",
)
# Hutto & Gilbert 2014, vaderSentiment `normalize`: the largest sum to be expected of a sentence
_VADER_ALPHA = 15.0


def _gold(row: Mapping[str, Any], column: str) -> str | int | float:
    """Return a row's gold answer.

    Raises:
        ValueError: there is no such column, or no text or number in it.
    """
    value = choose(row, column, "the reward's column")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(
            f"column {column!r}: expected a text or a number, got {str(value)[:80]!r} "
            f"(a {type(value).__name__})"
        )
    return value


def _each(score: Callable[[str, str, Mapping[str, Any]], float]) -> RewardFunction:
    """Make a reward function of what scores one completion."""

    def score_all(prompts: Sequence[str], completions: Sequence[str], extras: Extras) -> Scores:
        return [float(score(*one)) for one in zip(prompts, completions, extras, strict=True)]

    return score_all


def exact(column: str = "answer", ignore_case: bool = False, extract: str = "") -> RewardFunction:
    """Give 1 where the completion is the gold answer, else 0; white space around both is ignored.

    Args:
        column: the row's column that holds the answer.
        ignore_case: compare without regard to case.
        extract: a regular expression whose first group (of its last match) is the answer within the
            completion; "" compares the whole completion.
    """
    pattern = re.compile(extract, re.DOTALL) if extract else None

    def score(prompt: str, completion: str, extras: Mapping[str, Any]) -> float:
        if pattern is not None:
            found = pattern.findall(completion)
            if not found:
                return 0.0
            completion = found[-1] if isinstance(found[-1], str) else found[-1][0]
        left, right = completion.strip(), str(_gold(extras, column)).strip()
        return float(left.lower() == right.lower() if ignore_case else left == right)

    return Columned(_each(score), lambda row: _gold(row, column))


def find_number(text: str, anywhere: bool = True) -> float | None:
    r"""Return the number that a text gives as its answer, or None.

    The last one marked as the answer (``#### 18``, ``\boxed{18}``, ``the answer is 18``); without a
    mark the last number of the text.  Thousands' commas and a dollar sign are read over; a fraction
    ``3/4`` is divided.

    Args:
        text: the text.
        anywhere: also accept a number that is not marked.

    >>> find_number("She makes 9 * 2 = $18 a day. #### 1,018"), find_number("so 3 or 4")
    (1018.0, 4.0)
    >>> find_number("none")
    """
    for pattern in _MARKED + ((rf"({_NUMBER})",) if anywhere else ()):
        found = re.findall(pattern, text)
        if found:
            top, _, bottom = found[-1].replace(",", "").partition("/")
            if bottom and not float(bottom):
                return None
            return float(top) / float(bottom or 1)
    return None


def numeric(
    column: str = "answer", tolerance: float = 1e-4, marked: bool = False
) -> RewardFunction:
    """Give 1 where the completion's number equals the gold answer's, else 0 (see `find_number`).

    Args:
        column: the row's column with the gold answer: a number, or text that ends in one (GSM8K's
            ``#### 18``).
        tolerance: the greatest absolute difference that counts as equal.
        marked: count only a number that is marked as the answer.

    Raises:
        ValueError: when called, a gold answer without a number.
    """

    def gold(row: Mapping[str, Any]) -> float:
        answer = _gold(row, column)
        number = find_number(answer) if isinstance(answer, str) else answer
        if number is None or not is_number(number):
            raise ValueError(f"column {column!r} holds no number: {str(answer)[:80]!r}")
        return float(number)

    def score(prompt: str, completion: str, extras: Mapping[str, Any]) -> float:
        got = find_number(completion, anywhere=not marked)
        return float(got is not None and abs(got - gold(extras)) <= tolerance)

    return Columned(_each(score), gold)


def regex(
    pattern: str, reward: float = 1.0, otherwise: float = 0.0, count: bool = False
) -> RewardFunction:
    """Give ``reward`` where the pattern is found in the completion (for each time, with
    ``count``)."""
    compiled = re.compile(pattern, re.DOTALL | re.MULTILINE)

    def score(prompt: str, completion: str, extras: Mapping[str, Any]) -> float:
        times = (
            len(compiled.findall(completion))
            if count
            else int(compiled.search(completion) is not None)
        )
        return reward * times if times else otherwise

    return _each(score)


def has_format(pattern: str = r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*") -> RewardFunction:
    """Give 1 where the whole completion matches the pattern, else 0."""
    compiled = re.compile(pattern, re.DOTALL)

    def score(prompt: str, completion: str, extras: Mapping[str, Any]) -> float:
        return float(compiled.fullmatch(completion) is not None)

    return _each(score)


def length(target: int, unit: str = "words", form: str = "distance") -> RewardFunction:
    """Score a completion's length n against a target.

    Args:
        target: the wanted (distance) or greatest (excess) length, in units.
        unit: "words" or "characters".
        form: "distance" is -min(1, |n - target| / target); "excess" is -min(1, max(0, n - target) /
            target).

    Raises:
        ValueError: an unknown unit or form, or a target below 1.
    """
    if unit not in ("words", "characters") or form not in ("distance", "excess") or target < 1:
        raise ValueError(
            "length wants unit 'words' or 'characters', form 'distance' or 'excess', target >= 1; "
            f"got {unit!r}, {form!r}, {target}"
        )

    def score(prompt: str, completion: str, extras: Mapping[str, Any]) -> float:
        n = len(completion.split() if unit == "words" else completion)
        over = abs(n - target) if form == "distance" else max(0, n - target)
        return -min(1.0, over / target)

    return _each(score)


@functools.lru_cache(maxsize=8)
def load_lexicon(path: str) -> Mapping[str, float]:
    """Read a sentiment lexicon in VADER's form: a line for each token,
    ``token TAB mean valence TAB ...``.

    Raises:
        ValueError: a line without a number in its second field, with file and line.
    """
    table = {}
    for number, line in enumerate(pathlib.Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        fields = line.split("\t")
        valence = number_in(fields[1]) if len(fields) > 1 else None
        if valence is None:
            raise ValueError(f"{path}:{number}: expected 'token<TAB>valence', got {line[:60]!r}")
        table[fields[0].strip().lower()] = valence
    return table


def longest_phrase(table: Mapping[str, float]) -> int:
    """Return the words of a lexicon's longest phrase."""
    return max((key.count(" ") + 1 for key in table), default=1)


def valences(text: str, table: Mapping[str, float], longest: int) -> list[float]:
    """Return the valences of a text's words and phrases that the lexicon knows, longest phrase
    first.

    Args:
        text: words between white space.
        table: word or phrase, in lower case -> valence.
        longest: words of a phrase at most (see `longest_phrase`).
    """
    words, found, i = text.lower().split(), [], 0
    while i < len(words):
        for n in range(min(longest, len(words) - i), 0, -1):
            raw = " ".join(words[i : i + n])
            key = raw if raw in table else raw.strip("\"'.,;:!?()[]{}*_-\u201c\u201d\u2018\u2019")
            if key in table:
                found.append(table[key])
                break
        i += n
    return found


def lexicon(path: str, form: str = "compound") -> RewardFunction:
    """Score sentiment by a lexicon in VADER's form.

    Args:
        path: the lexicon's file.
        form: with s the sum of the valences: "compound" is s / sqrt(s^2 + 15), in (-1, 1); "sum" is
            s; "mean" is s divided by the number of words.

    Negation, intensifiers and punctuation do not change a word's valence (they do in
    vaderSentiment).

    References:
        Hutto and Gilbert, VADER, ICWSM 2014; vaderSentiment's ``normalize``.

    Raises:
        ValueError: an unknown form, or a malformed file.
    """
    if form not in ("compound", "sum", "mean"):
        raise ValueError(f"lexicon wants form 'compound', 'sum' or 'mean'; got {form!r}")
    table = load_lexicon(path)
    longest = longest_phrase(table)

    def score(prompt: str, completion: str, extras: Mapping[str, Any]) -> float:
        total = math.fsum(valences(completion, table, longest))
        if form == "compound":
            return total / math.sqrt(total * total + _VADER_ALPHA)
        return total if form == "sum" else total / max(1, len(completion.split()))

    return _each(score)
