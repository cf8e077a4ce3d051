# SPDX-License-Identifier: Apache-2.0
"""Rows from Python: a list, a frame, a data set or an iterable, read by the same rules as a file.

    {"prompt": ..., "chosen": ..., "rejected": ...}, ... ─ given ─► Source ─► as a file's rows

A row is named by its number, ``data[17]``; the source by what its rows are, so that a run that goes
on is refused other rows.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import grain

from align_jax.data.row_files import Rows, numbered
from align_jax.data.rows import Row
from align_jax.data.sources import Source, plain

MOST_ROWS = 50_000_000
MOST_STREAMED = 5_000_000  # of what does not say how many it has
EXPECTED = (
    "a list of dicts, a pandas or polars frame, an Arrow table, a datasets.Dataset, a Grain source "
    "or an iterable of dicts"
)


def given(data: Any, name: str) -> Source:
    """Return rows from Python as a source.

    Args:
        data: dicts in a list, a pandas or polars frame, an Arrow table, a ``datasets.Dataset``, a
            Grain source or any iterable, which is read to its end.
        name: of the argument that it was, for messages.

    Raises:
        TypeError: something else.
        ValueError: no rows, or endlessly many; a row that is no dict; columns in a row's place.

    >>> source = given([{"text": "one"}, {"text": "two"}], "data")
    >>> source.spec, source.where(1), source[1]
    ('rows:data@582dc3becc65', 'data[1]', {'text': 'two'})
    """
    rows: list[Row] = []
    digest = hashlib.sha256()
    most = MOST_ROWS if hasattr(data, "__len__") else MOST_STREAMED
    for index, row in enumerate(_rows(data, name)):
        if index == most:
            fix = "" if most == MOST_ROWS else "; is it endless? Else give a list, or a file's name"
            raise ValueError(f"{name}: more than {most:,} rows{fix}")
        where = f"{name}[{index}]"
        rows.append(_row(row, where))
        try:
            digest.update(json.dumps(sorted(rows[-1].items()), default=_described).encode())
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{where}: its fields cannot be read: {error}") from error
    if not rows:
        raise ValueError(f"{name}: no rows")
    opened = Rows(len(rows), rows.__getitem__, numbered(name))
    return Source(f"rows:{name}@{digest.hexdigest()[:12]}", digest.hexdigest(), lambda: opened)


def _rows(data: Any, name: str) -> Iterable[Any]:
    """Return an iterable of rows of whatever holds them."""
    if isinstance(data, Mapping):
        keys = ", ".join(map(repr, itertools.islice(data, 5)))
        if any(hasattr(value, "column_names") for value in [*data.values()]):
            one = f"{name}[{next(iter(data))!r}]"
            raise ValueError(f"{name}: a dict of data sets, {keys}: give one of them, as {one}")
        raise ValueError(
            f"{name}: a dict with the keys {keys}: give rows, such as [{{'prompt': ..., ...}}]; of "
            "columns, pandas.DataFrame(columns) makes rows"
        )
    if hasattr(data, "with_format"):
        data = _plain_view(data)
    if hasattr(data, "collect_schema") and not hasattr(data, "to_dicts"):  # polars, lazy
        data = data.collect()
    if hasattr(data, "to_dict") and hasattr(data, "iloc"):  # pandas
        if not hasattr(data, "columns"):
            raise ValueError(f"{name}: a frame's column alone: give the frame with all its fields")
        if any(name is not None for name in data.index.names):  # a field, as in a file of it
            data = data.reset_index(allow_duplicates=True)
        if not data.columns.is_unique:
            raise ValueError(f"{name}: columns of the same name: {list(data.columns)}")
        return data.astype(object).where(data.notna(), None).to_dict("records")
    if hasattr(data, "to_dicts"):  # polars
        return data.to_dicts()
    if hasattr(data, "to_pylist"):  # Arrow
        return data.to_pylist()
    if isinstance(data, grain.MapDataset):  # what a filter left out is None
        if len(data) > MOST_ROWS:
            raise ValueError(f"{name}: a Grain data set that repeats; give it before .repeat()")
        return (row for row in map(data.__getitem__, range(len(data))) if row is not None)
    if (
        hasattr(data, "__getitem__")
        and hasattr(data, "__len__")
        and not isinstance(data, (str, bytes))
    ):
        return (data[index] for index in range(len(data)))
    if isinstance(data, Iterable) and not isinstance(data, (str, bytes)):
        return data
    raise TypeError(
        f"{name}: expected {EXPECTED}, or the name of a source; got {type(data).__name__}"
        f"{', which is to be called' if callable(data) else ''}"
    )


def _plain_view(data: Any) -> Any:
    """Return a data set of ``datasets`` that gives dicts, not arrays or frames: the columns that
    the user chose, or what the user's own transform makes of a row."""
    view = getattr(data, "format", None)
    if view is None:  # one that streams
        return data.with_format(None)
    if view["type"] == "custom":
        return data
    return data.with_format(None, view["columns"], view["output_all_columns"])


def _row(row: Any, where: str) -> Row:
    """Return a row as plain values.

    Raises:
        ValueError: no dict, a field without a name, bytes that are no text.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected a dict with named fields, got {type(row).__name__}")
    if unnamed := [key for key in row if not isinstance(key, str)]:
        raise ValueError(f"{where}: a field's name is a text, got {unnamed[0]!r}")
    try:
        return plain(dict(row))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: bytes that are no UTF-8: {error}") from error


def _described(value: Any) -> str:
    """Return what tells a value that JSON has not, the same in the next process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
