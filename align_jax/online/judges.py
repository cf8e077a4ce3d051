# SPDX-License-Identifier: Apache-2.0
"""What a language model that judges is asked, and what of its answer counts."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import inspect
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from align_jax.core.choose import nearest
from align_jax.inference.client import Client
from align_jax.online.functions import Extras, RewardFunction, RowError, Scores

_NUMBER = r"[-+]?(?:\d[\d,]*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_RATED = rf"(?<![\w.])({_NUMBER})(?:\s*(?:/|out\s+of)\s*({_NUMBER}))?"
_MARKED = rf"(?i)\b(?:score|rating)\b[\s*_`\"]*(?::|=|is)[\s*_`\"]*{_RATED}"
_VERDICT = r"(?i:.*\b(?:answer|verdict|choice|winner)\b[\s*_`\"]*(?::|\bis\b))?\W*([ABC])\W*"
TOTAL_SECONDS = 3600.0  # for a judge's answer with all its tries and waits
_SECRETS = ("api_key", "key", "authorization", "headers", "password", "token")

RATING = """Rate the answer to the request from 0 (useless) to 10 (perfect) for help, correctness \
and clarity.

Request:
{prompt}

Answer:
{completion}

End with a line of the form "Final score: N"."""

COMPARISON = """Which of two answers to the same request is better? Judge help, correctness and \
clarity, not length.

Request:
{prompt}

Answer A:
{a}

Answer B:
{b}

Reply with a single letter: A if answer A is better, B if answer B is better, C if they are \
equally good."""


def check_question(question: str, fields: tuple[str, ...]) -> None:
    """Check the template of a judge's question.

    Raises:
        ValueError: it has not each of these fields, or has others.
    """
    try:
        found = {name for _, name, _, _ in string.Formatter().parse(question) if name is not None}
    except ValueError as error:
        raise ValueError(f"question: {error}; a brace that is no field is doubled") from None
    if found != set(fields):
        raise ValueError(
            f"question: expected the fields {', '.join(f'{{{one}}}' for one in fields)}, got "
            f"{sorted(found)}; a brace that is no field is doubled"
        )


def check_options(options: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Check the further fields of a judge's request.

    Args:
        options: the fields.
        known: options that are no fields of the request, for the nearest.

    Raises:
        ValueError: a secret (it would stand in config.json), or the misspelled name of an option.
    """
    for name in options:
        if name.lower() in _SECRETS:
            raise ValueError(
                f"{name}: the key is read from an environment variable; name it in key_variable"
            )
        if "did you mean" in (hint := nearest(name, known)):
            raise ValueError(f"no option {name!r}{hint}")


def rating(text: str, low: float, high: float) -> float:
    """Return the number that a judge gave: the last after "score:" or "rating:", else its only one.

    Raises:
        ValueError: no number, several of which none is marked, or one out of the scale.

    >>> rating("2 faults. **Final score:** 7/10", 0.0, 10.0), rating("8.5 out of 10", 0.0, 10.0)
    (7.0, 8.5)
    """
    marked = re.findall(_MARKED, text)
    found = marked or re.findall(_RATED, text)
    if not found:
        raise ValueError(f"gave no number: {text[:100]!r}")
    if not marked and len(found) > 1:
        raise ValueError(f"gave several numbers and marks none as its score: {text[-100:]!r}")
    top, bottom = (one.replace(",", "") for one in found[-1])
    value = float(top)
    if not low <= value <= high or (bottom and float(bottom) != high):
        given = f"{top}/{bottom}" if bottom else top
        raise ValueError(f"gave {given}; expected {low:g} to {high:g}: {text[-100:]!r}")
    return value


def verdict(text: str) -> str:
    """Return the letter that a judge gave: on its last line, else the only one that it names.

    Raises:
        ValueError: none of A, B and C, or several.

    >>> verdict("B is clearer than A.\\nAnswer: B"), verdict("I say A")
    ('B', 'A')
    """
    lines = text.strip().splitlines()
    if lines and (last := re.fullmatch(_VERDICT, lines[-1])):
        return last[1]
    letters = set(re.findall(r"\b[ABC]\b", text))
    if len(letters) != 1:
        several = f"named {' and '.join(sorted(letters))}" if letters else ""
        raise ValueError(f"{several or 'answered neither A, B nor C'}: {text[-100:]!r}")
    return letters.pop()


class Verdicts(NamedTuple):
    """What a judge said of pairs that it saw in both orders.

    Attributes:
        wins: 1 the first is better, 0 the second, ½ neither; ¾ and ¼ where it called them equal
            in one of the orders.
        ties: it called them equal in both orders.
        disagreements: it took the one that stood first, or the one that stood second, in both.
        silent: it gave no letter in one order at least, and counts as a tie there.
    """

    wins: Float[np.ndarray, "n"]
    ties: Bool[np.ndarray, "n"]
    disagreements: Bool[np.ndarray, "n"]
    silent: Bool[np.ndarray, "n"]


