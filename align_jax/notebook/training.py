# SPDX-License-Identifier: Apache-2.0
"""Training from Python."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from align_jax.notebook.asked import AnyConfig, ask
from align_jax.notebook.mistakes import told
from align_jax.notebook.result import Result
from align_jax.runs import command, loop

OnLog = Callable[[int, Mapping[str, float | int]], Any]


class _Told:
    """A writer of metrics that tells a function."""

    def __init__(self, on_log: OnLog):
        self._on_log = on_log

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """Tell one row."""
        self._on_log(step, dict(values))

    def flush(self) -> None:
        """Do nothing: nothing is kept back."""

    def close(self) -> None:
        """Do nothing."""


@told
def train(
    config: AnyConfig = "dpo",
    data: Any = None,
    eval_data: Any = None,
    *,
    model: str | os.PathLike[str] = "",
    workdir: str | os.PathLike[str] = "",
    on_log: OnLog | None = None,
    **keys: Any,
) -> Result:
    """Train, and return what became of it; resume if the workdir holds a run of the same config.

    Rows from Python pass the same reader as a file's, and are told by number (``data[17]``) where
    one is wrong.  A run that goes on is refused other rows than it began with.  Ctrl-C, or a
    notebook's stop button, saves and stops; the same call goes on.

    Args:
        config: an objective ("dpo", "kto", "grpo", "online_dpo", ...: an adapter for your model), a
            recipe ("dpo_7b", "tiny:dpo"), a config file, a config, or a dict of its keys.
        data: what to train on: dicts in a list, a pandas or polars frame, an Arrow table, a
            ``datasets.Dataset``, a Grain source or an iterable, which is read to its end; or the
            name of a source ("pairs.jsonl", "hf:owner/name:train").
        eval_data: likewise, to evaluate on; None: a part of the prompts is held out.
        model: directory or hub id of a Hugging Face checkpoint.
        workdir: the run's folder, a local path or gs://...; "" = a temporary one, which lasts as
            long as the result does.
        on_log: is called with (step, metrics) for each row that is logged, evaluations too, whose
            metrics begin with "eval/"; an exception from it ends the run.
        keys: of the config, changed: a group's in a dict (``optimizer={"learning_rate": 1e-5}``) or
            dotted, as those of ``model`` and ``data`` are (``**{"data.columns": {...}}``).
            ``rewards`` may be functions.

    Raises:
        ValueError, KeyError, FileNotFoundError: a mistake in the config, the rows, the model or the
            workdir.
        TypeError: data that is none.
        FloatingPointError: a loss that is not finite.

    >>> import align_jax
    >>> rows = [{"prompt": f"{n}?", "chosen": "Yes.", "rejected": "No."} for n in range(40)]
    >>> result = align_jax.train("tiny:dpo", rows, batch_size=8, total_steps=20)  # doctest: +SKIP
    >>> result.metrics[-1]["eval/rewards/accuracies"]  # doctest: +SKIP
    1.0
    >>> result.generate("7?")  # doctest: +SKIP
    'Yes.'
    """
    if on_log is not None and not callable(on_log):
        raise TypeError(f"on_log: expected a function of (step, metrics), got {on_log!r:.60}")
    if workdir:
        command.writable(os.fspath(workdir), "workdir", folder=True)
    asked = ask(config, data, eval_data, model, keys)
    temporary = None if workdir else tempfile.TemporaryDirectory(prefix="align_jax_")
    folder = os.fspath(workdir) if temporary is None else os.path.join(temporary.name, "run")
    told = [] if on_log is None else [_Told(on_log)]
    loop.train(asked.config, folder, given=asked.given, writers=told)
    return Result(folder, temporary=temporary)
