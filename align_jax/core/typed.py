# SPDX-License-Identifier: Apache-2.0
"""The command as it was typed, for messages and records."""

from __future__ import annotations

import pathlib
import sys


def program() -> str:
    """Return the name of the program that runs, as it was typed: ``align-jax train``, ``python -m
    align_jax.train``, or a script's file."""
    main = sys.modules["__main__"]
    if called := getattr(main, "CALLED", ""):  # by the command align-jax
        return called
    spec = main.__spec__
    return f"python -m {spec.name}" if spec else f"python {pathlib.Path(sys.argv[0]).name}"
