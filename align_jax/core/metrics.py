# SPDX-License-Identifier: Apache-2.0
"""Metrics: means kept on the device, fetched one step late, written as JSON lines and wherever else
was asked.

    step n runs on the device ──────────► its metrics are copied to the host while step n+1 runs
    push(n, metrics) starts the copy and hands back step n-1's numbers, which have arrived: the
    device never waits.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import pathlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from align_jax.core.files import write_text, writing
from align_jax.core.progress import Progress, Values, last_words, samples_table


class Least(NamedTuple):
    """A metric of which several batches have the least; infinite where there is none."""

    value: Any


class Greatest(NamedTuple):
    """A metric of which several batches have the greatest; -infinite where there is none."""

    value: Any


# metric -> (weighted sum, sum of the weights): scalars, or of a sum of terms a vector with an entry
# for each, whose quotients are added; or an extreme
Sums = Mapping[str, tuple[Any, Any] | Least | Greatest]
# of an interval the last value is written; of all others the mean over its steps
LAST = ("learning_rate",)
# a bucket's objects cannot be appended to: the file is written anew, at most this often
UPLOAD_SECONDS = 30.0
_log = logging.getLogger(__name__)


def add_sums(total: Sums | None, new: Sums) -> dict[str, Any]:
    """Add one batch's (sum, weight) pairs to the running ones, on the device, without a
    transfer."""
    if total is None:
        return dict(new)
    if total.keys() != new.keys():
        raise ValueError(f"metrics changed between batches: {sorted(total.keys() ^ new.keys())}")
    return _added(dict(total), dict(new))


@jax.jit  # one program, where each metric's own operations are dozens
def _added(total: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    pairs = jax.tree.map(lambda a, b: jnp.stack([a, b]), total, new)
    return {name: join(pair) for name, pair in pairs.items()}


def join(stacked: Any) -> Any:
    """Reduce one metric of several batches, stacked along a first axis."""
    if isinstance(stacked, Least):
        return Least(stacked.value.min(axis=0))
    if isinstance(stacked, Greatest):
        return Greatest(stacked.value.max(axis=0))
    total, weight = stacked
    return total.sum(axis=0), weight.sum(axis=0)


def divide(sums: Sums, empty: float = math.nan) -> dict[str, jax.Array]:
    """Divide scalar sums on the device; ``empty`` where the weight is 0."""

    def quotient(one: Any) -> jax.Array:
        if isinstance(one, (Least, Greatest)):
            return jnp.where(jnp.isfinite(one.value), one.value, empty)
        total, weight = one
        return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), empty)

    return with_margin({name: quotient(one) for name, one in sums.items()})


def means(sums: Sums) -> dict[str, float]:
    """Fetch sums once and divide; NaN where no weight is above 0.

    >>> means({"accuracy": (3.0, 4.0), "loss": (np.array([1.0, 3.0]), np.array([2.0, 4.0]))})
    {'accuracy': 0.75, 'loss': 1.25}
    """
    found = {}
    for name, one in jax.device_get(dict(sums)).items():
        if isinstance(one, (Least, Greatest)):
            found[name] = float(one.value) if math.isfinite(one.value) else math.nan
            continue
        total, weight = (np.atleast_1d(np.asarray(x, np.float64)) for x in one)
        real = weight > 0
        found[name] = float((total[real] / weight[real]).sum()) if real.any() else math.nan
    return with_margin(found)


def with_margin(values: Mapping[str, Any]) -> dict[str, Any]:
    """Add the margin that unpaired feedback lacks: the chosen rewards' mean less the rejected
    ones'.

    >>> with_margin({"rewards/chosen": 1.5, "rewards/rejected": 1.0})["rewards/margins"]
    0.5
    """
    if "rewards/chosen" not in values or "rewards/margins" in values:
        return dict(values)
    return {**values, "rewards/margins": values["rewards/chosen"] - values["rewards/rejected"]}


def check_finite(
    values: Values, *, step: int, saved: int | None, position: Callable[[], str]
) -> None:
    """Stop the run at the first non-finite loss or gradient norm.

    Args:
        values: the step's metrics on the host.
        step: the step they belong to.
        saved: the last step of which a good checkpoint exists; None: there is none.
        position: says the rows of that step (``train.jsonl:7, ...``); asked only where one is bad,
            for a run from a cache has not read them.

    Raises:
        FloatingPointError: the loss or the gradient norm is infinite or not a number.
    """
    bad = {
        name: values[name]
        for name in ("loss", "grad_norm")
        if name in values and not math.isfinite(values[name])
    }
    if bad:
        raise FloatingPointError(
            f"step {step}: {', '.join(f'{name} is {value}' for name, value in bad.items())}. Last "
            f"good checkpoint: {'none' if saved is None else f'step {saved}'}. Rows: {position()}. "
            "Look at these rows, lower optimizer.learning_rate or optimizer.clip_norm, or find the "
            "operation with --config.debug.nan_check=True"
        )


@runtime_checkable
class Writer(Protocol):
    """Where rows of metrics go."""

    def write(self, step: int, values: Values) -> None:
        """Write one row; ``step`` counts finished optimizer steps."""

    def flush(self) -> None:
        """Let nothing that was written be lost if the process is killed now."""

    def close(self) -> None:
        """Write what is still buffered."""


@runtime_checkable
class SampleWriter(Protocol):
    """A writer that shows samples, too."""

    def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show samples, as ``samples.jsonl`` holds them."""


