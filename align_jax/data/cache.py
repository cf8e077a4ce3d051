# SPDX-License-Identifier: Apache-2.0
"""Arrays kept on disk for the next start: memory-mapped, and shared by the processes of a host.

    FOLDER/NAME/index.json     what the arrays are, and the checksum of each
    FOLDER/NAME/FIELD.npy      opened with mmap_mode="r": what is not looked at is not in memory
    FOLDER/NAME.lock           held by the process that makes them, while the others wait

An entry appears whole, by a rename; one that is damaged, or of another version, is made anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

VERSION = 1
INDEX = "index.json"
_BLOCK = 1 << 24  # bytes read at once for a checksum
_log = logging.getLogger(__name__)


class Kept(NamedTuple):
    """What is kept under a name: arrays, and notes that JSON can hold."""

    arrays: Mapping[str, np.ndarray]
    notes: Mapping[str, Any]


class Damaged(ValueError):
    """An entry that cannot be used."""


def keep(folder: str, name: str, make: Callable[[], Kept]) -> Kept:
    """Return what is kept under a name; make and keep it where there is nothing yet.

    One process of a host makes it while the others wait.  Where the disk has no room, what was made
    is returned all the same, with a warning.

    Args:
        folder: a local folder; "" = nothing is kept.
        name: of the entry: all that decides what ``make`` returns is to be part of it.
        make: makes it.

    Raises:
        ValueError: the folder is not a local one, or nothing can be written there.
    """
    if not folder:
        return make()
    path = os.path.join(folder, name)
    with contextlib.suppress(Damaged):
        if (found := _load(path)) is not None:
            return found
    with _alone(folder, name):
        try:
            found = _load(path)
        except Damaged as error:
            _log.warning("a cache is set aside and made anew: %s", error)
            _set_aside(path)
            found = None
        if found is not None:
            return found
        made = make()
        try:
            _save(path, made)
            return _load(path) or made
        except OSError as error:
            _log.warning("%s is not kept: %s; this run goes on without it", path, error.strerror)
            return made


@contextlib.contextmanager
def _alone(folder: str, name: str) -> Iterator[None]:
    """Hold an entry's lock; a process that ends gives it back, however it ends."""
    if "://" in folder:
        raise ValueError(
            f"config.data.cache = {folder!r}: expected a local folder, which files can be mapped "
            "from"
        )
    try:
        os.makedirs(folder, exist_ok=True)
        # whatever writes in vain is told before hours of work
        lock = open(os.path.join(folder, f"{name}.lock"), "a")
    except OSError as error:
        raise ValueError(
            f"config.data.cache = {folder!r}: cannot write there ({error.strerror}); name another "
            "folder, or '' to keep nothing"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.warning("waiting for the process that makes %s/%s", folder, name)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _save(path: str, made: Kept) -> None:
    folder, name = os.path.split(path)
    for rest in os.listdir(folder):  # of a process that was killed: we hold the lock
        if rest.startswith(f"{name}.part-"):
            shutil.rmtree(os.path.join(folder, rest), ignore_errors=True)
    part = f"{path}.part-{socket.gethostname()}-{os.getpid()}"
    try:
        os.mkdir(part)
        for field, array in made.arrays.items():
            np.save(os.path.join(part, f"{field}.npy"), array, allow_pickle=False)
        index = {
            "version": VERSION,
            "notes": made.notes,
            "files": {field: _state(os.path.join(part, f"{field}.npy")) for field in made.arrays},
        }
        with open(os.path.join(part, INDEX), "w", encoding="utf-8") as file:
            json.dump({**index, "digest": _digest(index)}, file)
        os.rename(part, path)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _load(path: str) -> Kept | None:
    """Open an entry; None where there is none.

    Raises:
        Damaged: it is not whole, or of another version.
    """
    try:
        with open(os.path.join(path, INDEX), encoding="utf-8") as file:
            index = json.load(file)
        digest = index.pop("digest")
        if index["version"] != VERSION:
            raise Damaged(f"{path}: of version {index['version']}, not {VERSION}")
        if digest != _digest(index):
            raise Damaged(f"{path}/{INDEX}: not as it was written")
        arrays = {}
        for field, state in index["files"].items():
            file_path = os.path.join(path, f"{field}.npy")
            if _state(file_path) != state:
                raise Damaged(f"{file_path}: not as it was written")
            # a view: numpy's memmap would cost every slice microseconds
            arrays[field] = np.load(file_path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    except FileNotFoundError as error:
        if os.path.exists(path):
            raise Damaged(f"{error.filename}: no such file") from error
        return None
    except Damaged:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path}: {error}") from error
    return Kept(arrays, index["notes"])


def _digest(index: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _state(path: str) -> list[int]:
    """Return a file's size and checksum."""
    checksum = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
        return [file.tell(), checksum]


def _set_aside(path: str) -> None:
    aside = f"{path}.damaged"
    if os.path.isdir(aside):
        shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)
