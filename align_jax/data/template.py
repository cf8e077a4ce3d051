# SPDX-License-Identifier: Apache-2.0
"""A chat template at work: today's date is one that is fixed for the run, and an end comes whatever
the template does."""

from __future__ import annotations

import contextlib
import datetime
import functools
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

SECONDS = 10.0  # that a template may run; a long conversation takes a hundredth of one
BYTES = 1 << 30  # by which memory may grow meanwhile
_EVERY = 0.05  # seconds of the processor's time between two looks
_DATE = "align_jax_date"  # where a tokenizer keeps the date


class Endless(ValueError):
    """A template that does not end, or fills the memory."""


def set_date(tokenizer: PreTrainedTokenizerBase, date: str) -> None:
    """Fix what a tokenizer's chat template is given as today.

    Args:
        tokenizer: the tokenizer.
        date: YYYY-MM-DD; "" = the day on which this is called.
    """
    tokenizer.init_kwargs[_DATE] = date or datetime.date.today().isoformat()


def date_read(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the date that a tokenizer's chat template is given; "" where it reads none."""
    if "strftime_now" not in str(tokenizer.chat_template):
        return ""
    return tokenizer.init_kwargs.get(_DATE) or datetime.date.today().isoformat()


def apply(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], **given: Any
) -> str:
    """Render messages by the tokenizer's chat template.

    Args:
        tokenizer: the tokenizer.
        messages: the conversation.
        given: what else ``apply_chat_template`` and the template take.

    Raises:
        Endless: it runs for more than ``SECONDS``, or memory grows by ``BYTES`` (on the main
            thread; elsewhere nobody looks).
    """
    if date := date_read(tokenizer):
        own = tokenizer.get_chat_template(given.get("chat_template"), given.get("tools"))
        given = {**given, "chat_template": _dated(date) + own}
    turns: Any = list(messages)
    render = functools.partial(tokenizer.apply_chat_template, turns, tokenize=False, **given)
    if threading.current_thread() is not threading.main_thread():
        return cast(str, render())
    with watched():
        _RUNNING.begin(str(tokenizer.name_or_path))
        try:
            return cast(str, render())
        finally:
            _RUNNING.name = None


@functools.lru_cache(maxsize=2)
def _dated(date: str) -> str:
    """Return a macro that stands before a template and hides the clock: templates are given no
    functions but those of their environment."""
    # noon: a template that asks for the hour is given one that is fixed, too
    noon = datetime.datetime.combine(datetime.date.fromisoformat(date), datetime.time(12))
    noon = noon.replace(tzinfo=datetime.UTC)
    codes = [f"%{flag}{letter}" for flag in ("", *_FLAGS) for letter in _LETTERS]
    written = {"%%": _PERCENT, **{code: noon.strftime(code) for code in codes}, _PERCENT: "%"}
    return (
        "{% macro strftime_now(format) %}{% set at = namespace(text=format) %}"
        f"{{% for code, text in {list(written.items())!r} %}}"
        "{% set at.text = at.text | replace(code, text) %}{% endfor %}{{ at.text }}{% endmacro %}\n"
    )


# of the formats of a date: all that the C library has
_LETTERS, _FLAGS = "aAbBcCdDeFfgGhHIjklmMnpPrRsStTuUVwWxXyYzZ", "-_0^#EO"
_PERCENT = "\u2063percent\u2063"


class _Running:
    """The template that runs just now, if one does, and what it has taken."""

    name: str | None = None
    begun = 0.0
    at_first = 0  # bytes of memory at the first look
    watched = False

    def begin(self, name: str) -> None:
        """Note that a tokenizer's template begins."""
        self.name, self.begun, self.at_first = name, time.monotonic(), 0

    def look(self, number: int, frame: Any) -> None:
        """Look at the running template.

        Raises:
            Endless: it has taken too long, or too much.
        """
        if self.name is None:
            return
        seconds, resident = time.monotonic() - self.begun, _resident()
        self.at_first = self.at_first or resident
        if seconds > SECONDS or resident - self.at_first > BYTES:
            taken = (resident - self.at_first) >> 20
            raise Endless(
                f"the chat template of the tokenizer {self.name!r} (or config.data.chat_template) "
                f"does not end: after {seconds:.1f} s it had taken {taken} MiB"
            )


_RUNNING = _Running()  # a process has one timer


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Look at the templates that run meanwhile, every ``_EVERY`` seconds of the processor's time.

    Setting the timer takes as long as a short template: many are applied under one.
    """
    if _RUNNING.watched or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _RUNNING.look)
    signal.setitimer(signal.ITIMER_VIRTUAL, _EVERY, _EVERY)
    _RUNNING.watched = True
    try:
        yield
    finally:
        _RUNNING.watched = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _resident() -> int:
    """Return the bytes of memory that this process has."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096
