# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a workdir.

A local folder's lock is the kernel's (``lockf``): it ends with the process that holds it, however
that ends, so a killed run never leaves one behind, and process numbers, which repeat in containers,
play no part.  A bucket has no locks: there a file is written anew every ``BEAT_SECONDS``, and one
that does not change while another run watches it is stale.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from align_jax.core.files import writing

FILE = "lock.json"
BEAT_SECONDS = 20.0
_log = logging.getLogger(__name__)
_held: set[str] = set()  # by this process, whose own locks lockf does not see


@contextlib.contextmanager
def hold(workdir: epath.PathLike, *, beat_seconds: float = BEAT_SECONDS) -> Iterator[None]:
    """Hold a workdir while a run writes there; of several processes the first one does.

    Args:
        workdir: a local path or ``gs://...``; it is made where it does not exist.
        beat_seconds: between two signs of life in a bucket.

    Raises:
        ValueError: another run holds it; who that is, and since when.
    """
    folder = epath.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    name = os.path.realpath(folder) if "://" not in str(workdir) else str(workdir)
    me = {"host": socket.gethostname(), "pid": os.getpid(), "since": _now()}
    if name in _held:
        raise _refusal(workdir, me)
    _held.add(name)
    try:
        local = "://" not in str(workdir)
        with _locked(folder, me) if local else _beating(folder, me, beat_seconds):
            yield
    finally:
        _held.discard(name)


@contextlib.contextmanager
def _locked(folder: epath.Path, me: dict[str, Any]) -> Iterator[None]:
    import fcntl  # here, because only Unix has it

    with open(str(folder / FILE), "ab+", buffering=0) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _refusal(folder, _parsed(file.read().decode())) from None
        except OSError as error:  # a file system without locks
            _log.warning("%s cannot be locked (%s): keep other runs out of it", folder, error)
        file.truncate(0)
        said = json.dumps(me).encode() + b"\n"
        with writing(folder / FILE):
            while said:  # a disk that is nearly full takes a part
                said = said[file.write(said) :]
        yield
        file.truncate(0)


@contextlib.contextmanager
def _beating(folder: epath.Path, me: dict[str, Any], beat_seconds: float) -> Iterator[None]:
    path, mine, over = folder / FILE, secrets.token_hex(8), threading.Event()
    if path.exists() and (seen := path.read_text()):
        _log.warning("%s is there: watching whether its run is alive", path)
        if (now := _change(path, seen, 3 * beat_seconds)) is not None:
            raise _refusal(folder, _parsed(now))

    def beat(number: int) -> None:
        path.write_text(json.dumps({**me, "run": mine, "beat": number}) + "\n")

    def go_on() -> None:
        number = 0
        while not over.wait(beat_seconds):
            number += 1
            with contextlib.suppress(OSError):  # the next one may arrive
                beat(number)

    beat(0)
    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(OSError):
            path.unlink()


def _change(path: epath.Path, seen: str, seconds: float) -> str | None:
    """Watch a file; return what it says instead of ``seen``, None if that is nothing."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (now := _read(path)) not in ("", seen):
            return now
        time.sleep(min(1.0, seconds / 20))
    return None


def _read(path: epath.Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _parsed(text: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, dict):
            return found
    return {}


def _refusal(workdir: epath.PathLike, holder: dict[str, Any]) -> ValueError:
    who = ", ".join(f"{name} {holder[name]}" for name in ("host", "pid", "since") if name in holder)
    return ValueError(
        f"workdir {workdir} is in use by another run ({who or 'which has not said who it is'}): "
        "stop that one, or give this one another --workdir"
    )


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
