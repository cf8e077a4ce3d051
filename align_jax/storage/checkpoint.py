# SPDX-License-Identifier: Apache-2.0
"""Checkpoints through Orbax: written in the background, committed atomically, checked when read
back.

    WORKDIR/checkpoints/120/            one step: state (arrays), extra (JSON), metrics (JSON,
                                        where there are any)
    WORKDIR/checkpoints/corrupt-120/    set aside: it could not be read, or its arrays are not what
                                        was saved
    WORKDIR/checkpoints/superseded-140/ set aside: later than the step that the run was told to go
                                        back to

A save holds a checksum of every array, an integer sum over its bits that does not depend on how
the array was split; a restore computes it again on the devices, so a flipped bit is found as surely
as a missing file.

With a folder on each host's own storage, `local_tier` saves there more often; the newest of both
is gone on from.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from align_jax.core import files
from align_jax.core.choose import nearest
from align_jax.core.options import CheckpointOptions
from align_jax.storage.checksums import checksums, differences, is_sound_extra, json_checksum
from align_jax.storage.local_tier import LocalCheckpoints
from align_jax.storage.multihost import (
    CorruptError,
    MismatchError,
    StorageError,
    allgather_messages,
    any_process,
    make_shared_folder,
    on_first_process,
    one_line,
    read_on_all,
)

FOLDER = "checkpoints"
REWOUND = "rewound.json"  # the step that the run was told to go back to, and has
LINEAGE = "lineage"  # names the run's history; begun anew or set back, it has another
DATA_FILE_BYTES = 1 << 31  # what Orbax packs into one file at most
LONGEST_WAIT_SECONDS = 60.0
_log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """A checkpoint read back."""

    step: int  # finished optimizer steps
    state: Any  # like the abstract state asked for
    extra: dict[str, Any]  # what was saved beside it
    path: str
    own: bool = True  # a step of this run, not of the other whose path was given


class Checkpoints:
    """A run's checkpoints.  Every process of a pod makes the same calls with the same arguments.

    Args:
        workdir: a folder that all processes see: a local path, a shared mount, or ``gs://...``.
        options: what is saved, how often, how much of it is kept, and whether locally too.
        digest: of the configuration: what another one has left in ``options.local`` is not read.
        attempts: how often a failing store is tried before the run stops.
        backoff_seconds: the wait after the first failure; doubled at each further one, up to a
            minute.
        timeout_seconds: how long the processes wait for each other in a save.
        reading: nothing in the folder is made, renamed or removed: the run may be going on, its
            save half done.  A corrupt step is passed over where a run would set it aside.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        options: CheckpointOptions,
        *,
        digest: str = "",
        attempts: int = 5,
        backoff_seconds: float = 1.0,
        timeout_seconds: int = 1200,
        reading: bool = False,
    ):
        self._folder = _absolute(workdir) / FOLDER
        self._every = options.every_steps
        self._best_metric = options.best_metric.removeprefix("-")
        self._sign = -1.0 if options.best_metric.startswith("-") else 1.0
        self._attempts, self._backoff = attempts, backoff_seconds
        self._failures = 0
        self._pending_step: int | None = None
        self._usable: Callable[[Mapping[str, Any]], str] | None = None
        self._reading, self._passed = reading, set[int]()
        if not reading:
            make_shared_folder(self._folder)
        policies: list[Any] = [checkpoint_managers.LatestN(options.keep)]
        if self._best_metric:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=self._goodness, n=1, keep_checkpoints_without_metrics=False
                )
            )
        self._manager_options = ocp.CheckpointManagerOptions(
            create=False,
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=self._goodness if self._best_metric else None,
            cleanup_tmp_directories=not reading,
            lightweight_initialize=reading,  # metrics that cannot be read are no obstacle
            async_options=ocp.AsyncOptions(timeout_secs=timeout_seconds),
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=0, active_processes=set(range(jax.process_count()))
            ),
        )
        self._manager = self._open()
        self._digest = digest
        self._local: LocalCheckpoints | None = None
        if options.local:
            path = _absolute(workdir)  # two runs of the same name may share a host
            name = f"{path.name}-{zlib.crc32(str(path).encode()):08x}"
            self._local = LocalCheckpoints(
                epath.Path(options.local) / name,
                self._lineage(),
                every_steps=options.local_every_steps,
            )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        if error is None:
            self.close()
            return
        # Perhaps on this process alone: the others, amid a step, would not answer, and nobody would
        # learn of it.
        for manager in (self._local, self._manager):
            # the error that brought us here is the one to tell
            with contextlib.suppress(Exception):
                if manager is not None:
                    manager.wait_until_finished()

    def steps(self) -> list[int]:
        """Return the committed steps, oldest first; not those that lie on the hosts' own storage
        alone."""
        left_out = {self._pending_step, *self._passed}
        return sorted(step for step in self._manager.all_steps() if step not in left_out)

    def resumable(self) -> list[int]:
        """Return the steps that a restart may go on from, oldest first."""
        return sorted({*self.steps(), *(self._local.steps() if self._local else ())})

    def last_good(self) -> int | None:
        """Return the newest of them: where a restart would go on; None if there is none."""
        return max(self.resumable(), default=None)

    def due(self, step: int) -> str:
        """Tell which tier to save to at this step: "persistent", "local" or "" for none.

        Every k steps, or at once after a failed save; with several processes a failed save is made
        good at the next scheduled step, at which they all meet.
        """
        if self._every and step % self._every == 0:
            return "persistent"
        if (
            jax.process_count() == 1
            and self._pending_step is not None
            and not self._manager.is_saving_in_progress()
        ):
            self._await_save()
        if jax.process_count() == 1 and self._failures > 0:
            return "persistent"
        return "local" if self._local and self._local.due(step) else ""

    def check_measured(self, metrics: Mapping[str, float]) -> None:
        """See that an evaluation, a run's first one, measures ``best_metric``.

        Raises:
            KeyError: it does not.
        """
        if self._best_metric and self._best_metric not in metrics:
            raise KeyError(
                f"config.checkpoint.best_metric = {self._best_metric!r} is not among the "
                f"evaluation's metrics{nearest(self._best_metric, sorted(metrics))}"
            )

    def save(
        self,
        step: int,
        state: Any,
        extra: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float | int] | None = None,
        *,
        tier: str = "persistent",
        wait: bool = False,
    ) -> bool:
        """Save in the background; the state may be donated as soon as this returns.

        Args:
            step: finished optimizer steps.
            state: a tree of arrays.
            extra: JSON beside it: the data position, counts, versions.
            metrics: held-out metrics of this step, for ``best_metric``; None: this step was not
                evaluated.
            tier: "persistent" (and the hosts' own storage, where there is any), or "local": that
                alone.
            wait: return only when the checkpoint is committed (the last save of a run).

        Returns:
            False if this step is already saved.

        Raises:
            StorageError: the store failed ``attempts`` times running.
            KeyError: ``metrics`` lacks ``best_metric``.
        """
        if metrics is not None:
            self.check_measured(metrics)
        if self._local:
            # there in seconds, the other perhaps not in time
            self._local.save(step, state, extra or {})
        if tier == "local":
            return True
        self._await_save()
        if step in self.steps():
            return False
        beside = dict(extra or {})
        record = {
            "extra": beside,
            "extra_checksum": json_checksum(beside),
            "checksums": checksums(state),
        }
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(record)
        )
        scores = {}
        if metrics and self._best_metric:
            scores = {name: float(value) for name, value in metrics.items()}
        while True:
            error = None
            try:
                self.check_room(state)
                self._pending_step = step
                self._manager.save(step, args=items, metrics=scores or None, force=True)
            except Exception as caught:  # whatever a store throws: the count below decides
                error = caught
            if self._succeeded(step, error) and (not wait or self._await_save()):
                return True

    def check_room(self, state: Any) -> None:
        """Fail before a save begins that cannot end, or a run whose saves cannot: Orbax's threads
        would go on without it.

        What is written is compressed, to half of its size at best: a disk with room for that half
        is tried.

        Raises:
            StorageError: on every process, if the disk of one is too full, or none of its files
                may be as large as one of a checkpoint's can be (``ulimit -f``).
        """
        if "://" in str(self._folder):
            return
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) // jax.process_count()
        free = shutil.disk_usage(self._folder).free
        if any_process(2 * free < needed):
            raise StorageError(
                f"no space left on the device: {needed:,} bytes are to be written, and {free:,} "
                "are free"
            )
        largest, most = min(needed, DATA_FILE_BYTES), files.most_bytes()
        if any_process(most < largest):
            raise StorageError(
                f"a file of {largest:,} bytes is to be written, and a file may have {most:,} here: "
                "ulimit -f"
            )

    def wait(self) -> None:
        """Return when the save in the background is committed.

        Raises:
            StorageError: it failed, as the ones before it.
        """
        self._await_save()

    def close(self) -> None:
        """Wait for the saves in the background and let go of the threads."""
        if self._local:
            self._local.close()
        self._await_save()
        self._manager.close()

    def restore(
        self,
        abstract_state: Any,
        which: str | int = "latest",
        *,
        rewind: bool = False,
        usable: Callable[[Mapping[str, Any]], str] | None = None,
    ) -> Restored | None:
        """Read a checkpoint into the given shapes, dtypes and shardings, whatever mesh or process
        count wrote it.

        Args:
            abstract_state: a tree of ``jax.ShapeDtypeStruct`` with shardings, of the state's
                structure.
            which: "latest"; "best"; a step; or a path: another run's workdir, its ``checkpoints``
                or one step of it. From a path a run *starts*: once it has checkpoints of its own,
                the latest of these is taken.
            rewind: this run goes on from here: later checkpoints than the one asked for are set
                aside.  A restart with the same ``which`` then takes the latest, so that a preempted
                run does not go back again.
            usable: of what was saved beside the state (``extra``): why this run cannot go on from
                it, "" where it can.  What is not usable counts as corrupt.

        Returns:
            The checkpoint; None if "latest" finds none.

        Raises:
            ValueError: the checkpoint is of another model or optimizer (the differing arrays are
                named); one that was asked for by step or path is corrupt, or all of them are.
            FileNotFoundError: there is no such checkpoint.
            StorageError: the store cannot be read.
        """
        self._await_save()
        self._usable = usable
        which = str(which)
        if which not in ("latest", "best") and not which.isdigit():
            if (own := self._restore_latest(abstract_state)) is not None:
                return own
            self._usable = None  # what lies beside the other run's state is the other run's
            return self._read_or_stop(self._find(which), abstract_state)._replace(own=False)
        if which == "latest" or rewind and self._rewound_to() == which:
            return self._restore_latest(abstract_state)
        step = int(which) if which.isdigit() else self._best()
        if step not in self.steps():
            raise FileNotFoundError(
                f"no checkpoint of step {which} in {self._folder}; there are {self.steps()}"
            )
        restored = self._read_or_stop(self._path(step), abstract_state)
        if rewind:
            self._rewind(step, which)
        return restored

    def _rewind(self, step: int, which: str) -> None:
        """Set the later steps aside and begin another history, in this order: a kill between two of
        these leaves a run that does all of it once more."""
        for later in self.steps():
            if later > step:
                self._set_aside(later, "superseded")
        self._on_first(lambda: (self._folder / LINEAGE).unlink(missing_ok=True))
        if self._local:
            self._local.reset(self._lineage())
        self._on_first(lambda: (self._folder / REWOUND).write_text(which))

    def _goodness(self, metrics: Mapping[str, float]) -> float:
        return self._sign * metrics[self._best_metric]

    def _best(self) -> int:
        if not self._best_metric:
            raise ValueError("checkpoint.restore=best needs checkpoint.best_metric")
        found = {step: self._metrics(step) for step in self.steps()}
        scored = {step: self._goodness(metrics) for step, metrics in found.items() if metrics}
        if not scored:
            raise FileNotFoundError(
                f"no checkpoint in {self._folder} has the metric {self._best_metric!r}"
            )
        return max(scored, key=lambda step: (scored[step], step))

    def _metrics(self, step: int) -> Mapping[str, float]:
        """Return a step's held-out metrics; none where they cannot be read."""
        try:
            return self._manager.metrics(step) or {}
        except ValueError:
            return {}

    def _read_or_stop(self, path: epath.Path, abstract_state: Any) -> Restored:
        try:
            return self._read(path, abstract_state)
        except CorruptError as error:
            if not path.exists():
                raise FileNotFoundError(
                    f"checkpoint {path} was removed while it was read: a run keeps its newest "
                    "alone (checkpoint.keep)"
                ) from error
            raise ValueError(f"checkpoint {path} is corrupt: {error}") from error

    def _restore_latest(self, abstract_state: Any) -> Restored | None:
        any_here = bool(self.steps())
        while True:
            step = max(self.steps(), default=None)
            found = self._restore_local(abstract_state, step or 0)
            if found is not None or step is None:
                break
            try:
                return self._read(self._path(step), abstract_state)
            except CorruptError as error:
                _log.warning(
                    "checkpoint of step %d is corrupt (%s): %s; going back to step %s",
                    step,
                    error,
                    self._set_aside(step, "corrupt"),
                    self.last_good(),
                )
        if found is None and any_here:
            if self._reading:
                raise ValueError(f"every checkpoint in {self._folder} is corrupt or was removed")
            raise ValueError(
                f"every checkpoint in {self._folder} is corrupt (see corrupt-* there). To begin "
                "again from step 0, restart the same command; to begin elsewhere, set "
                "checkpoint.restore to a path"
            )
        return found

    def _restore_local(self, abstract_state: Any, at_least: int) -> Restored | None:
        if self._local is None:
            return None
        found = self._local.restore(abstract_state, at_least=at_least)
        if found is not None and (fault := self._fault(found.extra)):
            _log.warning("the local copy of step %d is of no use (%s): deleted", found.step, fault)
            self._local.clear(after=at_least - 1)
            return None
        return None if found is None else Restored(*found, f"{self._local.folder}/{found.step}")

    def _read(self, path: epath.Path, abstract_state: Any) -> Restored:
        """Read one step; every process ends alike, though only one may have met the trouble."""

        def read() -> tuple[dict[str, Any], Any]:
            return _read_here(path, abstract_state)

        record, state = read_on_all(read, path, self._attempts, self._pause)
        found = checksums(state)  # all processes together, so only when all have read their shards
        wrong = [name for name in found if found[name] != record["checksums"].get(name)]
        if wrong:
            raise CorruptError(f"the contents of {wrong[:5]} are not what was saved")
        if not is_sound_extra(record):
            raise CorruptError("extra (the data position, counts) is not what was saved")
        if fault := self._fault(record["extra"]):
            raise CorruptError(fault)
        return Restored(int(path.name), state, record["extra"], str(path))

    def _fault(self, extra: Mapping[str, Any]) -> str:
        """Tell why this run cannot go on from a checkpoint, on all processes where one cannot."""
        fault = self._usable(extra) if self._usable is not None else ""
        anywhere = any_process(bool(fault))
        return fault or ("another process cannot go on from it" if anywhere else "")

    def _await_save(self) -> bool:
        """Wait for the save in the background.

        Returns:
            False if it failed, and the count of failures allows another attempt.
        """
        if self._pending_step is None:
            return True
        error = None
        try:
            self._manager.wait_until_finished()
        except Exception as caught:  # whatever a store throws: the count of failures decides
            error = caught
        step, self._pending_step = self._pending_step, None
        done = self._succeeded(step, error)
        if done:
            self._failures = 0
        return done

    def _succeeded(self, step: int, error: Exception | None) -> bool:
        """Tell whether a save went well on all processes; count it, and stop the run, if not."""
        if not any_process(error is not None):
            return True
        self._pending_step, self._failures = None, self._failures + 1
        with contextlib.suppress(Exception):  # its own threads' errors, reported above
            self._manager.close()
        self._manager = self._open()  # forget what was half done
        if self._failures >= self._attempts:
            raise StorageError(
                f"step {step} could not be saved to {self._folder} in {self._failures} attempts: "
                f"{one_line(error)}. Last good checkpoint: step {self.last_good()}. Free space or "
                "permissions there, then restart the same command"
            ) from error
        _log.warning(
            "saving step %d failed (%s): attempt %d of %d",
            step,
            one_line(error),
            self._failures,
            self._attempts,
        )
        self._pause(self._failures - 1)
        return False

    def _pause(self, attempt: int) -> None:
        time.sleep(min(self._backoff * 2**attempt, LONGEST_WAIT_SECONDS))

    def _open(self) -> ocp.CheckpointManager:
        if not self._reading:
            self._on_first(self._drop_broken_metrics)
        manager = ocp.CheckpointManager(self._folder, options=self._manager_options)
        # of the saves that were cut short; Orbax itself waits at the first save alone, and its
        # thread would print a traceback at an exit before that
        manager._maybe_await_cleanup_tmp_directory()
        return manager

    def _drop_broken_metrics(self) -> None:
        """Take away metrics that cannot be read (the manager would not open); the state beside them
        may be sound."""
        for path in self._folder.glob("*/metrics/metrics"):
            try:
                scores = json.loads(path.read_text())
                sound = isinstance(scores, dict) and all(
                    isinstance(score, (int, float)) for score in scores.values()
                )
            except ValueError:
                sound = False
            if not sound:
                _log.warning("%s cannot be read: this step counts as not evaluated", path)
                path.parent.rmtree()

    def _path(self, step: int) -> epath.Path:
        return self._folder / str(step)

    def _find(self, which: str) -> epath.Path:
        """Find the step that a path means: a workdir's newest, a ``checkpoints`` folder's newest,
        or a step itself."""
        given = epath.Path(which)
        if not given.exists():
            raise FileNotFoundError(
                f"checkpoint.restore={which}: no such path (known words: latest, best, a step)"
            )
        if given.name.isdigit() and (given / "state").exists():
            return _absolute(which)
        folder = given / FOLDER if (given / FOLDER).exists() else given
        steps = [int(child.name) for child in folder.iterdir() if child.name.isdigit()]
        if not steps:
            raise FileNotFoundError(
                f"checkpoint.restore={which}: there is no checkpoint in {folder}"
            )
        return _absolute(folder) / str(max(steps))

    def _lineage(self) -> str:
        """Name the run's configuration and history, the latter by a random token in the workdir."""
        path = self._folder / LINEAGE
        self._on_first(lambda: path.exists() or path.write_text(secrets.token_hex(8)))
        first = {"token": path.read_text() if jax.process_index() == 0 else ""}
        return f"{self._digest}/{allgather_messages(first)[0]['token']}"

    def _rewound_to(self) -> str | None:
        path = self._folder / REWOUND
        return path.read_text() if path.exists() else None

    def _set_aside(self, step: int, why: str) -> str:
        """Leave a step out from now on; tell what became of it."""
        target = self._folder / f"{why}-{step}"
        if self._reading:
            self._passed.add(step)
            self._manager.close()
            self._manager = self._open()  # others may have come, or gone
            return "passed over"

        def move() -> None:
            if target.exists():
                target.rmtree()
            self._path(step).rename(target)

        self._on_first(move)
        self._manager.reload()
        return f"moved to {target}"

    def _on_first(self, action: Callable[[], Any]) -> None:
        on_first_process(action, self._folder)


def _read_here(path: epath.Path, abstract_state: Any) -> tuple[dict[str, Any], Any]:
    # not the manager: its barrier would wait for a process that failed
    handler = ocp.StandardCheckpointHandler()
    problems = differences(handler.metadata(path / "state").tree, abstract_state)
    if problems:
        more = f" and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise MismatchError(
            f"checkpoint {path} is of another model or optimizer: "
            f"{'; '.join(problems[:20])}{more}. Use the configuration that wrote it, or another "
            "workdir"
        )
    record = ocp.JsonCheckpointHandler().restore(path / "extra")
    return record, handler.restore(path / "state", args=ocp.args.StandardRestore(abstract_state))


def _absolute(path: str | epath.PathLike) -> epath.Path:
    return epath.Path(path) if "://" in str(path) else epath.Path(path).absolute()
