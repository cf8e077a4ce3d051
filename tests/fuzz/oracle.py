# SPDX-License-Identifier: Apache-2.0
"""The judge of all fuzzed borders: what goes in is used as it was meant, or refused by name.

    case ─► act ─┬─► a value ─► check: is that what was given?          accepted, or wrong
                 ├─► ValueError with one of ``names``, a few lines      refused
                 ├─► anything else that is raised, or no name           raw
                 └─► more than a few seconds                            hang

The short form (a few dozen cases of each border, the same ones every time) fails at the first
fault.  With ``ALIGN_JAX_FUZZ_CASES`` set to a number it is a campaign: so many random cases of each
border, all faults counted, a few of each shown.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import re
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import hypothesis

CASES = int(os.environ.get("ALIGN_JAX_FUZZ_CASES", "0"))  # of each border; 0 = the short form
SHORT = 25
SECONDS = 5.0  # of CPU, for one case
MOST_LINES, MOST_CHARACTERS = 12, 3000  # of a message
REFUSALS = (ValueError, FileNotFoundError, ConnectionError, SystemExit)

Value = TypeVar("Value")


@dataclasses.dataclass
class Tally:
    """What came of a border's cases; ``faults``: the kind of a fault -> cases that show it."""

    accepted: int = 0
    refused: int = 0
    raw: int = 0
    wrong: int = 0
    hangs: int = 0
    seconds: float = 0.0
    faults: dict[str, list[str]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(list)
    )


TALLIES: dict[str, Tally] = collections.defaultdict(Tally)


class Wrong(AssertionError):
    """What was accepted is not what was given."""


class Hang(BaseException):
    """A case took too long; no library may catch it."""


def same(found: Any, expected: Any, what: str) -> None:
    """Raise Wrong where two values differ."""
    if found != expected:
        raise Wrong(f"{what}: expected {expected!r}, got {found!r}")


def fuzzed(*, short: int = SHORT, share: float = 1.0) -> Callable[[Any], Any]:
    """Return the settings of a border's test: ``short`` cases, or a campaign's ``share``."""
    return hypothesis.settings(
        max_examples=max(1, round(CASES * share)) if CASES else short,
        derandomize=not CASES,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate)
        + (() if CASES else (hypothesis.Phase.shrink,)),
    )


def judge(
    border: str,
    case: Any,
    act: Callable[[], Value],
    *,
    names: Sequence[str],
    check: Callable[[Value], None] = lambda value: None,
) -> None:
    """Let a case pass a border and say what came of it.

    Args:
        border: its name in the report.
        case: what is shown of a fault.
        act: passes the border.
        names: a refusal's message must hold one of them: a file with a line, a key.
        check: raises Wrong where an accepted value is not what was given.

    Raises:
        AssertionError: a fault, in the short form.
    """
    tally, started = TALLIES[border], time.process_time()
    fault = ""
    try:
        with _alarm():
            value = act()
            try:
                check(value)
                tally.accepted += 1
            except Wrong as error:
                fault = f"wrong: {error}"
                tally.wrong += 1
    except Hang as error:
        fault = f"hang: {_place(error)}"
        tally.hangs += 1
    except REFUSALS as error:
        problem = _problem(error, names)
        tally.refused += not problem
        tally.raw += bool(problem)
        fault = problem and f"raw: {problem} {_place(error)}"
    # whatever it is: that is the fault
    except BaseException as error:
        fault = f"raw: {type(error).__name__}: {str(error)[:150]} {_place(error)}"
        tally.raw += 1
    seconds = time.process_time() - started
    tally.seconds += seconds
    if not fault and seconds > SECONDS:
        fault = f"hang: {seconds:.0f} s"
        tally.hangs += 1
    if fault:
        tally.faults[fault].append(repr(case)[:400])
        if not CASES:
            raise AssertionError(f"{border}: {fault}")


def _problem(error: BaseException, names: Sequence[str]) -> str:
    """Say what is wrong with a refusal; "" where nothing is."""
    kind, text = type(error), str(error)
    if kind not in REFUSALS and not kind.__module__.startswith("align_jax"):
        return f"{kind.__name__}: {text[:150]}"
    if re.search("object is not|has no attribute|positional argument|must be .*, not ", text):
        return f"a library's words: {text[:150]}"
    if not any(name in text for name in names):
        return f"without a name: {text[:150]}"
    if text.count("\n") >= MOST_LINES or len(text) > MOST_CHARACTERS:
        return f"{text.count(chr(10)) + 1} lines, {len(text)} characters: {text[:80]}"
    return ""


def _place(error: BaseException) -> str:
    """Say where in the package an error came from."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "/align_jax/" in frame.filename
    ]
    return (
        ""
        if not frames
        else f"({frames[-1].filename.rpartition('/align_jax/')[2]}:{frames[-1].lineno})"
    )


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    """Raise Hang when a case does not end."""

    def ring(number: int, frame: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 4 * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
