# SPDX-License-Identifier: Apache-2.0
"""Rows from files: JSON, CSV, Parquet and Arrow; each row knows its place."""

from __future__ import annotations

import array
import codecs
import collections
import contextlib
import csv
import functools
import io
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from align_jax.core import files
from align_jax.data.messages import Row, kind_of
from align_jax.data.transcripts import RowError


class Rows(NamedTuple):
    """Rows by number.

    Attributes:
        size: how many there are.
        read: row number -> row; raises ValueError with file and line if the row is malformed.
        where: row number -> ``file:line`` or ``name[index]``.
    """

    size: int
    read: Callable[[int], Row]
    where: Callable[[int], str]


def open_file(path: str) -> Rows:
    """Open one file, by the ending of its name (``SUFFIXES``).

    Raises:
        ValueError: an unknown kind of file, or one that is damaged (with file and line).
    """
    return SUFFIXES[find_kind(path)](path)


_UNPACK = {
    ".zst": "zstd -d",
    ".bz2": "bunzip2 -k",
    ".xz": "unxz -k",
    ".lz4": "unlz4 -k",
    ".gz": "gunzip -k",
    ".zip": "unzip",
    ".tar": "tar -xf",
    ".tgz": "tar -xf",
}
_OTHER_NAMES = {".ndjson": ".jsonl", ".jsonlines": ".jsonl", ".ldjson": ".jsonl", ".pq": ".parquet"}


def find_kind(path: str) -> str:
    """Return the ending of a file's name by which it is opened.

    Raises:
        ValueError: an unknown kind of file, with the command that makes a known one of it.
    """
    if kind := next((suffix for suffix in SUFFIXES if path.endswith(suffix)), ""):
        return kind
    stem, ending = os.path.splitext(path)
    known = _OTHER_NAMES.get(ending.lower(), ending.lower())
    said = f"known: {', '.join(SUFFIXES)}"
    if ending.lower() in _UNPACK:
        packed = ".tar" if ".tar." in path else ending.lower()
        said = f"unpack it: {_UNPACK[packed]} {shlex.quote(path)}"
    elif ending.lower() in (".part", ".crdownload", ".incomplete", ".tmp"):
        said = "a download that has not ended"
    elif known in SUFFIXES:
        said = f"perhaps: mv {shlex.quote(path)} {shlex.quote(stem + known)}"
    raise ValueError(f"{path}: unknown kind of file; {said}")


def _unpacked(path: str) -> str:
    """Return a path without the ending that says how it is packed."""
    stem, ending = os.path.splitext(path)
    return stem if ending in files.PACKED else path


def numbered(name: str) -> Callable[[int], str]:
    """Return what tells where a row stands that has a number alone."""

    def where(index: int) -> str:
        return f"{name}[{index}]"

    return where


def _text(path: str, wanted: str) -> bytes:
    """Read a file of text, in UTF-8 whatever it was.

    Raises:
        ValueError: it is something else.
    """
    data = files.read_bytes(path)
    if data and (kind := files.signature(data[:512])):
        ending = os.path.splitext(path)[1]
        packed = files.PACKED.get(ending, ("",))[0]
        if packed and kind.startswith(packed):
            once = f"unpack it once, {_UNPACK[ending]} {shlex.quote(path)}"
            kind = f"{packed} data in {packed} data: {once}"
        raise ValueError(f"{path}: expected {wanted}, got {kind}")
    return _as_utf8(path, data)


# names under which a JSON object holds rows
_HOLDERS = ("data", "rows", "examples", "train", "instances")
_HOLDS_ROWS = re.compile(rb'\{\s*"(%s)"\s*:\s*\[' % "|".join(_HOLDERS).encode())


def _open_json(path: str) -> Rows:
    data = _text(path, "rows of JSON")
    if _unpacked(path).endswith(".json") or _is_document(data):
        if (found := _whole_document(path, data)) is not None:
            return _rows_of_document(path, found)
    return _open_json_lines(path, data)