@dataclasses.dataclass(frozen=True)
class PairJudge:
    """A language model behind an OpenAI-compatible server that compares two answers, asked once in
    each order.

    Attributes:
        client: of the server.
        model: the judge's name there.
        question: with the fields ``{prompt}``, ``{a}`` and ``{b}``; the letter A, B or C on the
            answer's last line counts, else the only one that it names.
        concurrency: questions under way at once.
        abstain: an answer without a letter counts as a tie; else it is an error.
        options: of the request (``temperature``, ``max_tokens``).

    Raises:
        ValueError: a question without the fields, or no question at a time; when called, an answer
            without A, B or C.
        ConnectionError: when called, as ``Client.post``.
    """

    client: Client
    model: str
    question: str = COMPARISON
    concurrency: int = 16
    abstain: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_question(self.question, ("prompt", "a", "b"))
        if self.concurrency < 1:
            raise ValueError(f"expected concurrency >= 1, got {self.concurrency}")

    def __call__(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]
    ) -> Verdicts:
        """Compare two answers to each prompt."""
        pairs = list(enumerate(zip(prompts, first, second, strict=True)))
        asked = pairs + [(row, (prompt, b, a)) for row, (prompt, a, b) in pairs]
        with concurrent.futures.ThreadPoolExecutor(self.concurrency) as pool:
            letters = np.array([*pool.map(self._ask, asked), ""])[:-1]  # texts, if of no pairs too
        found = np.select([letters == "A", letters == "B"], [1.0, 0.0], 0.5).astype(np.float32)
        ahead, behind = found.reshape(2, -1)
        there, back = letters.reshape(2, -1)
        return Verdicts(
            0.5 * (ahead + 1.0 - behind),
            (there == "C") & (back == "C"),
            (there == back) & np.isin(there, ("A", "B")),
            (there == "") | (back == ""),
        )

    def _ask(self, one: tuple[int, tuple[str, str, str]]) -> str:
        """Return the letter of one answer; "" of none."""
        row, (prompt, a, b) = one
        asked = self.question.format(prompt=prompt, a=a, b=b)
        try:
            text = self.client.chat(
                self.model, [{"role": "user", "content": asked}], **self.options
            )
            return verdict(text)
        except ValueError as error:
            if self.abstain:
                return ""
            raise RowError(
                row,
                f"the judge {self.model!r} at {self.client.url} {error} (prompt {prompt[-60:]!r})",
            ) from None


def pair_judge(
    url: str,
    model: str,
    question: str = COMPARISON,
    concurrency: int = 16,
    key_variable: str = "OPENAI_API_KEY",
    timeout_seconds: float = 600.0,
    total_seconds: float = TOTAL_SECONDS,
    allow_http: bool = False,
    abstain: bool = False,
    **options: Any,
) -> PairJudge:
    """Compare a prompt's completions two by two, by a language model that sees each pair in both
    orders, behind an OpenAI-compatible server.

    Args:
        url: of the server: https, or http on this host.
        model: the judge's name there.
        question: with the fields ``{prompt}``, ``{a}`` and ``{b}``; of the answer the letter A, B
            or C on its last line counts, else the only one that it names.
        concurrency: questions under way at once.
        key_variable: environment variable with the API key; "" or unset: none is sent.
        timeout_seconds: for one whole answer.
        total_seconds: for an answer with all its tries and waits; 0 = whatever these take.
        allow_http: take plain http to another host too.
        abstain: an answer without a letter counts as a tie; else it is an error.
        options: of the request (``temperature``, ``max_tokens``); what is not named is the
            server's own default.

    Raises:
        ValueError: as ``Client`` and `PairJudge`.
    """
    check_options(options, tuple(inspect.signature(pair_judge).parameters))
    client = Client(
        url,
        key_variable=key_variable,
        timeout_seconds=timeout_seconds,
        total_seconds=total_seconds,
        allow_http=allow_http,
    )
    return PairJudge(client, model, question, concurrency, abstain, options)


def judge(
    url: str,
    model: str,
    question: str = RATING,
    scale: float = 10.0,
    concurrency: int = 16,
    key_variable: str = "OPENAI_API_KEY",
    timeout_seconds: float = 600.0,
    total_seconds: float = TOTAL_SECONDS,
    allow_http: bool = False,
    abstain: bool = False,
    **options: Any,
) -> RewardFunction:
    """Score by a language model's rating from 0 to 1, behind an OpenAI-compatible server.

    Args:
        url: of the server: https, or http on this host.
        model: the judge's name there.
        question: with the fields ``{prompt}`` and ``{completion}``; of the answer the last number
            after "score:" counts, else its only one.
        scale: ratings are from 0 to this, and divided by it.
        concurrency: questions under way at once.
        key_variable: environment variable with the API key; "" or unset: none is sent.
        timeout_seconds: for one whole answer.
        total_seconds: for an answer with all its tries and waits; 0 = whatever these take.
        allow_http: take plain http to another host too.
        abstain: an answer without a rating on the scale counts as none; else it is an error.
        options: of the request (``temperature``, ``max_tokens``); what is not named is the
            server's own default.

    Raises:
        ValueError: a question without the fields, or as ``Client``; when called, an answer without
            a rating on the scale.
        ConnectionError: when called, as ``Client.post``.
    """
    check_question(question, ("prompt", "completion"))
    check_options(options, tuple(inspect.signature(judge).parameters))
    if scale <= 0 or concurrency < 1:
        raise ValueError(f"expected scale > 0 and concurrency >= 1, got {scale}, {concurrency}")
    client = Client(
        url,
        key_variable=key_variable,
        timeout_seconds=timeout_seconds,
        total_seconds=total_seconds,
        allow_http=allow_http,
    )

    def rate(one: tuple[int, str, str]) -> float | None:
        row, prompt, completion = one
        asked = question.format(prompt=prompt, completion=completion)
        try:
            text = client.chat(model, [{"role": "user", "content": asked}], **options)
            return rating(text, 0.0, scale) / scale
        except ValueError as error:
            if abstain:
                return None
            raise RowError(row, f"the judge {model!r} {error} ({client.url})") from None

    def score(prompts: Sequence[str], completions: Sequence[str], extras: Extras) -> Scores:
        with concurrent.futures.ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(rate, zip(range(len(prompts)), prompts, completions, strict=True)))

    return score
