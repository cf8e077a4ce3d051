# SPDX-License-Identifier: Apache-2.0
"""Rewards: what a completion is worth, by rules on its text or by a model, and their weighted sum.

    {"numeric": 1.0, "model": {"weight": 0.5, "path": ...}} ─ resolve ─► WeightedRewards

A row of ``REWARDS`` takes options and returns a *reward function*

    (prompts, completions, extras) -> one number for each completion, or None: nothing to say

where ``extras`` holds the columns of the data's row (a gold answer, a level), and of a sample
``finished``: whether it ended by itself.  Nothing here is random, and nothing depends on the other
completions of the batch, so a score never depends on how completions were batched.  The user's own
functions are in ``functions``.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
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
from align_jax.core.fields import is_number, number_in
from align_jax.core.schema import Example
from align_jax.data.tokenizer import load_tokenizer
from align_jax.inference.client import Client
from align_jax.inference.score import RewardModel
from align_jax.models.model import LoadedModel
from align_jax.online import functions
from align_jax.online.functions import Columned, Extras, RewardFunction, Scores
from align_jax.online.judges import check_options, check_question, rating

LoadModel = Callable[..., LoadedModel]  # runs.weights.load_model

_NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|-?\.\d+"
_MARKED = (
    rf"####\s*\$?\s*({_NUMBER})",
    rf"\\boxed\{{\s*\$?\s*({_NUMBER})[^}}]*\}}",
    rf"(?i)answer(?:\s+is|\s*:)\s*:?\s*\$?\s*({_NUMBER})",
)
_SUCH = '{"numeric": 1.0, "short": {"kind": "length", "target": 50, "weight": 0.5}}'
_GREATEST = float(np.finfo(np.float32).max)
_EXCERPT = 60  # characters of a prompt or a completion in a message
# Hutto & Gilbert 2014, vaderSentiment `normalize`: the largest sum to be expected of a sentence
_VADER_ALPHA = 15.0


def prompt_text(example: Example) -> str:
    """Return what a reward function is given as the prompt: the text, or the last turn's words."""
    return example.prompt if isinstance(example.prompt, str) else example.prompt[-1]["content"]


def columns(example: Example, finish: str = "stop") -> dict[str, Any]:
    """Return the row's columns for reward functions; ``messages`` holds the prompt's turns,
    ``finished`` whether the completion, of this ``finish``, ended by itself."""
    found = {**example.extras, "finished": finish == "stop"}
    return found if isinstance(example.prompt, str) else found | {"messages": list(example.prompt)}


def counted(scores: Float[np.ndarray, "n"]) -> Float[np.ndarray, "m"]:
    """Return the scores of the completions of which a reward said something."""
    return scores[~np.isnan(scores)]


def by_name(each: Mapping[str, Float[np.ndarray, "n"]], i: int) -> dict[str, float | None]:
    """Return each reward of completion i, for a record; None where it said nothing."""
    return {name: None if np.isnan(x[i]) else float(x[i]) for name, x in each.items()}


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


def function(path: str, **options: Any) -> RewardFunction:
    """Use your own reward function, ``module:function``; options are bound as keywords.

    It takes (prompts, completions, extras), or what TRL gives: (completions, **columns); see
    ``functions``.

    Raises:
        ValueError: no such function, or one that takes what nothing gives.
    """
    return functions.adapt(functions.find(path), path, options)


def _of_environment(prompts: Sequence[str], completions: Sequence[str], extras: Extras) -> Scores:
    if any("environment_reward" not in row for row in extras):
        raise ValueError(
            "it is what config.rollout.environment gives in an online run, and there is none here"
        )
    return [row["environment_reward"] for row in extras]


def environment() -> RewardFunction:
    """Give what the environment of ``config.rollout.environment`` gave: the sum over the turns."""
    return _of_environment


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

    def score(prompts: Sequence[str], completions: Sequence[str], extras: Extras) -> Scores:
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


class RowError(ValueError):
    """A reward that cannot be given.

    Attributes:
        row: which of the completions it is about.
    """

    def __init__(self, row: int, message: str) -> None:
        super().__init__(message)
        self.row = row


