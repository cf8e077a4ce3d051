# SPDX-License-Identifier: Apache-2.0
"""Rewards: what a completion is worth, by rules on its text or by a model, and their weighted sum.

    {"numeric": 1.0, "model": {"weight": 0.5, "path": ...}} ─ resolve ─► WeightedRewards

A row of ``REWARDS`` takes options and returns a *reward function*

    (prompts, completions, extras) -> one number for each completion

where ``extras`` holds the columns of the data's row (a gold answer, a level), and of a sample
``finished``: whether it ended by itself.  Nothing here is random, and nothing depends on the other
completions of the batch, so a score never depends on how completions were batched.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import importlib
import inspect
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from align_jax.core.choose import choose
from align_jax.core.schema import Example
from align_jax.data.tokenizer import load_tokenizer
from align_jax.inference.client import Client
from align_jax.inference.score import RewardModel
from align_jax.models.model import LoadedModel

Extras = Sequence[Mapping[str, Any]]
RewardFunction = Callable[[Sequence[str], Sequence[str], Extras], Sequence[float]]
LoadModel = Callable[..., LoadedModel]  # runs.weights.load_model

_NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|-?\.\d+"
_MARKED = (
    rf"####\s*\$?\s*({_NUMBER})",
    rf"\\boxed\{{\s*\$?\s*({_NUMBER})[^}}]*\}}",
    rf"(?i)answer(?:\s+is|\s*:)\s*:?\s*\$?\s*({_NUMBER})",
)
# Hutto & Gilbert 2014, vaderSentiment `normalize`: the largest sum to be expected of a sentence
_VADER_ALPHA = 15.0


def _each(score: Callable[[str, str, Mapping[str, Any]], float]) -> RewardFunction:
    """Make a reward function of what scores one completion."""

    def score_all(
        prompts: Sequence[str], completions: Sequence[str], extras: Extras
    ) -> Sequence[float]:
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
        left, right = completion.strip(), str(choose(extras, column, "the reward's column")).strip()
        return float(left.lower() == right.lower() if ignore_case else left == right)

    return _each(score)


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

    def score(prompt: str, completion: str, extras: Mapping[str, Any]) -> float:
        answer = choose(extras, column, "the reward's column")
        gold = float(answer) if isinstance(answer, (int, float)) else find_number(str(answer))
        if gold is None:
            raise ValueError(f"column {column!r} holds no number: {str(answer)[:80]!r}")
        got = find_number(completion, anywhere=not marked)
        return float(got is not None and abs(got - gold) <= tolerance)

    return _each(score)


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
        try:
            table[fields[0].strip().lower()] = float(fields[1])
        except (IndexError, ValueError):
            raise ValueError(
                f"{path}:{number}: expected 'token<TAB>valence', got {line[:60]!r}"
            ) from None
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


def function(path: str, **options: Any) -> RewardFunction:
    """Use your own reward function, ``module:function``; options are bound as keywords.

    Raises:
        ValueError: a path not of that form.
        ImportError, AttributeError: as Python's import has them.
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"a reward function is named 'module:function', got {path!r}")
    found = getattr(importlib.import_module(module), name)
    return functools.partial(found, **options) if options else found


def model(
    path: str,
    rows: int = 16,
    max_length: int = 0,
    compute_dtype: str = "float32",
    *,
    load_model: LoadModel,
    mesh: Mesh | None = None,
) -> RewardFunction:
    """Score by a reward model: a checkpoint with a score head, ours or a Hugging Face sequence
    classifier.

    A row's column ``messages`` (the prompt's turns) goes through the reward model's own chat
    template where it has one; else the prompt's text is taken as it is.

    Args:
        path: directory or hub id.
        rows: texts scored at once.
        max_length: tokens of a prompt with its completion; 0 = the model's positions.
        compute_dtype: of weights and activations; the head is always float32.
        load_model: reads the checkpoint; given by the program.
        mesh: where its weights lie and its forwards run; given by the program.
    """
    scorer = RewardModel(
        load_model(path, mesh=mesh, compute_dtype=compute_dtype, heads=("score",)),
        load_tokenizer(path),
        rows=rows,
        max_length=max_length or None,
        mesh=mesh,
    )

    def score(
        prompts: Sequence[str], completions: Sequence[str], extras: Extras
    ) -> Sequence[float]:
        examples = []
        for prompt, completion, row in zip(prompts, completions, extras, strict=True):
            turns = tuple(row["messages"]) if scorer.chat and "messages" in row else prompt
            examples.append(Example(turns, (completion,)))
        finished = [bool(row.get("finished", True)) for row in extras]
        return scorer(examples, finished).tolist()

    return score


RATING = """Rate the answer to the request from 0 (useless) to 10 (perfect) for help, correctness \
and clarity.

Request:
{prompt}

Answer:
{completion}

End with a line of the form "Final score: N"."""


