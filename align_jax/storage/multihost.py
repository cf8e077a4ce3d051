# SPDX-License-Identifier: Apache-2.0
"""What the processes agree on: a store may fail for one of them, and all must act on it alike."""

from __future__ import annotations

import enum
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

# What a store says when it is the store that is in trouble, not the checkpoint.
_TRANSIENT = (
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "RESOURCE_EXHAUSTED",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "ABORTED",
    "Permission denied",
    "Input/output error",
    "timed out",
)
Result = TypeVar("Result")
_log = logging.getLogger(__name__)


class Status(enum.IntEnum):
    """How a read went, best first: of all processes' the greatest decides."""

    OK = 0
    MISMATCH = 1
    TRANSIENT = 2
    CORRUPT = 3


class MismatchError(Exception):
    """The checkpoint is sound, but of another model or optimizer."""


class CorruptError(Exception):
    """A checkpoint that is there but cannot be trusted."""


class StorageError(OSError):
    """The store failed again and again: the run stops rather than train on without a net."""


def any_process(condition: bool) -> bool:
    """Tell, on every process, whether the condition holds on any of them."""
    return bool(_greatest(int(condition)))


def _greatest(number: int) -> int:
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def allgather_messages(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give every process's message (JSON) to all, in the order of the processes."""
    # In numpy: Orbax's own exchange (`emergency.path.sync_global_data`) fails under jax.set_mesh.
    text = np.frombuffer(json.dumps(message).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text))).reshape(-1)
    padded = np.pad(text, (0, sizes.max() - len(text)))
    texts = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(texts, sizes)]


def on_first_process(action: Callable[[], Any], folder: epath.Path) -> None:
    """Act on the folder on the first process alone; the others wait for it.

    Raises:
        StorageError: on every process, if it failed.
    """
    error = None
    try:
        if jax.process_index() == 0:
            action()
    except Exception as caught:  # kept until the others have been told: they would wait for ever
        error = caught
    if any_process(error is not None):
        raise StorageError(f"{folder}: {one_line(error)}") from error


def make_shared_folder(folder: epath.Path) -> None:
    """Make the folder, and see that all processes look at the same one.

    Raises:
        ValueError: they do not.
    """
    # In a folder of its own: a bucket's client may remember what it has listed before.
    number = int(multihost_utils.broadcast_one_to_all(np.int32(time.time() % 1e9)))
    token = folder / f"seen-{number}" / "token"

    def write_token() -> None:
        token.parent.mkdir(parents=True, exist_ok=True)
        token.write_text("")

    on_first_process(write_token, folder)
    seen = token.exists()
    missing = any_process(not seen)
    on_first_process(token.parent.rmtree, folder)
    if missing:
        raise ValueError(
            f"workdir {folder.parent}: not all processes see the same "
            f"folder{'' if seen else ' (this one does not)'}; use a shared mount or gs://..."
        )


def read_on_all(
    read: Callable[[], Result], path: epath.Path, attempts: int, pause: Callable[[int], None]
) -> Result:
    """Read on every process, trying again while the store is in trouble; all end alike.

    Args:
        read: returns this process's shards.
        path: what is read, for messages.
        attempts: how often.
        pause: waits after the attempt of that number.

    Raises:
        CorruptError, ValueError: a process or more found it corrupt, or that of another model.
        StorageError: the store failed at every attempt.
    """
    for attempt in range(attempts):
        status, error = Status.OK, None
        try:
            result = read()
        except Exception as caught:  # what a corrupt file makes a reader throw is anybody's guess
            status, error = _status_of(caught), caught
        status = Status(_greatest(status))
        if status == Status.OK:
            return result
        if status == Status.MISMATCH:
            raise ValueError(one_line(None) if error is None else str(error)) from error
        if status == Status.CORRUPT:
            raise CorruptError(one_line(error)) from error
        _log.warning(
            "reading %s failed (%s): attempt %d of %d", path, one_line(error), attempt + 1, attempts
        )
        pause(attempt)
    raise StorageError(f"{path} could not be read in {attempts} attempts: {one_line(error)}")


def _status_of(error: Exception) -> Status:
    """Tell trouble with the store, which may pass, from corruption, which stays."""
    if isinstance(error, MismatchError):
        return Status.MISMATCH
    if isinstance(error, (PermissionError, ConnectionError, TimeoutError, MemoryError)):
        return Status.TRANSIENT
    if any(word in str(error) for word in _TRANSIENT):
        return Status.TRANSIENT
    return Status.CORRUPT


def one_line(error: Exception | None) -> str:
    """Write an error on one line of at most a few hundred characters; None: another process's."""
    if error is None:
        return "seen by another process"
    text = " ".join(str(error).split())
    # a store names arrays and files first, and the cause last: no space left on the device
    text = text if len(text) <= 300 else f"{text[:140]} ... {text[-155:]}"
    return f"{type(error).__name__}: {text}"
