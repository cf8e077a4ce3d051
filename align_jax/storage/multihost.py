# SPDX-License-Identifier: Apache-2.0
"""Verdicts that all processes share: a store fails for one of them, and all have to act on it
alike."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from align_jax.storage.checksums import is_transient

GOOD, MISMATCH, TRANSIENT, DAMAGED = range(4)  # how an access to a store went, best first
_log = logging.getLogger(__name__)


class Mismatch(Exception):
    """The checkpoint is sound, but of another model or optimizer."""


class Damaged(Exception):
    """A checkpoint that is there but cannot be trusted."""


class StorageError(OSError):
    """The store failed again and again: the run stops rather than train on without a net."""


def worst_verdict(verdict: int) -> int:
    """Return the worst verdict of all processes."""
    if jax.process_count() == 1:
        return verdict
    return int(multihost_utils.process_allgather(np.int32(verdict)).max())


def allgather_messages(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give every process's message (JSON) to all; in the order of the processes."""
    # In numpy: Orbax's own exchange (`emergency.path.sync_global_data`) fails under jax.set_mesh.
    text = np.frombuffer(json.dumps(message).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text))).reshape(-1)
    padded = np.pad(text, (0, sizes.max() - len(text)))
    texts = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [json.loads(text[:size].tobytes()) for text, size in zip(texts, sizes)]


def on_first_process(act: Callable[[], Any], folder: epath.Path) -> None:
    """Do something to the folder on the first process alone; the others wait for it.

    Raises:
        StorageError: on every process, if it failed.
    """
    error = None
    try:
        if jax.process_index() == 0:
            act()
    except Exception as caught:  # kept until the others have been told: they would wait for ever
        error = caught
    if worst_verdict(GOOD if error is None else TRANSIENT) != GOOD:
        raise StorageError(
            f"{folder}: {'the first process could not write' if error is None else brief(error)}"
        ) from error


def make_shared_folder(folder: epath.Path) -> None:
    """Make the folder, and see that all processes look at the same one.

    Raises:
        ValueError: they do not.
    """
    # In a folder of its own: a bucket's client may remember what it has listed before.
    number = int(multihost_utils.broadcast_one_to_all(np.int32(time.time() % 1e9)))
    token = folder / f"seen-{number}" / "token"
    on_first_process(
        lambda: (token.parent.mkdir(parents=True, exist_ok=True), token.write_text("")), folder
    )
    seen = token.exists()
    alone = worst_verdict(GOOD if seen else DAMAGED) != GOOD
    on_first_process(token.parent.rmtree, folder)
    if alone:
        raise ValueError(
            f"workdir {folder.parent}: not all processes see the same folder"
            f"{'' if seen else ' (this one does not)'}; use a shared mount or "
            "gs://..."
        )


def read_together(
    read: Callable[[], Any], path: epath.Path, attempts: int, pause: Callable[[int], None]
) -> Any:
    """Read on every process, trying again while the store is in trouble; all come to the same
    verdict.

    Args:
        read: returns this process's part.
        path: what is read, for messages.
        attempts: how often.
        pause: waits after the attempt of that number.

    Raises:
        Damaged, ValueError: one process or more found it damaged, or that of another model
            (`Mismatch`).
        StorageError: the store failed at every attempt.
    """
    for attempt in range(attempts):
        verdict, result, error = GOOD, None, None
        try:
            result = read()
        except Mismatch as caught:
            verdict, error = MISMATCH, caught
        except Exception as caught:  # what a damaged file makes a reader throw is anybody's guess
            verdict, error = TRANSIENT if is_transient(caught) else DAMAGED, caught
        verdict = worst_verdict(verdict)
        reason = "seen by another process" if error is None else brief(error)
        if verdict == GOOD:
            return result
        if verdict == MISMATCH:
            raise ValueError(reason if error is None else str(error)) from error
        if verdict == DAMAGED:
            raise Damaged(reason) from error
        _log.warning(
            "reading %s failed (%s): attempt %d of %d", path, reason, attempt + 1, attempts
        )
        pause(attempt)
    raise StorageError(f"{path} could not be read in {attempts} attempts: {reason}")


def brief(error: Exception) -> str:
    """Write an error on one line of at most a few hundred characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