SAMPLE_FIELDS = ("prompt", "output", "reward", "finish")  # what a dashboard's table has of a sample


def _cells(rows: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    return [
        [last_words(row["prompt"]), *(row.get(name) for name in SAMPLE_FIELDS[1:])] for row in rows
    ]


class JsonLines:
    """Rows of a run, an object a line: ``metrics.jsonl``, ``samples.jsonl``.

    A resumed run drops the rows after the step that it resumes from, because it will write them
    again; a line that a crash cut short is dropped too.

    Args:
        path: a local path or ``gs://...``; a local file is appended to, an object written anew
            every half minute.
        start_step: the step that the run resumes from; below 0 for one that begins.
    """

    def __init__(self, path: str | epath.PathLike, *, start_step: int = 0):
        self._path = epath.Path(path)
        self._remote = "://" in str(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps(row) + "\n" for row in read_rows(self._path) if row["step"] <= start_step
        ]
        self._lines, self._uploaded = lines, time.monotonic()
        self._upload: threading.Thread | None = None
        if self._remote:
            write_text(self._path, "".join(lines))
        else:
            whole = pathlib.Path(f"{self._path}.tmp")
            write_text(whole, "".join(lines))
            whole.replace(str(self._path))  # atomic: a crash here leaves the old file
            self._file = open(str(self._path), "a", encoding="utf-8", buffering=1)

    def write(self, step: int, values: Values) -> None:
        """Append a step's metrics; a number that is not finite is null (JSON has no NaN)."""
        numbers = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.append({"step": step, "time": round(time.time(), 3), **numbers})

    def append(self, row: Mapping[str, Any]) -> None:
        """Append one row."""
        line = json.dumps(row, default=str) + "\n"
        if not self._remote:
            with writing(self._path):
                self._file.write(line)
            return
        self._lines.append(line)
        busy = self._upload is not None and self._upload.is_alive()
        if time.monotonic() - self._uploaded > UPLOAD_SECONDS and not busy:
            self._uploaded = time.monotonic()
            self._upload = threading.Thread(
                target=self._path.write_text, args=("".join(self._lines),), daemon=True
            )
            self._upload.start()

    def flush(self) -> None:
        """Write what is still buffered, so that a checkpoint that follows has no row behind it
        missing; a local file's rows are written one by one."""
        if self._remote:
            try:
                self._upload_now()
            except OSError as error:  # the next flush, or the end, writes them all
                _log.warning("%s could not be written: %s", self._path, error)

    def close(self) -> None:
        """Write what is still buffered."""
        if self._remote:
            self._upload_now()
        else:
            with writing(self._path):  # what a full disk has not taken is tried once more
                self._file.close()

    def _upload_now(self) -> None:
        if self._upload is not None:
            self._upload.join()  # an older state of the file must not land after the last one
        self._path.write_text("".join(self._lines))
        self._uploaded = time.monotonic()


def read_rows(path: str | epath.PathLike) -> list[dict[str, Any]]:
    """Read what ``JsonLines`` wrote, without a last line that a crash cut short; no file, no rows.

    Raises:
        ValueError: a line before the last one is not a JSON object with ``step``.
    """
    path = epath.Path(path)
    if not path.exists():
        return []
    # by bytes: other line ends may stand in a text, and a crash may cut a character in two
    rows, lines = [], [line for line in path.read_bytes().split(b"\n") if line]
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["step"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path}:{number}: expected a JSON object with 'step', got {line[:80]!r}"
            ) from error
        rows.append(row)
    return rows


class TensorBoard:
    """Event files in ``WORKDIR/tensorboard``, through tensorboardX (no TensorFlow)."""

    def __init__(self, folder: str, *, start_step: int = 0):
        import tensorboardX  # here, because few runs want it

        self._writer = tensorboardX.SummaryWriter(
            folder, purge_step=start_step + 1 if start_step else None
        )

    def write(self, step: int, values: Values) -> None:
        """Write one scalar for each metric."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write samples as one text, each indented: Markdown then takes nothing for its own."""
        parts = []
        for row in _cells(rows):
            said = [f"{name}: {cell}" for name, cell in zip(SAMPLE_FIELDS, row)]
            parts.append("\n".join(f"    {line}" for one in said for line in one.splitlines()))
        self._writer.add_text("samples", "\n\n---\n\n".join(parts), step)

    def flush(self) -> None:
        """Write the events so far."""
        self._writer.flush()

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


