# SPDX-License-Identifier: Apache-2.0
"""Checkpoints through Orbax: written in the background, committed atomically, checked when read
back.

    WORKDIR/checkpoints/120/            one step: state (arrays), extra (JSON), metrics (JSON, where there are any)
    WORKDIR/checkpoints/damaged-120/    set aside: it could not be read, or its arrays are not what was saved
    WORKDIR/checkpoints/superseded-140/ set aside: later than the step that the run was told to go
    back to

A save holds a checksum of every array, an integer sum over its bits that does not depend on how
the array was split; a restore computes it again on the devices, so a flipped bit is found as surely
as a missing file.

With a folder on each host's own storage, `local_checkpoint` saves there more often; the newest of
both is gone on from.
"""

from __future__ import annotations

import contextlib
import json
import logging
import secrets
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from align_jax.storage.checksums import checksums, differences
from align_jax.storage.local_tier import LocalCheckpoints
from align_jax.storage.multihost import (
    GOOD,
    TRANSIENT,
    Damaged,
    Mismatch,
    StorageError,
    allgather_messages,
    brief,
    make_shared_folder,
    on_first_process,
    read_together,
    worst_verdict,
)

FOLDER = "checkpoints"
REWOUND = "rewound.json"
PAST = "past"
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
        every_steps: steps between saves; 0: only those asked for.
        keep: how many of the newest to keep.
        best_metric: keep the best by this metric too, whatever its age
            (``eval/rewards/accuracies``); "" for none.
        best_mode: "max" or "min": which end of ``best_metric`` is good.
        attempts: how often a failing store is tried before the run stops.
        backoff_seconds: the wait after the first failure; doubled at each further one, up to a
            minute.
        timeout_seconds: how long the processes wait for each other in a save.
        local: a folder on each host's own storage for more frequent checkpoints; "" for none.
        local_every_steps: steps between those.
        digest: of the configuration: what another one has left in ``local`` is not read.
    """

    def __init__(
        self,
        workdir: str | epath.PathLike,
        *,
        every_steps: int = 0,
        keep: int = 3,
        best_metric: str = "",
        best_mode: str = "max",
        attempts: int = 5,
        backoff_seconds: float = 1.0,
        timeout_seconds: int = 1200,
        local: str = "",
        local_every_steps: int = 1,
        digest: str = "",
    ):
        if keep < 1:
            raise ValueError(f"checkpoint.keep must be at least 1, got {keep}")
        if best_mode not in ("max", "min"):
            raise ValueError(f"checkpoint.best_mode must be 'max' or 'min', got {best_mode!r}")
        self._folder = _absolute(workdir) / FOLDER
        self._every, self._best_metric, self._sign = (
            every_steps,
            best_metric,
            1.0 if best_mode == "max" else -1.0,
        )
        self._attempts, self._backoff = attempts, backoff_seconds
        self._failures, self._pending_step = 0, None
        make_shared_folder(self._folder)
        policies = [checkpoint_managers.LatestN(keep)]
        if best_metric:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=self._goodness, n=1, keep_checkpoints_without_metrics=False
                )
            )
        self._options = ocp.CheckpointManagerOptions(
            create=False,
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=self._goodness if best_metric else None,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(timeout_secs=timeout_seconds),
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=0, active_processes=set(range(jax.process_count()))
            ),
        )
        self._manager = self._open()
        self._digest, self._local = digest, None
        if local:
            place = f"{_absolute(workdir).name}-{zlib.crc32(str(_absolute(workdir)).encode()):08x}"
            self._local = LocalCheckpoints(
                epath.Path(local) / place, self._past(), every_steps=local_every_steps
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
        return sorted(step for step in self._manager.all_steps() if step != self._pending_step)

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
            self._settle()
        if jax.process_count() == 1 and self._failures > 0:
            return "persistent"
        return "local" if self._local and self._local.due(step) else ""

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
        if metrics is not None and self._best_metric and self._best_metric not in metrics:
            raise KeyError(
                f"checkpoint.best_metric {self._best_metric!r} is not among the "
                "evaluation's metrics "
                f"{sorted(metrics)}"
            )
        if self._local:
            # there in seconds, the other perhaps not in time
            self._local.save(step, state, extra or {})
        if tier == "local":
            return True
        self._settle()
        if step in self.steps():
            return False
        numbers = (
            {name: float(value) for name, value in (metrics or {}).items()}
            if self._best_metric
            else None
        )
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            extra=ocp.args.JsonSave({"extra": dict(extra or {}), "checksums": checksums(state)}),
        )
        while True:
            error = None
            try:
                self._pending_step = step
                self._manager.save(step, args=items, metrics=numbers or None, force=True)
            except Exception as caught:  # whatever a store throws: the count below decides
                error = caught
            if not self._succeeded(step, error):
                continue
            if not wait or self._settle():
                return True

    def wait(self) -> None:
        """Return when the save in the background is committed.

        Raises:
            StorageError: it failed, as the ones before it.
        """
        self._settle()

    def close(self) -> None:
        """Wait for the saves in the background and let go of the threads."""
        if self._local:
            self._local.close()
        self._settle()
        self._manager.close()

    def restore(
        self, abstract_state: Any, which: str | int = "latest", *, rewind: bool = False
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

        Returns:
            The checkpoint; None if "latest" finds none.

        Raises:
            ValueError: the checkpoint is of another model or optimizer (the differing arrays are
                named); one that was asked for by step or path is damaged, or all of them are.
            FileNotFoundError: there is no such checkpoint.
            StorageError: the store cannot be read.
        """
        self._settle()
        which = str(which)
        if which not in ("latest", "best") and not which.isdigit():
            own = self._restore_latest(abstract_state)
            return own or self._read_or_stop(self._find(which), abstract_state)._replace(own=False)
        if which == "latest" or rewind and self._rewound_to() == which:
            return self._restore_latest(abstract_state)
        step = int(which) if which.isdigit() else self._best()
        if step not in self.steps():
            raise FileNotFoundError(
                f"no checkpoint of step {which} in {self._folder}; there are {self.steps()}"
            )
        restored = self._read_or_stop(self._path(step), abstract_state)
        if rewind:
            for later in self.steps():
                if later > step:
                    self._set_aside(later, "superseded")
            self._once(lambda: (self._folder / PAST).unlink(missing_ok=True))
            if self._local:
                self._local.begin_anew(self._past())
            self._once(lambda: (self._folder / REWOUND).write_text(which))
        return restored

    def _goodness(self, metrics: Mapping[str, float]) -> float:
        return self._sign * metrics[self._best_metric]

    def _best(self) -> int:
        if not self._best_metric:
            raise ValueError("checkpoint.restore=best needs checkpoint.best_metric")
        scored = {step: self._manager.metrics(step) for step in self.steps()}
        scored = {step: self._goodness(metrics) for step, metrics in scored.items() if metrics}
        if not scored:
            raise FileNotFoundError(
                f"no checkpoint in {self._folder} has the metric {self._best_metric!r}"
            )
        return max(scored, key=lambda step: (scored[step], step))

    def _read_or_stop(self, path: epath.Path, abstract_state: Any) -> Restored:
        try:
            return self._read(path, abstract_state)
        except Damaged as error:
            raise ValueError(f"checkpoint {path} is damaged: {error}") from error

    def _restore_latest(self, abstract_state: Any) -> Restored | None:
        any_here = bool(self.steps())
        while True:
            step = max(self.steps(), default=None)
            found = self._local.restore(abstract_state, at_least=step or 0) if self._local else None
            if found is not None:
                return Restored(*found, f"{self._local.folder}/{found.step}")
            if step is None:
                break
            try:
                return self._read(self._path(step), abstract_state)
            except Damaged as error:
                aside = self._set_aside(step, "damaged")
                _log.warning(
                    "checkpoint of step %d is damaged (%s): moved to %s; going back to step %s",
                    step,
                    error,
                    aside,
                    self.last_good(),
                )
        if not any_here:
            return None
        raise ValueError(
            f"every checkpoint in {self._folder} is damaged (see damaged-* there). "
            "To begin again from "
            "step 0, restart the same command; to begin elsewhere, set "
            "checkpoint.restore to a path"
        )

    def _read(self, path: epath.Path, abstract_state: Any) -> Restored:
        """Read one step; every process comes to the same verdict, though only one may have met the
        trouble."""
        record, state = read_together(
            lambda: _read_here(path, abstract_state), path, self._attempts, self._pause
        )
        found = checksums(state)  # all processes together, so only when all have read their part
        wrong = [name for name in found if found[name] != record["checksums"].get(name)]
        if wrong:
            raise Damaged(f"the contents of {wrong[:5]} are not what was saved")
        return Restored(int(path.name), state, record["extra"], str(path))

    def _settle(self) -> bool:
        """Wait for the save in the background; false if it failed (and the count of failures allows
        another)."""
        if self._pending_step is None:
            return True
        error = None
        try:
            self._manager.wait_until_finished()
        except Exception as caught:  # whatever a store throws: the count of failures decides
            error = caught
        step, self._pending_step = self._pending_step, None
        return self._succeeded(step, error, done=True)

    def _succeeded(self, step: int, error: Exception | None, *, done: bool = False) -> bool:
        if worst_verdict(GOOD if error is None else TRANSIENT) == GOOD:
            self._failures = 0 if done else self._failures
            return True
        self._pending_step, self._failures = None, self._failures + 1
        reason = "seen by another process" if error is None else brief(error)
        with contextlib.suppress(Exception):  # its own threads' errors, reported above
            self._manager.close()
        self._manager = self._open()  # forget what was half done
        if self._failures >= self._attempts:
            raise StorageError(
                f"step {step} could not be saved to {self._folder} in {self._failures} attempts: "
                f"{reason}. Last good "
                f"checkpoint: step {self.last_good()}. Free space or permissions there, then "
                "restart the same "
                "command"
            ) from error
        _log.warning(
            "saving step %d failed (%s): attempt %d of %d",
            step,
            reason,
            self._failures,
            self._attempts,
        )
        self._pause(self._failures - 1)
        return False

    def _pause(self, attempt: int) -> None:
        time.sleep(min(self._backoff * 2**attempt, LONGEST_WAIT_SECONDS))

    def _open(self) -> ocp.CheckpointManager:
        self._once(self._drop_broken_metrics)
        return ocp.CheckpointManager(self._folder, options=self._options)

    def _drop_broken_metrics(self) -> None:
        """Take away metrics that cannot be read (the manager would not open); the state beside them
        may be sound."""
        for path in self._folder.glob("*/metrics/metrics"):
            try:
                json.loads(path.read_text())
            except ValueError:
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

    def _past(self) -> str:
        """Name what the run has behind it; begun anew or set back, it has another past, and so has
        another config."""
        path = self._folder / PAST
        self._once(lambda: path.exists() or path.write_text(secrets.token_hex(8)))
        told = allgather_messages({"past": path.read_text() if jax.process_index() == 0 else ""})
        return f"{self._digest}/{told[0]['past']}"

    def _rewound_to(self) -> str | None:
        path = self._folder / REWOUND
        return path.read_text() if path.exists() else None

    def _set_aside(self, step: int, why: str) -> epath.Path:
        target = self._folder / f"{why}-{step}"

        def move() -> None:
            if target.exists():
                target.rmtree()
            self._path(step).rename(target)

        self._once(move)
        self._manager.reload()
        return target

    def _once(self, act: Callable[[], Any]) -> None:
        on_first_process(act, self._folder)


def _read_here(path: epath.Path, abstract_state: Any) -> tuple[dict[str, Any], Any]:
    # not the manager: its barrier would wait for a process that failed
    handler = ocp.StandardCheckpointHandler()
    problems = differences(handler.metadata(path / "state").tree, abstract_state)
    if problems:
        more = f" and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise Mismatch(
            f"checkpoint {path} is of another model or optimizer: "
            f"{'; '.join(problems[:20])}{more}. "
            "Use the configuration that wrote it, or another workdir"
        )
    record = ocp.JsonCheckpointHandler().restore(path / "extra")
    return record, handler.restore(path / "state", args=ocp.args.StandardRestore(abstract_state))


def _absolute(path: str | epath.PathLike) -> epath.Path:
    return epath.Path(path) if "://" in str(path) else epath.Path(path).absolute()
