# SPDX-License-Identifier: Apache-2.0
"""Did you mean: a name looked up in a table, and the one message where it is not there."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

Row = TypeVar("Row")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return what to say after an unknown name: the nearest known one, or all of them.

    >>> nearest("dp0", ["dpo", "ipo"]), nearest("x", ["dpo", "ipo"])
    ("; did you mean 'dpo'?", '; known: dpo, ipo')
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"


def choose(table: Mapping[str, Row], name: str, what: str) -> Row:
    """Look a name up in a table.

    Args:
        table: name -> row.
        name: what the user gave.
        what: where it was given, for the message: "config.optimizer.name", "reward".

    Raises:
        ValueError: an unknown name; the message says the nearest known one.
    """
    if name not in table:
        raise ValueError(f"{what} = {name!r:.60} is unknown{nearest(str(name), table)}")
    return table[name]
