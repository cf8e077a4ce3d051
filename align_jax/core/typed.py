# SPDX-License-Identifier: Apache-2.0
"""The command as it was typed, for messages and records; and Ctrl-C where no program can take it.

``align_jax/__init__.py`` imports this file before all others, so it imports nothing that takes
time.
"""

from __future__ import annotations

import os
import signal
import sys

SCRIPT = "align-jax"


def program() -> str:
    """Return the name of the program that runs, as it was typed: ``align-jax train``, ``python -m
    align_jax.train``, or a script's file."""
    main = sys.modules["__main__"]
    if called := getattr(main, "CALLED", ""):  # by the command align-jax
        return called
    if main.__spec__:
        return f"python -m {main.__spec__.name.removesuffix('.__main__')}"
    file = os.path.basename(sys.argv[0])
    if file == "-m":  # Python is still looking for the module
        return f"python -m {_module()}"
    return " ".join([SCRIPT, *sys.argv[1:2]]) if file == SCRIPT else f"python {file}"


def is_starting() -> bool:
    """Tell whether Python was started for one of this package's programs, and has not come to it
    yet: the package is imported first."""
    file = os.path.basename(sys.argv[0]) if sys.argv else ""
    return file == SCRIPT or file == "-m" and bool(_module())


def _module() -> str:
    """Return the module of this package that ``python -m`` was given, "" for another's."""
    words = [word.removeprefix("-m") for word in sys.orig_argv]
    return next((word for word in words if word.partition(".")[0] == "align_jax"), "")


def take_interrupts() -> None:
    """Let Ctrl-C end the process at once with one line: where an exception would fall into the
    middle of an import, or into Python's own end, and be shown, or taken for another."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)


def give_interrupts() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(*_: object) -> None:
    try:
        print(f"{program()}: interrupted", file=sys.stderr, flush=True)
    except (OSError, RuntimeError):  # nobody reads, or another line is half written
        pass
    os._exit(130)