def judge(
    url: str,
    model: str,
    question: str = RATING,
    scale: float = 10.0,
    concurrency: int = 16,
    key_variable: str = "OPENAI_API_KEY",
    timeout_seconds: float = 600.0,
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
        url, key_variable=key_variable, timeout_seconds=timeout_seconds, allow_http=allow_http
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


REWARDS: Mapping[str, Callable[..., RewardFunction]] = {
    "exact": exact,
    "numeric": numeric,
    "regex": regex,
    "format": has_format,
    "length": length,
    "lexicon": lexicon,
    "function": function,
    "environment": environment,
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

    @property
    def of_environment(self) -> bool:
        """Whether what an environment gives counts among them."""
        return any(fn is _of_environment for _, _, fn in self.terms)

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], extras: Extras | None = None
    ) -> tuple[Float[np.ndarray, "n"], dict[str, Float[np.ndarray, "n"]]]:
        """Score completions.

        Args:
            prompts: the prompts as text.
            completions: as many completions.
            extras: the columns of their rows.

        Returns:
            The weighted sum, float32 [n], of the rewards that said something (0 where none did, as
            in TRL), and each reward by itself, unweighted, NaN where it said nothing.

        Raises:
            ValueError: a function that fails, or returns another number of scores, or one that is
                not a finite number.
            ConnectionError: as ``inference.client.Client.post``.
        """
        extras = [{}] * len(prompts) if extras is None else extras
        total, parts = np.zeros(len(completions), np.float32), {}
        for name, weight, fn in self.terms:
            given = _ask(name, fn, prompts, completions, extras)
            scores = parts[name] = read_scores(name, given, prompts, completions)
            with np.errstate(over="ignore"):
                total = total + np.float32(weight) * np.nan_to_num(scores)
        if not np.isfinite(total).all():
            row = int(np.flatnonzero(~np.isfinite(total))[0])
            raise ValueError(f"the weighted sum of the rewards is {total[row]} at row {row}")
        return total, parts

    def check(self, examples: Sequence[Example]) -> None:
        """Check that the data have what the rewards read.

        Raises:
            ValueError: a column that is missing, or a gold answer that is none, with file and line.
        """
        for name, _, fn in self.terms:
            if not isinstance(fn, Columned):
                continue
            wrong: list[str] = []
            for example in examples:
                try:
                    fn.check(columns(example))
                except ValueError as error:
                    wrong.append(f"{example.source}: reward {name!r}: {error}")
            if wrong:
                more = f" (and so in {len(wrong) - 1} more rows)" if len(wrong) > 1 else ""
                raise ValueError(wrong[0] + more)


def _ask(
    name: str,
    fn: RewardFunction,
    prompts: Sequence[str],
    completions: Sequence[str],
    extras: Extras,
) -> Any:
    """Call a reward function.

    Raises:
        ValueError, ConnectionError: whatever it raised, with its name, the row and the place.
    """
    try:
        return fn(prompts, completions, extras)
    except ConnectionError as error:
        raise ConnectionError(f"reward {name!r}: {error}") from error
    except (Exception, SystemExit) as error:
        if type(error).__module__.startswith("jax"):  # the device's: out of memory, say
            raise
        row = (
            error.row
            if isinstance(error, RowError)
            else _failing_row(fn, prompts, completions, extras)
        )
        where = "" if row is None else f" at {_place(row, prompts, completions)}"
        line = functions.line_of(error)
        words = f"{type(error).__name__}: {error} ({line})" if line else str(error)
        raise ValueError(f"reward {name!r} failed{where}: {words}") from error


def _place(row: int, prompts: Sequence[str], completions: Sequence[str]) -> str:
    prompt, completion = prompts[row], completions[row]
    return f"row {row} (prompt {prompt[-_EXCERPT:]!r}, completion {completion[:_EXCERPT]!r})"


def _failing_row(
    fn: RewardFunction, prompts: Sequence[str], completions: Sequence[str], extras: Extras
) -> int | None:
    """Return the first row with which a function fails by itself; None: it fails with none."""

    def fails(low: int, high: int) -> bool:
        try:
            fn(prompts[low:high], completions[low:high], extras[low:high])
        except (Exception, SystemExit):
            return True
        return False

    low, high = 0, len(completions)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fails(low, middle) else (middle, high)
    return low if low < high and fails(low, high) else None


def read_scores(
    name: str, given: Any, prompts: Sequence[str], completions: Sequence[str]
) -> Float[np.ndarray, "n"]:
    """Read what a reward function returned: float32, NaN where it said nothing (None).

    Raises:
        ValueError: not one finite number, true or false, or None for each completion.
    """
    if not isinstance(given, (list, tuple)) and not hasattr(given, "__array__"):
        raise ValueError(
            f"reward {name!r} returned a {type(given).__name__}; expected a list of one number for "
            f"each of {len(completions)} completions"
        )
    shape = np.shape(given) if hasattr(given, "__array__") else (len(given),)
    if shape != (len(completions),):
        raise ValueError(
            f"reward {name!r} gave scores of shape {shape} for {len(completions)} completions; it "
            "must return one number for each"
        )
    values = list(np.asarray(given)) if hasattr(given, "__array__") else list(given)
    found = np.full(len(values), np.nan, np.float32)
    for row, value in enumerate(values):
        if value is None:
            continue
        if isinstance(value, np.ndarray) or hasattr(value, "__array__"):
            value = np.asarray(value).item() if np.ndim(value) == 0 else value
        number = isinstance(value, (bool, int, float))
        finite = number and abs(value) <= _GREATEST  # False for NaN
        if not finite:
            kind = "" if number else f" (a {type(value).__name__})"
            raise ValueError(
                f"reward {name!r} gave {str(value)[:_EXCERPT]}{kind} at "
                f"{_place(row, prompts, completions)}; expected a finite number, or None for none"
            )
        found[row] = value
    return found