def judge(
    url: str,
    model: str,
    question: str = RATING,
    scale: float = 10.0,
    concurrency: int = 16,
    **options: Any,
) -> RewardFunction:
    """Score by a language model's rating, behind an OpenAI-compatible server (its key in
    OPENAI_API_KEY).

    Args:
        url: of the server.
        model: the judge's name there.
        question: with the fields ``{prompt}`` and ``{completion}``; of the answer the number after
            "score:" counts, else its last number.
        scale: the rating is divided by this.
        concurrency: questions under way at once.
        options: of the request (``temperature``, ``max_tokens``).

    Raises:
        ValueError: when called, an answer without a number.
        ConnectionError: when called, as ``inference.engines.Client.post``.
    """
    client = Client(url)

    def rate(one: tuple[str, str]) -> float:
        text = client.chat(
            model,
            [{"role": "user", "content": question.format(prompt=one[0], completion=one[1])}],
            **options,
        )
        marked = re.findall(rf"(?i)score:\s*({_NUMBER})", text) or re.findall(_NUMBER, text)
        if not marked:
            raise ValueError(f"the judge {model!r} gave no number: {text[:100]!r}")
        return float(marked[-1].replace(",", "").partition("/")[0]) / scale

    def score(
        prompts: Sequence[str], completions: Sequence[str], extras: Extras
    ) -> Sequence[float]:
        with concurrent.futures.ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(rate, zip(prompts, completions, strict=True)))

    return score


REWARDS: Mapping[str, Callable[..., RewardFunction]] = {
    "exact": exact,
    "numeric": numeric,
    "regex": regex,
    "format": has_format,
    "length": length,
    "lexicon": lexicon,
    "function": function,
    "model": model,
    "judge": judge,
}


@dataclasses.dataclass(frozen=True)
class WeightedRewards:
    """A weighted sum of reward functions.

    Attributes:
        terms: (name, weight, function) of each.
    """

    terms: tuple[tuple[str, float, RewardFunction], ...]

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], extras: Extras | None = None
    ) -> tuple[Float[np.ndarray, "n"], dict[str, Float[np.ndarray, "n"]]]:
        """Score completions.

        Args:
            prompts: the prompts as text.
            completions: as many completions.
            extras: the columns of their rows.

        Returns:
            The weighted sum, float32 [n], and each reward by itself, unweighted.

        Raises:
            ValueError: a function that returns another number of scores, or one that is not a
                finite number.
        """
        extras = [{}] * len(prompts) if extras is None else extras
        total, parts = np.zeros(len(completions), np.float32), {}
        for name, weight, fn in self.terms:
            scores = np.asarray(fn(prompts, completions, extras), np.float32)
            if scores.shape != total.shape:
                raise ValueError(
                    f"reward {name!r} gave scores of shape {scores.shape} for {len(completions)} "
                    "completions; it must return one number for each"
                )
            if not np.isfinite(scores).all():
                bad = int(np.flatnonzero(~np.isfinite(scores))[0])
                raise ValueError(
                    f"reward {name!r} gave {scores[bad]} for the completion "
                    f"{completions[bad][:80]!r}"
                )
            parts[name] = scores
            total = total + np.float32(weight) * scores
        return total, parts


class RewardTerm(NamedTuple):
    """One reward as a config names it; nothing of it is loaded."""

    name: str
    weight: float
    kind: str  # row of ``REWARDS``
    options: dict[str, Any]


def from_json(text: str) -> dict[str, Any]:
    """Return what a command line's ``--rewards`` says: JSON, or a file of it.

    Raises:
        ValueError: neither a file nor a JSON object.
    """
    try:
        found = json.loads(pathlib.Path(text).read_text() if os.path.isfile(text) else text)
    except ValueError as error:
        raise ValueError(
            f'--rewards={text}: expected JSON such as {{"length": 1.0}}, or a file of it; '
            f"there is no such file, or it is not JSON: {error}"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"--rewards={text}: expected reward -> weight, got {found!r}")
    return found


def read(rewards: Mapping[str, Any]) -> list[RewardTerm]:
    """Read the weighted sum that a config's ``rewards`` describes.

    Args:
        rewards: name -> weight, or options; of the options ``weight`` (default 1) and ``kind`` (a
            row of the table; default: the name) are read here, the rest goes to the row's function.

    Raises:
        ValueError: no reward at all, an unknown kind, an option that the row does not take, or one
            missing.
    """
    if not rewards:
        raise ValueError(f"no reward was named; known: {', '.join(REWARDS)}")
    terms = []
    for name, given in rewards.items():
        options: dict[str, Any] = (
            {"weight": given} if isinstance(given, (int, float)) else dict(given)
        )
        weight, kind = float(options.pop("weight", 1.0)), options.pop("kind", name)
        choose(REWARDS, kind, "reward")
        terms.append(RewardTerm(name, weight, kind, options))
        _bind(terms[-1], load_model=None, mesh=None)
    return terms


def resolve(
    rewards: Mapping[str, Any], *, load_model: LoadModel, mesh: Mesh | None = None
) -> WeightedRewards:
    """Build the weighted sum that a config's ``rewards`` describes.

    Args:
        rewards: as `read` takes them.
        load_model: reads the checkpoints of rows that run a model.
        mesh: where these models run; None: the default device.

    Raises:
        ValueError: as `read`, or a value that the row refuses.
    """
    terms = read(rewards)
    return WeightedRewards(
        tuple(
            (term.name, term.weight, _bind(term, load_model=load_model, mesh=mesh)())
            for term in terms
        )
    )


def _bind(term: RewardTerm, **resources: Any) -> Callable[[], RewardFunction]:
    """Check a row's options, and give it those of the program's resources that it takes.

    A row may be any function, with options that are said nowhere but in its signature; this is the
    one place that asks it.
    """
    row = REWARDS[term.kind]
    signature = inspect.signature(row)
    taken = {key: value for key, value in resources.items() if key in signature.parameters}
    try:
        signature.bind(**term.options, **taken)
    except TypeError as error:
        raise ValueError(f"reward {term.name!r}: {error}; {term.kind} takes {signature}") from None
    return functools.partial(row, **term.options, **taken)