class Wandb:
    """Weights & Biases; the run's id is kept in ``WORKDIR/wandb_id``, so that a resumed run goes on
    in the same one."""

    def __init__(self, workdir: str, project: str, config: Mapping[str, Any]):
        import wandb  # here, because few runs want it

        path = epath.Path(workdir) / "wandb_id"
        name = path.read_text().strip() if path.exists() else wandb.util.generate_id()
        path.write_text(name)
        self._run = wandb.init(project=project, id=name, resume="allow", config=dict(config))

    def write(self, step: int, values: Values) -> None:
        """Log one row."""
        self._run.log(dict(values), step=step)

    def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log samples as a table."""
        import wandb

        table = wandb.Table(columns=list(SAMPLE_FIELDS), data=_cells(rows))
        self._run.log({"samples": table}, step=step)

    def flush(self) -> None:
        """Do nothing: rows go out in the background."""

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class Trackio:
    """Trackio, which keeps runs on this machine (or in a Space); the run's name is kept in
    ``WORKDIR/trackio_name``, so that a resumed run goes on in the same one."""

    def __init__(self, workdir: str, project: str, config: Mapping[str, Any]):
        import trackio  # here, because few runs want it

        path = epath.Path(workdir) / "trackio_name"
        name = (
            path.read_text().strip()
            if path.exists()
            else f"{path.parent.name}-{uuid.uuid4().hex[:6]}"
        )
        path.write_text(name)
        self._run = trackio.init(project, name=name, resume="allow", config=dict(config))

    def write(self, step: int, values: Values) -> None:
        """Log one row."""
        self._run.log(dict(values), step=step)

    def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log samples as a table."""
        import trackio

        table = trackio.Table(columns=list(SAMPLE_FIELDS), data=_cells(rows))
        self._run.log({"samples": table}, step=step)

    def flush(self) -> None:
        """Do nothing: rows go out in the background."""

    def close(self) -> None:
        """End the run."""
        self._run.finish()


# option of log -> the package that it needs, and how it is installed
NEEDED = {
    "tensorboard": ("tensorboardX", "pip install 'align_jax[tensorboard]'"),
    "wandb": ("wandb", "pip install 'align_jax[wandb]'"),
    "trackio": ("trackio", "pip install 'align_jax[trackio]'"),
}


def check_installed(asked: Mapping[str, Any]) -> None:
    """Refuse, before anything is loaded, to log where a package is missing.

    Args:
        asked: option of ``log`` -> its value; false or empty = not asked for.

    Raises:
        ValueError: the option, the package, and how it is installed.
    """
    for option, (package, command) in NEEDED.items():
        if asked.get(option) and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"config.log.{option} = {asked[option]!r} needs {package}, which is not installed: "
                f"{command}, or leave config.log.{option} at {type(asked[option])()!r}"
            )


def open_writers(
    workdir: str,
    *,
    start_step: int = 0,
    tensorboard: bool = False,
    wandb: str = "",
    trackio: str = "",
    config: Mapping[str, Any] | None = None,
) -> list[Writer]:
    """Open ``metrics.jsonl`` and the other writers asked for; only the first process of a pod
    should.

    Args:
        workdir: local path or ``gs://...``.
        start_step: the step that the run resumes from.
        tensorboard: event files too.
        wandb: a Weights & Biases project; "" for none.
        trackio: a Trackio project; "" for none.
        config: shown by Weights & Biases and Trackio.

    Raises:
        ImportError: a package that is asked for is not installed; see ``check_installed``.
    """
    writers: list[Writer] = [
        JsonLines(epath.Path(workdir) / "metrics.jsonl", start_step=start_step or -1)
    ]
    if tensorboard:
        writers.append(TensorBoard(str(epath.Path(workdir) / "tensorboard"), start_step=start_step))
    if wandb:
        writers.append(Wandb(workdir, wandb, config or {}))
    if trackio:
        writers.append(Trackio(workdir, trackio, config or {}))
    return writers