def _is_document(data: bytes) -> bool:
    """Tell whether a file of lines seems to be one JSON value instead."""
    first, _, rest = data.lstrip()[: 1 << 20].partition(b"\n")
    if first[:1] != b"{":
        return first[:1] == b"["
    if rest.strip():
        return not _is_json(first.decode("utf-8", "replace"))  # it goes on in the next line
    return _HOLDS_ROWS.match(first) is not None


def _as_utf8(path: str, data: bytes) -> bytes:
    """Return a text file's bytes in UTF-8 without its mark; other encodings are named."""
    if wide := _wide(data):
        raise ValueError(f"{path}: it seems to be {wide}: iconv -f {wide} -t utf-8 {path}")
    for mark, encoding in ((b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        if data.startswith(mark):
            try:
                return (
                    data[2:].decode(encoding, errors="surrogatepass").encode(errors="surrogatepass")
                )
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: its UTF-16 is damaged: {error.reason}") from error
    data = data.removeprefix(b"\xef\xbb\xbf")
    decoder, step = codecs.getincrementaldecoder("utf-8")(), 1 << 20  # never the whole in memory
    for start in range(0, len(data), step):
        try:
            decoder.decode(data[start : start + step], final=start + step >= len(data))
        except UnicodeDecodeError as error:
            # what was left of the block before stands in front
            at = start + error.start - (len(error.object) - len(data[start : start + step]))
            line = data.count(b"\n", 0, at) + 1
            raise ValueError(
                f"{path}:{line}: not UTF-8 (byte {data[at]:#x}); it may be Latin-1: "
                f"iconv -f latin1 -t utf8 {path}"
            ) from error
    return data


def _wide(data: bytes) -> str:
    """Return the encoding of a text whose characters take several bytes and that no mark names."""
    if bytes(3) in data[:16]:
        return "utf-32le" if data[:1] != b"\x00" else "utf-32be"
    if len(data) < 8 or data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return ""
    zeros = [data[1:8:2] == bytes(4), data[:8:2] == bytes(4)]
    return ("utf-16le", "utf-16be")[zeros.index(True)] if any(zeros) else ""


def _whole_document(path: str, data: bytes) -> Any:
    """Read a file that is one JSON value; None where it is several, a line each."""
    try:
        return json.loads(data, object_pairs_hook=files.no_key_twice)
    except json.JSONDecodeError as error:
        lines = data.split(b"\n", 2)
        if error.msg == "Extra data" and len(lines) > 1 or data.lstrip()[:1] != b"[":
            return None
        raise ValueError(
            f"{path}:{error.lineno}: malformed JSON: {error.msg} (column {error.colno})"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; deep nesting
        raise ValueError(f"{path}: malformed JSON: {error}") from error


def _rows_of_document(path: str, value: Any) -> Rows:
    """Find the rows of one JSON value: a list of them, ``{"data": [...]}``, or one row."""
    if isinstance(value, dict):
        lists = [name for name, inner in value.items() if isinstance(inner, list)]
        holding = [name for name in lists if value[name] and isinstance(value[name][0], dict)]
        if len(value) == len(lists) and len(lists) > 1 and not holding:
            raise ValueError(
                f"{path}: one object with a list in each of {sorted(value)}, which looks like "
                "columns; write a row a line: {"
                + ", ".join(f'"{name}": ...' for name in sorted(value))
                + "}"
            )
        named = [name for name in _HOLDERS if name in holding]
        if named and len(holding) > 1:
            raise ValueError(
                f"{path}: several lists of rows: {', '.join(sorted(holding))}; write the one that "
                f"you mean into a file of its own: jq -c '.{named[0]}[]' {path} > rows.jsonl"
            )
        if len(lists) == len(value) == 1 and lists[0] in _HOLDERS:
            named = lists
        if not named:
            _check_not_nested(path, value)
        value = value[named[0]] if named else [value]
    where = numbered(path)

    def read(index: int) -> Row:
        return _check_row(value[index], where(index))

    return Rows(len(value), read, where)


def _check_not_nested(path: str, value: dict[str, Any]) -> None:
    """Refuse an object whose values are rows under names, or columns of numbered cells, which
    would be taken for one row.

    Raises:
        ValueError: with the command that writes rows.
    """
    keys = {tuple(inner) if isinstance(inner, dict) else () for inner in value.values()}
    names = keys.pop() if len(keys) == 1 else ()
    if names and all(name.isdigit() for name in names):
        made = f"pandas.read_json({path!r}).to_json('rows.jsonl', orient='records', lines=True)"
        raise ValueError(f"{path}: one object of columns, as pandas writes it; in Python: {made}")
    if names and len(value) > 1 and not {"role", "from"} & set(names):  # they may be messages
        raise ValueError(f"{path}: one object of rows under names: jq -c '.[]' {path} > rows.jsonl")


def _open_json_lines(path: str, data: bytes) -> Rows:
    starts, numbers = array.array("q"), array.array("q")  # of the lines that hold something
    at = number = 0
    while at < len(data):
        end = _line_end(data, at)
        number += 1
        if data[at:end].strip():
            starts.append(at)
            numbers.append(number)
        at = end + 1

    def read(index: int) -> Row:
        line = data[starts[index] : _line_end(data, starts[index])]
        try:
            row = json.loads(line, object_pairs_hook=files.no_key_twice)
        except (ValueError, RecursionError) as error:
            said = str(error)
            if isinstance(error, json.JSONDecodeError):  # whose line is always the first
                said = f"{error.msg} (column {error.colno})"
                if (
                    line.strip() == b"{"
                    or error.msg == "Extra data"
                    and line[error.pos :][:1] == b"{"
                ):
                    said += f"; jq -c . {path} > rows.jsonl writes an object a line"
            raise ValueError(
                f"{where(index)}: malformed JSON: {said}; the line begins {line[:60]!r}"
            ) from error
        return _check_row(row, where(index))

    def where(index: int) -> str:
        return f"{path}:{numbers[index]}"

    return Rows(len(starts), read, where)


def _line_end(data: bytes, start: int) -> int:
    end = data.find(b"\n", start)
    return len(data) if end < 0 else end


def _check_row(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise RowError(f"expected a JSON object with named fields, got {kind_of(row)}", where=where)
    return row


def _open_csv(path: str) -> Rows:
    """Open CSV or TSV: a line of names, then a row a line (or several: a quoted text may have
    line ends)."""
    text = _text(path, "rows of CSV").decode()
    head = text.partition("\n")[0]
    tabs = _unpacked(path).endswith(".tsv")
    delimiter = "\t" if tabs else max(",;\t", key=head.count)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        strict=True,
        # "prompt, chosen": the space is the file's, before the names and before the cells
        skipinitialspace=0 < head.count(delimiter) == head.count(f"{delimiter} "),
    )
    cells: list[list[str]] = []
    lines, line = array.array("q"), 1
    try:
        for row in reader:
            if row and len(row) != len((cells or [row])[0]):
                raise ValueError(
                    f"{path}:{line}: {len(row)} cells in a row, {len(cells[0])} names in the first "
                    f"line: {cells[0]}; a text with {delimiter!r} or a line end stands in quotes"
                )
            if row:
                cells.append(row)
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{line}: malformed CSV: {error}") from error
    names = [name.strip() for name in cells.pop(0)] if cells else []
    if names[:1] == [""]:
        names[0] = "Unnamed: 0"  # pandas writes its index so, and calls it this when it reads
    twice = [name for name, count in collections.Counter(names).items() if count > 1 or not name]
    if twice:
        raise ValueError(f"{path}:1: columns without a name, or with the same one: {names}")
    readers = [_cell_reader(name, [row[i] for row in cells]) for i, name in enumerate(names)]

    def read(index: int) -> Row:
        return {
            name: of(cell) if of else cell for name, of, cell in zip(names, readers, cells[index])
        }

    def where(index: int) -> str:
        return f"{path}:{lines[index + 1]}"

    return Rows(len(cells), read, where)


def _cell_reader(name: str, column: Sequence[str]) -> Callable[[str], Any] | None:
    """Return what reads a column's cells; None where they are texts as they stand.

    A column of which every cell is a list or object of JSON has those values; where all others are
    numbers, an empty cell is a missing one.  A number is read where one is needed; an answer may
    well be a number and still a text.
    """
    filled = [cell for cell in column if cell.strip()]
    if name == "enable_thinking" and all(cell.lower() in ("true", "false") for cell in filled):
        return lambda cell: {"true": True, "false": False}.get(cell.lower())
    if filled and all(map(_is_json, filled)):
        return lambda cell: json.loads(cell) if cell.strip() else None
    if len(filled) < len(column) and all(map(_is_number, filled)):
        return lambda cell: cell if cell.strip() else None
    return None


def _is_json(cell: str) -> bool:
    if cell.lstrip()[:1] not in ("[", "{"):
        return False
    try:
        json.loads(cell)
    except (ValueError, RecursionError):
        return False
    return True


def _is_number(cell: str) -> bool:
    try:
        return not math.isnan(float(cell))
    except ValueError:
        return False


_BLOCK = 1024  # rows of a table that become Python's values at once


def _as_written(value: Any, listed: bool = False) -> Any:
    """Return a table's value without the members that it has not itself.

    The structs of a column's lists share their members: a call of ``f(city)`` comes back from the
    file with a null for every argument of every other call, and so does a tool's description.  A
    null that was written there cannot be told from these, and goes with them.

    >>> _as_written([{"name": "f", "arguments": {"city": "Rome", "count": None}}])
    [{'name': 'f', 'arguments': {'city': 'Rome'}}]
    """
    if isinstance(value, list):
        return [_as_written(one, True) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        name: _as_written(inner, listed)
        for name, inner in value.items()
        if not listed or inner is not None
    }


def _open_parquet(path: str) -> Rows:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(
            path if "://" not in path else io.BytesIO(epath.Path(path).read_bytes()),
            page_checksum_verification=True,  # where the file has any
        )
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise _unreadable(path, "Parquet", error) from error
    return _rows_of_table(path, table)


def _open_arrow(path: str) -> Rows:
    """Open Arrow's file format (which feather is too) or its stream."""
    import pyarrow.feather
    import pyarrow.ipc

    data = pyarrow.BufferReader(files.read_bytes(path))
    start = data.read(6)
    data.seek(0)
    try:
        if start == b"ARROW1":
            table = pyarrow.ipc.open_file(data).read_all()
        elif start[:4] == b"FEA1":
            table = pyarrow.feather.read_table(data)
        else:
            table = pyarrow.ipc.open_stream(data).read_all()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise _unreadable(path, "Arrow", error) from error
    return _rows_of_table(path, table)


def _unreadable(path: str, kind: str, error: Exception) -> ValueError:
    return ValueError(
        f"{path}: not a readable {kind} file: {error}; it is {files.looks_like(path)}"
    )


def _rows_of_table(path: str, table: Any) -> Rows:
    import pyarrow

    where = numbered(path)

    @functools.lru_cache(maxsize=2)
    def block(number: int) -> list[Row]:
        return table.slice(number * _BLOCK, _BLOCK).to_pylist()

    def read_as_stored(index: int) -> Row:
        number, place = divmod(index, _BLOCK)
        # where one of the block's rows is damaged it is perhaps another
        with contextlib.suppress(ValueError, pyarrow.ArrowException):
            return block(number)[place]
        return table.slice(index, 1).to_pylist()[0]

    def read(index: int) -> Row:
        try:
            return {name: _as_written(value) for name, value in read_as_stored(index).items()}
        except (ValueError, pyarrow.ArrowException) as error:
            raise ValueError(f"{where(index)}: not a readable row: {error}") from error

    return Rows(table.num_rows, read, where)


_TEXTS = {".json": _open_json, ".jsonl": _open_json, ".csv": _open_csv, ".tsv": _open_csv}
SUFFIXES: Mapping[str, Callable[[str], Rows]] = {
    **_TEXTS,
    **{f"{suffix}{packed}": _TEXTS[suffix] for suffix in _TEXTS for packed in files.PACKED},
    ".parquet": _open_parquet,
    ".arrow": _open_arrow,
    ".feather": _open_arrow,
}