class RewardTerm(NamedTuple):
    """One reward as a config names it; nothing of it is loaded."""

    name: str
    weight: float
    kind: str  # row of ``REWARDS``
    options: dict[str, Any]


def from_json(text: str) -> dict[str, Any]:
    """Return what a command line's ``--rewards`` says: JSON, or a file of it.

    Raises:
        ValueError: not JSON, not an object, or a reward named twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name!r} is named twice; give one another name and its kind")
        return dict(pairs)

    is_file = os.path.isfile(text)
    where = text if is_file else f"--rewards={text[:_EXCERPT]}"
    try:
        found = json.loads(
            pathlib.Path(text).read_text(encoding="utf-8") if is_file else text,
            object_pairs_hook=once,
        )
    except json.JSONDecodeError as error:
        no_file = "" if is_file else "there is no such file, or "
        raise ValueError(
            f"{where}: expected JSON such as {_SUCH}, or a file of it; {no_file}it is not JSON: "
            f"{error}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected reward -> weight, got {str(found)[:_EXCERPT]}")
    return found


def read(rewards: Mapping[str, Any]) -> list[RewardTerm]:
    """Read the weighted sum that a config's ``rewards`` describes.

    Args:
        rewards: name -> weight, or options; of the options ``weight`` (default 1) and ``kind`` (a
            row of the table; default: the name) are read here, the rest goes to the row's function.

    Raises:
        ValueError: no reward at all, an unknown kind, a weight that is not a finite number, an
            option that the row does not take or of another type, or one missing.
    """
    if not rewards:
        raise ValueError(f"no reward was named; known: {', '.join(REWARDS)}")
    terms = []
    for name, given in rewards.items():
        bare = isinstance(given, (int, float))
        if not bare and not hasattr(given, "items"):
            raise ValueError(
                f"reward {name!r}: expected a weight or options such as {_SUCH}, got {given!r}"
            )
        options: dict[str, Any] = {"weight": given} if bare else dict(given.items())
        weight, kind = options.pop("weight", 1.0), options.pop("kind", name)
        if not is_number(weight):
            raise ValueError(f"reward {name!r}: weight = {weight!r:.60}: expected a finite number")
        choose(REWARDS, str(kind), "reward")
        terms.append(RewardTerm(name, float(weight), kind, options))
        _bind(terms[-1], load_model=None, mesh=None)
    return terms


def check(rewards: Mapping[str, Any], examples: Sequence[Example]) -> None:
    """Find every mistake that needs no reward model: before one is loaded.

    Raises:
        ValueError: as `resolve`, or as `WeightedRewards.check`.
    """
    terms = [term for term in read(rewards) if not _loads_model(term)]
    WeightedRewards(tuple((one.name, one.weight, _make(one)) for one in terms)).check(examples)


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
            (term.name, term.weight, _make(term, load_model=load_model, mesh=mesh))
            for term in terms
        )
    )


def _loads_model(term: RewardTerm) -> bool:
    return "load_model" in inspect.signature(REWARDS[term.kind]).parameters


def _make(term: RewardTerm, **resources: Any) -> RewardFunction:
    """Make a term's function.

    Raises:
        ValueError: what the row refuses, with the reward's name.
    """
    make = _bind(term, **resources)
    if _loads_model(term):
        return make()
    try:
        return make()
    except (ValueError, OSError, re.error) as error:
        raise ValueError(f"reward {term.name!r}: {error}") from error


def _bind(term: RewardTerm, **resources: Any) -> Callable[[], RewardFunction]:
    """Check a row's options, and give it those of the program's resources that it takes.

    A row may be any function, with options that are said nowhere but in its signature; this is the
    one place that asks it.
    """
    row = REWARDS[term.kind]
    signature = inspect.signature(row, eval_str=True)
    taken = {key: value for key, value in resources.items() if key in signature.parameters}
    try:
        signature.bind(**term.options, **taken)
    except TypeError as error:
        raise ValueError(f"reward {term.name!r}: {error}; {term.kind} takes {signature}") from None
    for name, value in term.options.items():
        parameter = signature.parameters.get(name)
        expected = None if parameter is None else parameter.annotation
        fits = isinstance(value, bool) if expected is bool else not isinstance(value, bool)
        if expected is float:
            fits = fits and is_number(value)
        elif expected in (int, str):
            fits = fits and isinstance(value, expected)
        if expected in (bool, int, float, str) and not fits:
            wanted = "a finite number" if expected is float else f"a value of {expected}"
            raise ValueError(f"reward {term.name!r}: {name} = {value!r:.60}: expected {wanted}")
    return functools.partial(row, **term.options, **taken)
