# SPDX-License-Identifier: Apache-2.0
"""The user's own reward function: found, and asked by its signature what it takes, at the start.

    f(prompts, completions, extras)                     extras: each row's columns, a dict a row
    f(completions, **columns), f(prompts, completions, answer)    TRL's: each column as a list

TRL's form is called by keyword.  Where the data's prompts are turns, prompts and completions are
turns too, as TRL passes them.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import inspect
import os
import sysconfig
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import FrameType
from typing import Any

from align_jax.core import own
from align_jax.core.choose import choose, nearest
from align_jax.online import deadline

Extras = Sequence[Mapping[str, Any]]
Scores = Sequence[float | None]  # None: this reward says nothing of that completion
RewardFunction = Callable[[Sequence[str], Sequence[str], Extras], Scores]

_KINDS = inspect.Parameter
# what TRL's trainers pass beside the columns
_TRAINERS = ("completion_ids", "trainer_state", "log_extra", "log_metric", "environments")


@dataclasses.dataclass(frozen=True)
class Columned:
    """A reward function that reads columns of the data.

    Attributes:
        fn: the function.
        check: takes a row's columns; a ValueError says which it lacks, or what is wrong in one.
    """

    fn: RewardFunction
    check: Callable[[Mapping[str, Any]], Any]

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], extras: Extras
    ) -> Scores:
        return self.fn(prompts, completions, extras)


class RowError(ValueError):
    """A reward that cannot be given.

    Attributes:
        row: which of the completions it is about.
    """

    def __init__(self, row: int, message: str) -> None:
        super().__init__(message)
        self.row = row


def find(path: str, what: str = "a reward function", classes: bool = False) -> Callable[..., Any]:
    """Return the function that ``module:function`` names.

    Args:
        path: its name.
        what: it is for, in messages.
        classes: it may be a class.

    Raises:
        ValueError: a path not of that form, a module that cannot be imported, no such function.
    """
    kind = "function or class" if classes else "function"
    found = own.load(path, what, kind)
    if (inspect.isclass(found) and not classes) or not callable(found):
        raise ValueError(f"{path!r} is a {type(found).__name__}; expected a {kind}")
    return found


def adapt(fn: Callable[..., Any], path: str, options: Mapping[str, Any]) -> RewardFunction:
    """Make a reward function of the user's, whichever of the two forms it has.

    Args:
        fn: the user's; its result may be awaitable.
        path: its name, for messages.
        options: bound as keywords.

    Raises:
        ValueError: an option that it does not take, or a parameter that nothing gives.
    """
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):
        raise ValueError(f"{path!r} does not say what it takes; wrap it in a function") from None
    kinds = {one.kind for one in parameters.values()}
    anything = _KINDS.VAR_KEYWORD in kinds
    named = {
        name: one
        for name, one in parameters.items()
        if one.kind in (_KINDS.POSITIONAL_OR_KEYWORD, _KINDS.KEYWORD_ONLY)
    }
    for name in options:
        if name not in named and not anything:
            raise ValueError(f"{path!r} takes no option {name!r}{nearest(name, named)}")
    needed = {
        name for name, one in named.items() if one.default is _KINDS.empty and name not in options
    }
    if "extras" in named or (_KINDS.VAR_POSITIONAL in kinds and "completions" not in named):
        return _by_position(fn, path, needed, options)
    if "completions" not in named and not anything:
        raise ValueError(
            f"{path!r} takes ({', '.join(parameters)}); expected (prompts, completions, extras), "
            "or (completions, **columns) as TRL has it"
        )
    for name in needed & set(_TRAINERS):
        raise ValueError(
            f"{path!r} needs {name!r}, which TRL's trainers give and nothing here does"
        )
    if _KINDS.POSITIONAL_ONLY in kinds:
        raise ValueError(f"{path!r} takes a parameter by position only; expected keywords")
    columns = needed - {"prompts", "completions"}
    return _by_keyword(fn, named, columns, anything, options)


def _by_position(
    fn: Callable[..., Any], path: str, needed: set[str], options: Mapping[str, Any]
) -> RewardFunction:
    try:
        inspect.signature(fn).bind([], [], [], **options)
    except TypeError as error:
        raise ValueError(f"{path!r}(prompts, completions, extras): {error}") from None

    def score(prompts: Sequence[str], completions: Sequence[str], extras: Extras) -> Scores:
        return awaited(fn(prompts, completions, extras, **options))

    return score


def _by_keyword(
    fn: Callable[..., Any],
    named: Mapping[str, Any],
    columns: set[str],
    anything: bool,
    options: Mapping[str, Any],
) -> RewardFunction:
    def check(row: Mapping[str, Any]) -> None:
        for name in sorted(columns):
            choose(row, name, "the reward's column")

    def score(prompts: Sequence[str], completions: Sequence[str], extras: Extras) -> Scores:
        for row in extras:
            check(row)
        told = {key for row in extras for key in row if key != "messages" or key in named}
        given: dict[str, Any] = {
            key: [row.get(key) for row in extras] for key in told if anything or key in named
        }
        turns = [row.get("messages") for row in extras]
        given["prompts"] = [own or text for own, text in zip(turns, prompts, strict=True)]
        given["completions"] = [
            row.get("turns", [{"role": "assistant", "content": text}]) if own else text
            for row, own, text in zip(extras, turns, completions, strict=True)
        ]
        taken = {key: value for key, value in given.items() if anything or key in named}
        return awaited(fn(**(taken | dict(options))))

    return Columned(score, check)


def awaited(found: Any) -> Any:
    """Return what a user's function gave, once it is there: waiting is done in a thread, since a
    notebook's own has a loop that runs already."""
    if not inspect.isawaitable(found):
        return found

    async def wait(one: Awaitable[Any]) -> Any:
        return await one

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, wait(found)).result()


def limited(fn: RewardFunction, seconds: float) -> RewardFunction:
    """Give a reward function so many seconds for a call; 0 = for ever."""

    def score(prompts: Sequence[str], completions: Sequence[str], extras: Extras) -> Scores:
        def describe(frame: FrameType | None) -> str:
            line = line_in(traceback.extract_stack(frame)) if frame else ""
            row = _row_in(frame, completions)
            return (
                f"no answer within timeout_seconds = {seconds:g} for {len(completions)} completions"
                + (f"; it is at {line}" if line else "")
                + ("" if row is None else f", row {row} (completion {completions[row][:60]!r})")
            )

        return deadline.call(lambda: fn(prompts, completions, extras), seconds, describe)

    return dataclasses.replace(fn, fn=score) if isinstance(fn, Columned) else score


def _row_in(frame: FrameType | None, completions: Sequence[str]) -> int | None:
    """Return which completion a function is at, by the variables of its innermost loop."""
    while frame is not None:
        for value in frame.f_locals.values():
            turns = isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict)
            text = value[0].get("content") if turns else value
            for row, completion in enumerate(completions):
                if text is completion:
                    return row
        frame = frame.f_back
    return None


def line_of(error: BaseException) -> str:
    """Return where in the user's own code an error arose, ``file:line``; "" where in none."""
    return line_in(traceback.extract_tb(error.__traceback__))


def line_in(stack: Sequence[traceback.FrameSummary]) -> str:
    """Return where in the user's own code a stack ends, ``file:line``; "" where in none."""
    libraries = (os.path.dirname(os.path.dirname(__file__)), *sysconfig.get_paths().values())
    frames = [
        f"{one.filename}:{one.lineno}"
        for one in stack
        if not one.filename.startswith((*libraries, "<frozen"))
    ]
    return frames[-1] if frames else ""
