# SPDX-License-Identifier: Apache-2.0
"""Rewards: what a completion is worth, by whom it is said, and the weighted sum.

    {"numeric": 1.0, "model": {"weight": 0.5, "path": ...}} ─ resolve ─► WeightedRewards

A row of ``REWARDS`` takes options and returns a *reward function*

    (prompts, completions, extras) -> one number for each completion, or None: nothing to say

where ``extras`` holds the columns of the data's row (a gold answer, a level), and of a sample
``finished``: whether it ended by itself.  Nothing here is random, and nothing depends on the other
completions of the batch, so a score never depends on how completions were batched.
Rules on texts are in ``rules``, language models that judge in ``judges``, process rewards in
``steps``, the user's own functions in ``functions``.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from align_jax.core.choose import choose
from align_jax.core.fields import is_number
from align_jax.core.schema import Example
from align_jax.data.tokenizer import load_tokenizer
from align_jax.inference.score import RewardModel
from align_jax.models.model import LoadedModel
from align_jax.online import functions, judges, rules
from align_jax.online.comparisons import Compared, Judge, compare
from align_jax.online.deadline import OutOfTime
from align_jax.online.functions import Columned, Extras, RewardFunction, RowError, Scores
from align_jax.online.judges import PairJudge
from align_jax.online.steps import StepReward, StepRewards, process

LoadModel = Callable[..., LoadedModel]  # runs.weights.load_model
Reward = RewardFunction | StepReward | PairJudge  # the last two for rollouts alone

_SUCH = '{"numeric": 1.0, "short": {"kind": "length", "target": 50, "weight": 0.5}}'
_GREATEST = float(np.finfo(np.float32).max)
_EXCERPT = 60  # characters of a prompt or a completion in a message


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


def function(path: str, timeout_seconds: float = 3600.0, **options: Any) -> RewardFunction:
    """Use your own reward function, ``module:function``; options are bound as keywords.

    It takes (prompts, completions, extras), or what TRL gives: (completions, **columns); see
    ``functions``.

    Args:
        path: its module, as it is imported, and its name.
        timeout_seconds: for one call, a step's completions together; 0 = for ever.
        options: the function's own.

    Raises:
        ValueError: no such function, one that takes what nothing gives, or a negative limit.
        TimeoutError: when called, it takes longer.
    """
    if timeout_seconds < 0:
        raise ValueError(f"timeout_seconds = {timeout_seconds:g}: expected 0 or above")
    return functions.limited(functions.adapt(functions.find(path), path, options), timeout_seconds)


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
        load_model(
            path, mesh=mesh, compute_dtype=compute_dtype, heads=("score",), max_length=max_length
        ),
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


REWARDS: Mapping[str, Callable[..., Reward]] = {
    "exact": rules.exact,
    "numeric": rules.numeric,
    "regex": rules.regex,
    "format": rules.has_format,
    "length": rules.length,
    "lexicon": rules.lexicon,
    "function": function,
    "environment": environment,
    "model": model,
    "process": process,
    "judge": judges.judge,
    "pair_judge": judges.pair_judge,
}


@dataclasses.dataclass(frozen=True)
class WeightedRewards:
    """A weighted sum of reward functions.

    Attributes:
        terms: (name, weight, function) of each.
        step_terms: the same of those whose rewards stand at the ends of steps.
        pairs: name and judge, where a prompt's completions are compared; it is then the only one.
    """

    terms: tuple[tuple[str, float, RewardFunction], ...]
    step_terms: tuple[tuple[str, float, StepReward], ...] = ()
    pairs: tuple[str, Judge] | None = None

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
            The weighted sum, float32 [n], of the rewards that said something (0 where none
            did), and each reward by itself, unweighted, NaN where it said nothing.

        Raises:
            ValueError: a function that fails, or returns another number of scores, or one that is
                not a finite number.
            ConnectionError: as ``inference.client.Client.post``.
            TimeoutError: a function that takes longer than its ``timeout_seconds``.
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

    def of_steps(
        self, prompts: Sequence[str], completions: Sequence[str], extras: Extras
    ) -> tuple[list[StepRewards], dict[str, Float[np.ndarray, "n"]]]:
        """Score the completions' steps.

        Args:
            prompts, completions, extras: as for whole completions.

        Returns:
            Each completion's steps, in their order, with the weighted sum of their rewards, and
            each term's mean over a completion's steps, unweighted, NaN where it has none.

        Raises:
            ValueError: a function that fails.
        """
        sums: list[dict[int, float]] = [{} for _ in completions]
        parts = {}
        for name, weight, term in self.step_terms:
            given = _ask(name, term.fn, prompts, completions, extras)
            parts[name] = np.full(len(completions), np.nan, np.float32)
            for i, steps in enumerate(given):
                for end, reward in steps:
                    sums[i][end] = sums[i].get(end, 0.0) + weight * reward
                if steps:
                    parts[name][i] = np.mean([reward for _, reward in steps])
        return [sorted(one.items()) for one in sums], parts

    def compared(
        self, prompts: Sequence[str], completions: Sequence[Sequence[str]], own: int, facing: bool
    ) -> list[Compared] | None:
        """Let the judge of pairs compare each prompt's completions; None where there is no such
        judge.

        Args:
            prompts, completions, own, facing: as ``comparisons.compare`` takes them.

        Raises:
            ValueError, ConnectionError: as the judge.
        """
        if self.pairs is None:
            return None
        name, judge = self.pairs
        asked = functools.partial(_ask, name, judge)
        return compare(asked, prompts, completions, own, facing=facing)

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
    fn: Callable[..., Any],
    prompts: Sequence[str],
    completions: Sequence[str],
    extras: Sequence[Any],
) -> Any:
    """Call a reward function, or a judge of pairs, which takes other completions for columns.

    Raises:
        ValueError, ConnectionError, TimeoutError: whatever it raised, with its name, the row and
            the place.
    """
    try:
        return fn(prompts, completions, extras)
    except ConnectionError as error:
        raise ConnectionError(f"reward {name!r}: {error}") from error
    except OutOfTime as error:
        raise OutOfTime(f"reward {name!r}: {error}") from None
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
    fn: Callable[..., Any],
    prompts: Sequence[str],
    completions: Sequence[str],
    extras: Sequence[Any],
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
        if isinstance(kind, str) and ":" in kind:
            own = {kind.rpartition(":")[2]: {"kind": "function", "path": kind}}
            raise ValueError(f"reward {kind!r}: a function of yours is named {json.dumps(own)}")
        choose(REWARDS, str(kind), "reward")
        terms.append(RewardTerm(name, float(weight), kind, options))
        _bind(terms[-1], load_model=None, mesh=None)
    return terms


def check(rewards: Mapping[str, Any], examples: Sequence[Example]) -> None:
    """Find every mistake that needs no reward model: before one is loaded.

    Raises:
        ValueError: as `resolve`, or as `WeightedRewards.check`.
    """
    made = [(x.name, x.weight, _make(x)) for x in read(rewards) if not _loads_model(x)]
    _sorted(made).check(examples)


def resolve(
    rewards: Mapping[str, Any],
    *,
    load_model: LoadModel,
    mesh: Mesh | None = None,
    online: bool = False,
) -> WeightedRewards:
    """Build the weighted sum that a config's ``rewards`` describes.

    Args:
        rewards: as `read` takes them.
        load_model: reads the checkpoints of rows that run a model.
        mesh: where these models run; None: the default device.
        online: they are a rollout's: some may stand at the ends of steps, or compare completions.

    Raises:
        ValueError: as `read`, or a value that the row refuses.
    """
    terms = read(rewards)
    if not online:
        refuse_steps(terms, "here each completion has one")
        for term in terms:
            if term.kind == "pair_judge":
                raise ValueError(
                    f"reward {term.name!r} compares a prompt's completions, and here each has a "
                    "number of its own: kind 'judge' rates them; python -m align_jax.evaluate "
                    "--eval=win_rate=SOURCE --judge=URL compares with a reference"
                )
    made = [
        (term.name, term.weight, _make(term, load_model=load_model, mesh=mesh)) for term in terms
    ]
    return _sorted(made)


def _sorted(made: Sequence[tuple[str, float, Reward]]) -> WeightedRewards:
    """Sort rewards by what they are of."""
    special = (StepReward, PairJudge)
    return WeightedRewards(
        tuple((name, w, fn) for name, w, fn in made if not isinstance(fn, special)),
        tuple((name, w, fn) for name, w, fn in made if isinstance(fn, StepReward)),
        next(((name, fn) for name, _, fn in made if isinstance(fn, PairJudge)), None),
    )


def gives_steps(term: RewardTerm) -> bool:
    """Tell whether a reward stands at the ends of steps."""
    return term.kind == "process" and not term.options.get("aggregate")


def refuse_steps(terms: Sequence[RewardTerm], why: str) -> None:
    """Refuse rewards that stand at the ends of steps.

    Args:
        terms: the rewards.
        why: what is given one number a completion, for the message.

    Raises:
        ValueError: the first of them, and what to give instead.
    """
    for term in terms:
        if gives_steps(term):
            raise ValueError(
                f"reward {term.name!r} gives a number a step, and {why}: set its aggregate to "
                "'min', 'product', 'mean' or 'last'"
            )


def _loads_model(term: RewardTerm) -> bool:
    return "load_model" in inspect.signature(REWARDS[term.kind]).parameters


def _make(term: RewardTerm, **resources: Any) -> Reward:
    """Make a term's function.

    Raises:
        ValueError: what the row refuses, with the reward's name.
    """
    make = _bind(term, **resources)
    # where a model is loaded, a checkpoint that is not there stays what it is, with its path
    refused = (ValueError,) if _loads_model(term) else (ValueError, OSError, re.error)
    try:
        return make()
    except refused as error:
        raise ValueError(f"reward {term.name!r}: {error}") from error


def _bind(term: RewardTerm, **resources: Any) -> Callable[[], Reward]:
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