class Recorder:
    """The training loop's log: takes each step's metrics, writes a row every k steps, drives the
    progress bar.

    Args:
        writers: from ``open_writers``; empty on all processes but the first.
        progress: the bar, or None.
        every_steps: steps between rows; a row holds the means over these steps.
        start_step: steps done before (a resumed run).
        start_tokens: tokens seen before (a resumed run); the ``num_tokens`` of the last checkpoint.
        flops_per_step: model FLOPs of one step, all devices together; 0: unknown, no ``mfu``.
        peak_flops: peak FLOP/s of all devices together; 0: unknown, no ``mfu``.
    """

    def __init__(
        self,
        writers: list[Writer],
        progress: Progress | None = None,
        *,
        every_steps: int = 10,
        start_step: int = 0,
        start_tokens: int = 0,
        flops_per_step: float | int = 0,
        peak_flops: float | int = 0,
    ):
        if every_steps < 1:
            raise ValueError(f"log.every_steps must be at least 1, got {every_steps}")
        self._writers, self._progress, self._every = writers, progress, every_steps
        self._step, self.num_tokens = start_step, start_tokens
        self._flops, self._peak = flops_per_step, peak_flops
        self._pending: tuple[int, Mapping[str, Any]] | None = None
        self._interval: list[dict[str, float]] = []
        # None until the first step is done: it holds the compilation
        self._clock: float | None = None
        self._timed_steps = self._timed_tokens = 0

    def push(self, step: int, metrics: Mapping[str, Any]) -> tuple[int, dict[str, float]] | None:
        """Take step ``step``'s metrics from the device without waiting for them.

        Args:
            step: finished optimizer steps, this one included.
            metrics: scalars on the device.  ``num_tokens``, if there, is this step's count of
                tokens over all processes; the rows hold its running total and
                ``tokens_per_second``.

        Returns:
            The step before this one and its metrics as numbers; None at the first.
        """
        # the one copy back that a run under a guard is to make
        with jax.transfer_guard_device_to_host("allow"):
            for value in metrics.values():
                if isinstance(value, jax.Array):
                    value.copy_to_host_async()
        arrived = self._take()
        self._pending = (step, metrics)
        return arrived

    def flush(self) -> tuple[int, dict[str, float]] | None:
        """Wait for the newest step's metrics: before a checkpoint, an evaluation and at the end."""
        return self._take()

    def sync(self) -> None:
        """Have the writers keep their rows for good: before a checkpoint, whose restart writes none
        of them again."""
        for writer in self._writers:
            writer.flush()

    def write(self, step: int, values: Values) -> None:
        """Write a row at once (an evaluation's, say)."""
        for writer in self._writers:
            writer.write(step, values)

    def show_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print a few samples above the bar, and hand them to the dashboards."""
        self.note(f"samples at step {step}:\n{samples_table(rows)}")
        for writer in self._writers:
            if isinstance(writer, SampleWriter):
                writer.write_samples(step, rows)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        if self._progress is not None:
            self._progress.note(text)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keep what happens inside (an evaluation, a save) out of the throughput; call ``flush``
        first."""
        began = time.monotonic()
        try:
            yield
        finally:
            if self._clock is not None:
                self._clock += time.monotonic() - began

    def close(self) -> None:
        """Write the unfinished interval's row and close the writers."""
        self._take()
        if self._interval:
            self._write_interval()
        for writer in self._writers:
            writer.close()
        if self._progress is not None:
            self._progress.close()

    def _take(self) -> tuple[int, dict[str, float]] | None:
        if self._pending is None:
            return None
        step, metrics = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        self._step, tokens = step, int(values.get("num_tokens", 0))
        self.num_tokens += tokens
        if self._clock is None:
            self._clock = time.monotonic()
        else:
            self._timed_steps, self._timed_tokens = (
                self._timed_steps + 1,
                self._timed_tokens + tokens,
            )
        self._interval.append(values)
        shown = values | self._throughput()
        if step % self._every == 0:
            self._write_interval()
        if self._progress is not None:
            self._progress.update(step, shown)
        return step, values

    def _throughput(self) -> dict[str, float]:
        seconds = time.monotonic() - self._clock if self._clock is not None else 0.0
        if not self._timed_steps or seconds <= 0:
            return {}
        row = {"tokens_per_second": self._timed_tokens / seconds} if self._timed_tokens else {}
        if self._flops and self._peak:
            row["mfu"] = self._flops * self._timed_steps / seconds / self._peak
        return row

    def _write_interval(self) -> None:
        row = {}
        for name in self._interval[-1]:
            finite = [
                values[name]
                for values in self._interval
                if math.isfinite(values.get(name, math.nan))
            ]
            last = self._interval[-1][name]
            row[name] = last if name in LAST or not finite else sum(finite) / len(finite)
        if "num_tokens" in row:
            row["num_tokens"] = self.num_tokens
        self.write(self._step, row | self._throughput())
        self._interval, self._timed_steps, self._timed_tokens = [], 0, 0
        self._clock = time.monotonic()
