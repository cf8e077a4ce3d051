# SPDX-License-Identifier: Apache-2.0
"""The user's own parts, named ``module:name`` where a table's row is: found in the user's file."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from align_jax.core.choose import choose, nearest

Row = TypeVar("Row")


def row(
    table: Mapping[str, Row],
    name: str,
    what: str,
    adapt: Callable[[Callable[..., Any]], Row] | None = None,
) -> Row:
    """Look a name up in a table, or a ``module:name`` in the user's file.

    Args:
        table: name -> row.
        name: what the user gave.
        what: where it was given, for the message.
        adapt: makes a row of a plain function; None: the user's file holds a whole row.

    Raises:
        ValueError: an unknown name, with the nearest; a module that cannot be imported; something
            that is no row of this table.
    """
    if ":" not in name:
        return choose(table, name, what)
    kind = type(next(iter(table.values())))
    found = load(name, what, "function" if adapt else kind.__name__)
    if isinstance(found, kind):
        return found
    if adapt is not None and inspect.isfunction(found):
        return adapt(found)
    wanted = f"{inspect.getmodule(kind).__name__}.{kind.__name__}"  # type: ignore[union-attr]
    raise ValueError(
        f"{what} = {name!r} is a {type(found).__name__}; expected "
        f"{'a function, or ' if adapt else ''}an {wanted}, as the table's own rows are"
    )


def load(path: str, what: str, kind: str = "function") -> Any:
    """Return what ``module:name`` names.

    What the very script that runs holds is taken from there: importing a script without a main
    guard would run it a second time.

    Args:
        path: its name.
        what: it is for, in messages: "a reward function".
        kind: of thing it should be, in messages.

    Raises:
        ValueError: a path not of that form, a module that cannot be imported, no such name.
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"{what} is named 'module:function', got {path!r}")
    loaded = _module(module)
    found = getattr(loaded, name, None)
    if found is None:
        known = [
            key
            for key, value in vars(loaded).items()
            if not key.startswith("_") and not inspect.ismodule(value)
        ]
        raise ValueError(f"{module!r} has no {kind} {name!r}{nearest(name, known)}")
    return found


def is_named(path: str) -> bool:
    """Tell whether a path is ``module:name`` of a module that is there; it is not imported."""
    module, colon, _ = path.partition(":")
    return bool(colon) and (module == "__main__" or module in sys.modules or _origin(module) != "")


def digest(path: str) -> str:
    """Return what changes when the file does in which ``module:name`` lies; "" of other names."""
    if ":" not in path:
        return ""
    file = getattr(_module(path.partition(":")[0]), "__file__", None)
    return hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest()[:16] if file else ""


def _module(name: str) -> Any:
    if name in sys.modules and name != "__main__":
        return sys.modules[name]
    main = sys.modules["__main__"]
    script = getattr(main, "__file__", None)  # none of an interpreter's own prompt
    if name == "__main__" or (script and _origin(name) == os.path.abspath(script)):
        return main
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and name.split(".")[0] == error.name.split(".")[0]:
            hint = f" (a module, not a file: {name[:-3]!r}?)" if name.endswith(".py") else ""
            raise ValueError(
                f"no module {name!r}{hint}; start where it lies, or name its folder in PYTHONPATH"
            ) from None
        raise ValueError(f"the module {name!r} cannot be imported: {error}") from error
    except (Exception, SystemExit) as error:  # whatever a user's module does
        raise ValueError(
            f"the module {name!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error


def _origin(name: str) -> str:
    """Return where a module lies; "" where there is none."""
    try:
        return str(getattr(importlib.util.find_spec(name), "origin", ""))
    except (ImportError, ValueError, AttributeError):
        return ""
