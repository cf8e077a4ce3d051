# SPDX-License-Identifier: Apache-2.0
"""A mistake in a notebook is its message alone, as it is on the command line.

Only what this package raises itself is cut so: an error in a callback, a reward or a library keeps
its traceback, and so does every error outside a notebook.  ``%debug`` goes where it was raised.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from align_jax.runs.command import MISTAKES
from align_jax.runs.config_file import words

Given = ParamSpec("Given")
Found = TypeVar("Found")


def told(function: Callable[Given, Found]) -> Callable[Given, Found]:
    """Return a function of the front door whose mistakes name keys as Python does, and which a
    notebook shows without a traceback.

    >>> @told
    ... def refuse():
    ...     raise ValueError("no column; --config.data.columns renames one")
    >>> refuse()
    Traceback (most recent call last):
    ...
    ValueError: no column; config.data.columns renames one
    """

    @functools.wraps(function)
    def called(*args: Given.args, **kwargs: Given.kwargs) -> Found:
        try:
            return function(*args, **kwargs)
        except (*MISTAKES, TypeError) as error:
            *_, (raised, _) = traceback.walk_tb(error.__traceback__)
            if raised.f_globals.get("__name__", "").startswith("align_jax."):
                _tell(error)
            raise

    return called


def _tell(error: Exception) -> None:
    """Put a mistake into Python's words, and have IPython print them alone."""
    if len(error.args) == 1 and isinstance(error.args[0], str):
        error.args = (error.args[0].replace("--config.", "config."),)
    line = f"{type(error).__name__}: {words(error)}"
    error._render_traceback_ = lambda: [line]  # type: ignore[attr-defined]  # IPython asks for it
