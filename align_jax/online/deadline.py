# SPDX-License-Identifier: Apache-2.0
"""A time limit for what a user wrote.

call ─► fn, in the caller's own thread: it may set signals' handlers
  └─ watcher, a thread ─ time is over ─► an exception within fn ─ it goes on ─► the process ends
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

_KNOCKS = 5  # seconds that what is to stop may still take


class OutOfTime(TimeoutError):
    """A call took longer than it may."""


class _Stop(BaseException):
    """Ends a call; its ``except Exception`` does not catch it."""


def call(fn: Callable[[], Any], seconds: float, describe: Callable[[FrameType | None], str]) -> Any:
    """Call a function, and end it when its time is over.

    A function that cannot be ended, because it waits in another language's code or catches
    everything, ends the process with status 1, and the message on standard error.

    Args:
        fn: the function.
        seconds: how long it may take; 0 = for ever.
        describe: from where it is at that time to the message.

    Raises:
        OutOfTime: it took longer.
    """
    if not seconds:
        return fn()
    done, told, here = threading.Event(), [""], threading.get_ident()
    in_main = threading.current_thread() is threading.main_thread()

    def ring(number: int, frame: FrameType | None) -> None:
        if not done.is_set():
            raise _Stop

    def watch() -> None:
        if done.wait(seconds):
            return
        told[0] = describe(sys._current_frames().get(here))
        for _ in range(_KNOCKS):
            if in_main:  # a signal interrupts what sleeps or waits for a socket, too
                signal.pthread_kill(here, signal.SIGURG)
            else:
                stop = ctypes.py_object(_Stop)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(here), stop)
            if done.wait(1.0):
                return
        print(f"{told[0]}; it cannot be stopped: the run ends", file=sys.stderr, flush=True)
        os._exit(1)

    before = signal.signal(signal.SIGURG, ring) if in_main else None
    threading.Thread(target=watch, daemon=True).start()
    try:
        try:
            return fn()
        finally:
            done.set()
            if in_main:
                signal.signal(signal.SIGURG, before)
    except _Stop:
        raise OutOfTime(told[0]) from None
