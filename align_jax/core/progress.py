# SPDX-License-Identifier: Apache-2.0
"""What a person watching a run sees: a bar on a terminal, one line every k steps anywhere else;
samples as a table."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
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


def printable(text: str) -> str:
    """Return a text that can do a terminal nothing: control characters but line ends and tabs are
    written out.

    >>> print(printable("a\\x1b[2Jb"))
    a\\x1b[2Jb
    """
    return "".join(
        one if one.isprintable() or one in "\n\t" else one.encode("unicode_escape").decode()
        for one in text
    )


def samples_table(rows: Sequence[Mapping[str, Any]], *, most: int = 4, width: int = 80) -> str:
    """Write a few samples as a table: prompt, answer (and the one it met), and what it was worth.

    Args:
        rows: with ``prompt``, ``output``, and perhaps ``other``, ``reward``, ``win``; as
            ``samples.jsonl`` holds them.
        most: rows to show, from all over.
        width: columns of the screen.

    >>> print(samples_table([{"prompt": "What is 2 + 3?", "output": "It is 5.", "reward": 1.0}]))
    prompt                        output                                      reward
    What is 2 + 3?                It is 5.                                         1
    """
    texts = ["prompt", "output", *(["other"] if any("other" in row for row in rows) else [])]
    numbers = [name for name in ("reward", "win") if any(name in row for row in rows)]
    room = width - 8 * len(numbers) - 2 * (len(texts) - 1)
    sizes = [room * 2 // (2 * len(texts) + 1), *[0] * (len(texts) - 1)]  # an answer takes more
    for place in range(1, len(texts)):
        sizes[place] = (room - sum(sizes)) // (len(texts) - place)
    heads = [_fit(name, size) for name, size in zip(texts, sizes)]
    lines = ["  ".join(heads) + "".join(f"{name:>8}" for name in numbers)]
    count = min(most, len(rows))
    for row in (rows[i * len(rows) // count] for i in range(count)):
        # of a prompt the end says most, of an answer the beginning
        cells = [_fit(_words(row.get("prompt", "")), sizes[0], end=True)]
        cells += [_fit(_words(row.get(name, "")), size) for name, size in zip(texts[1:], sizes[1:])]
        values = (row.get(name) for name in numbers)
        worth = ("" if value is None else f"{value:.4g}" for value in values)
        lines.append("  ".join(cells) + "".join(f"{one:>8}" for one in worth))
    return "\n".join(line.rstrip() for line in lines)


def last_words(text: Any) -> str:
    """Return a text, or the last of several messages."""
    if isinstance(text, Sequence) and not isinstance(text, str):
        text = text[-1].get("content", "") if text else ""
    return str(text)


def _words(text: Any) -> str:
    return " ".join(printable(last_words(text)).split())


def _fit(text: str, size: int, *, end: bool = False) -> str:
    """Cut or fill a text to so many columns of a screen, of which some characters take two."""

    def columns(one: str) -> int:
        return 0 if unicodedata.combining(one) else 1 + (unicodedata.east_asian_width(one) in "WF")

    kept, used, letters = "", 0, reversed(text) if end else iter(text)
    whole = sum(map(columns, text)) <= size
    for one in letters:
        if used + columns(one) > (size if whole else size - 1):
            break
        kept, used = kept + one, used + columns(one)
    kept = kept[::-1] if end else kept
    if not whole:
        kept, used = f"…{kept}" if end else f"{kept}…", used + 1
    return kept + " " * (size - used)


def in_notebook() -> bool:
    """Tell whether this runs in a notebook's kernel."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config


class Progress:
    """A bar (terminal, notebook) or a line every ``every_steps`` steps (pipe, file).

    Where nothing can be shown any more (the terminal was closed, a pipe's reader has ended, the
    disk of a log is full), nothing is, and what runs goes on.

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
        notebook = stream is None and in_notebook()
        if shown and (notebook or self._stream.isatty()):
            bar: Any = tqdm.tqdm
            if notebook:  # a widget where there are widgets, else text that is written over
                from tqdm import auto

                bar = auto.tqdm
            self._bar = bar(
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
        with self._muted_if_unread():
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
        with self._muted_if_unread():
            if self._bar is not None:
                self._bar.write(text, file=self._stream)
            elif self._shown:
                print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar's last state on the screen and end its line."""
        with self._muted_if_unread():
            if self._bar is not None:
                self._bar.close()

    @contextlib.contextmanager
    def _muted_if_unread(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._bar, self._shown = None, False
            # whoever writes there next, the stream's own buffer included, is not to fail
            with contextlib.suppress(OSError):  # it has no descriptor
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
