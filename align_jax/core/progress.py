# SPDX-License-Identifier: Apache-2.0
"""What a person watching a run sees: a bar on a terminal, one line every k steps anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import tqdm

Values = Mapping[str, float | int]  # metric -> number on the host

# Metric -> its word on the bar, in the order of the bar; the first metric present wins its word.
SHOWN = (
    ("loss", "loss"),
    ("rewards/margins", "margin"),
    ("margin", "margin"),
    ("reward", "reward"),
    ("objective/scores", "reward"),
    ("rewards/accuracies", "accuracy"),
    ("accuracy", "accuracy"),
)


def summary(values: Values) -> dict[str, str]:
    """Pick the few metrics that fit on a line: word -> formatted number.

    >>> summary({"loss": 0.69314, "rewards/accuracies": 0.5, "tokens_per_second": 12345.6})
    {'loss': '0.6931', 'accuracy': '0.5', 'tokens/s': '12,346'}
    """
    words: dict[str, str] = {}
    for name, word in SHOWN:
        if name in values and word not in words:
            words[word] = f"{values[name]:.4g}"
    if "tokens_per_second" in values:
        words["tokens/s"] = f"{values['tokens_per_second']:,.0f}"
    return words


def duration(seconds: float) -> str:
    """Write seconds as ``h:mm:ss``.

    >>> duration(3723.4)
    '1:02:03'
    """
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class Progress:
    """A bar (terminal) or a line every ``every_steps`` steps (pipe, file, notebook's log).

    Args:
        total_steps: steps of the whole run.
        start_step: steps already done (a resumed run).
        every_steps: steps between lines where there is no terminal.
        name: what is counted, shown first.
        stream: where to write; standard error by default, so that standard output stays for
            results.
        shown: false for the processes of a pod that are not the first: nothing is written.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        every_steps: int = 10,
        name: str = "train",
        stream: Any = None,
        shown: bool = True,
    ):
        self._stream = stream or sys.stderr
        self._total, self._step, self._every = total_steps, start_step, every_steps
        self._name, self._shown = name, shown
        self._line = start_step
        # the first step held the compilation: time counts from its end
        self._first: tuple[int, float] | None = None
        self._bar = None
        if shown and self._stream.isatty():
            self._bar = tqdm.tqdm(
                total=total_steps,
                initial=start_step,
                desc=name,
                unit="step",
                file=self._stream,
                dynamic_ncols=True,
                mininterval=0.2,
            )

    def update(self, step: int, values: Values) -> None:
        """Show that ``step`` steps are done, with the newest metrics."""
        done, self._step = step - self._step, step
        self._first = self._first or (step, time.monotonic())
        if self._bar is not None:
            self._bar.set_postfix(summary(values), refresh=False)
            self._bar.update(done)
        elif self._shown and (step - self._line >= self._every or step == self._total):
            self._line = step
            words = "  ".join(f"{word} {number}" for word, number in summary(values).items())
            steps, spent = step - self._first[0], time.monotonic() - self._first[1]
            left = f"  {duration(spent / steps * (self._total - step))} left" if steps else ""
            print(
                f"{self._name} step {step}/{self._total}  {words}{left}",
                file=self._stream,
                flush=True,
            )

    def note(self, text: str) -> None:
        """Print a line of its own, above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._shown:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar's last state on the screen and end its line."""
        if self._bar is not None:
            self._bar.close()
