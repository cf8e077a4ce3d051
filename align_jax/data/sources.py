# SPDX-License-Identifier: Apache-2.0
"""Where rows come from: files, TFDS, the Hugging Face hub, code; all read as random-access rows
that know their place.

    path, glob, gs://...      .json .jsonl .parquet, each also .gz (not Parquet)
    tfds:name:split           a TFDS builder prepared with file_format="array_record", or its
                              directory
    hf:owner/name[/folder]:split   a data set repository's own JSON or Parquet files
    builtin:name:split[?seed=0&size=512]   made by code (data/synthetic.py)
"""

from __future__ import annotations

import bisect
import dataclasses
import glob
import io
import json
import pathlib
import re
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from align_jax.core import files
from align_jax.core.choose import nearest
from align_jax.data import synthetic
from align_jax.data.rows import Row

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")


@dataclasses.dataclass(frozen=True)
class Source:
    """Rows by number.

    Attributes:
        spec: what the user wrote.
        digest: changes when the data does (path, size and time of change; or name and version):
            part of cache keys.
        rows: the number of rows.
        read: row number -> row; raises ValueError with file and line if the row is malformed.
        where: row number -> ``file:line`` or ``name[index]``.
    """

    spec: str
    digest: str
    rows: int
    read: Callable[[int], Row]
    where: Callable[[int], str]

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self.rows:
            raise IndexError(f"{self.spec}: row {index} of {self.rows}")
        return self.read(index)


def open_source(spec: str) -> Source:
    """Open a data source as random-access rows.

    Args:
        spec: a path, a glob, ``tfds:name:split``, ``hf:owner/name:split`` or
            ``builtin:name:split``.

    Returns:
        The source; several files are one source, in the order of their names.

    Raises:
        FileNotFoundError: no such file, or a glob that matches nothing; the nearest names are
            given.
        ValueError: a malformed spec, an unknown kind of file, malformed JSON (with file and line),
            or no rows.
    """
    scheme = spec.split(":", 1)[0]
    if scheme in SCHEMES:
        source = SCHEMES[scheme](spec)
    else:
        source = _concatenate(spec, [_open_file(path) for path in _expand(spec)])
    if not len(source):
        raise ValueError(f"{spec}: no rows")
    return source


def _expand(spec: str) -> list[str]:
    remote = "://" in spec
    if any(character in spec for character in "*?["):
        if remote:
            folder, _, pattern = spec.rpartition("/")
            paths = sorted(str(path) for path in epath.Path(folder).glob(pattern))
        else:
            paths = sorted(glob.glob(spec, recursive=True))
        if not paths:
            raise FileNotFoundError(f"no file matches {spec!r}")
        return paths
    path = epath.Path(spec)
    if path.is_dir():
        raise ValueError(
            f"{spec!r} is a directory: name its files, for example {spec.rstrip('/')}/*.jsonl"
        )
    if not path.exists():
        beside = [] if remote or not path.parent.is_dir() else sorted(path.parent.iterdir())
        known = [str(other) for other in beside if other.name.endswith(SUFFIXES)][:100]
        raise FileNotFoundError(f"no such file: {spec!r}" + (nearest(spec, known) if known else ""))
    return [spec]


def _open_file(path: str) -> Source:
    if not path.endswith(SUFFIXES):
        raise ValueError(f"{path}: unknown kind of file; known: {', '.join(SUFFIXES)}")
    if path.endswith(".parquet"):
        return _open_parquet(path)
    data = files.read_bytes(path)
    if data and (kind := files.signature(data[:512])):
        raise ValueError(f"{path}: expected rows of JSON, got {kind}")
    data = _as_utf8(path, data)
    first = data.lstrip()[:1]
    if first == b"[" or path.removesuffix(".gz").endswith(".json"):
        if (found := _whole_document(path, data)) is not None:
            return _rows_of_document(path, found)
    return _open_json_lines(path, data)


def _as_utf8(path: str, data: bytes) -> bytes:
    """Return a text file's bytes in UTF-8 without its mark; other encodings are named."""
    for mark, encoding in ((b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        if data.startswith(mark):
            return data[2:].decode(encoding, errors="replace").encode(errors="surrogatepass")
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line}: not UTF-8 (byte {data[error.start]:#x}); it may be Latin-1: "
            f"iconv -f latin1 -t utf8 {path}"
        ) from error
    return data


def _whole_document(path: str, data: bytes) -> Any:
    """Read a file that is one JSON value; None where it is several, a line each."""
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        lines = data.split(b"\n", 2)
        if error.msg == "Extra data" and len(lines) > 1 or data.lstrip()[:1] != b"[":
            return None
        raise ValueError(
            f"{path}:{error.lineno}: malformed JSON: {error.msg} (column {error.colno})"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; deep nesting
        raise ValueError(f"{path}: malformed JSON: {error}") from error


def _rows_of_document(path: str, value: Any) -> Source:
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
        named = [name for name in ("data", "rows", "examples", "train") if name in holding]
        value = value[named[0]] if named else [value]
    where = _numbered(path)

    def read(index: int) -> Row:
        return _check_row(value[index], where(index))

    return Source(path, _digest(path), len(value), read, where)


def _numbered(name: str) -> Callable[[int], str]:
    """Return what tells where a row stands that has a number alone."""

    def where(index: int) -> str:
        return f"{name}[{index}]"

    return where


def _digest(path: str) -> str:
    stat = epath.Path(path).stat()
    return f"{path}:{stat.length}:{stat.mtime}"


def _open_json_lines(path: str, data: bytes) -> Source:
    numbered = [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]

    def read(index: int) -> Row:
        number, line = numbered[index]
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}:{number}: malformed JSON: {error}; the line begins {line[:60]!r}"
            ) from error
        return _check_row(row, f"{path}:{number}")

    def where(index: int) -> str:
        return f"{path}:{numbered[index][0]}"

    return Source(path, _digest(path), len(numbered), read, where)


def _check_row(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(
            f"{where}: expected a JSON object with named fields, got {type(row).__name__}"
        )
    return row


def _open_parquet(path: str) -> Source:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(
            path if "://" not in path else io.BytesIO(epath.Path(path).read_bytes()),
            page_checksum_verification=True,  # where the file has any
        )
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ValueError(
            f"{path}: not a readable Parquet file: {error}; it is {files.looks_like(path)}"
        ) from error

    where = _numbered(path)

    def read(index: int) -> Row:
        try:
            return table.slice(index, 1).to_pylist()[0]
        except (ValueError, pyarrow.ArrowException) as error:
            raise ValueError(f"{where(index)}: not a readable row: {error}") from error

    return Source(path, _digest(path), table.num_rows, read, where)


def _concatenate(spec: str, parts: Sequence[Source]) -> Source:
    if len(parts) == 1:
        return dataclasses.replace(parts[0], spec=spec)
    ends = np.cumsum([len(part) for part in parts]).tolist()

    def locate(index: int) -> tuple[Source, int]:
        part = bisect.bisect_right(ends, index)
        return parts[part], index - (ends[part - 1] if part else 0)

    def read(index: int) -> Row:
        part, offset = locate(index)
        return part.read(offset)

    def where(index: int) -> str:
        part, offset = locate(index)
        return part.where(offset)

    return Source(spec, "|".join(part.digest for part in parts), ends[-1], read, where)


def _open_builtin(spec: str) -> Source:
    head, _, query = spec.partition("?")
    fields = head.split(":")
    options = dict(urllib.parse.parse_qsl(query, strict_parsing=True)) if query else {}
    unknown = sorted(set(options) - {"seed", "size"})
    if unknown or len(fields) > 3:
        raise ValueError(
            f"{spec!r}: expected builtin:NAME:SPLIT?seed=0&size=512, got options {unknown}"
        )
    name, split = fields[1], fields[2] if len(fields) == 3 else "train"
    made = synthetic.make(name, split, **{key: int(value) for key, value in options.items()})
    return Source(spec, f"{spec}@{synthetic.VERSION}", made.size, made.row, _numbered(head))


def _open_tfds(spec: str) -> Source:
    import tensorflow_datasets as tfds

    name, _, split = spec.removeprefix("tfds:").rpartition(":")
    if not name:
        raise ValueError(f"{spec!r}: expected tfds:NAME:SPLIT")
    is_folder = "/" in name and epath.Path(name).is_dir()
    builder = tfds.builder_from_directory(name) if is_folder else tfds.builder(name)
    if split not in builder.info.splits:
        raise ValueError(
            f"{spec}: no split {split!r}; there are {sorted(builder.info.splits)} in "
            f"{builder.data_dir} (is it prepared, with file_format='array_record'?)"
        )
    rows = builder.as_data_source(split)

    def read(index: int) -> Row:
        return _plain(rows[index])

    return Source(spec, f"{builder.data_dir}:{split}", len(rows), read, _numbered(spec))


def _plain(value: Any) -> Any:
    """Turn what TFDS yields (numpy arrays and scalars, bytes) into plain Python values."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray):
        return [_plain(entry) for entry in value.tolist()] if value.ndim else _plain(value.item())
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value.item() if isinstance(value, np.generic) else value


def _open_hub(spec: str) -> Source:
    import huggingface_hub

    name, _, split = spec.removeprefix("hf:").rpartition(":")
    parts = name.split("/")
    if len(parts) < 2:
        raise ValueError(f"{spec!r}: expected hf:OWNER/NAME[/FOLDER]:SPLIT")
    folder = "/".join(parts[2:])
    patterns = [f"{folder + '/' if folder else ''}*{split}*{suffix}" for suffix in SUFFIXES]
    root = huggingface_hub.snapshot_download(
        "/".join(parts[:2]), repo_type="dataset", allow_patterns=patterns
    )
    base = pathlib.Path(root, folder)
    found = sorted(
        path.relative_to(base).as_posix()
        for path in base.rglob("*")
        if path.name.endswith(SUFFIXES)
    )
    # train.jsonl, train-00000-of-00002.parquet; else a folder named train; else
    # train_something.json
    stem = rf"(.*/)?{re.escape(split)}"
    chosen: list[str] = []
    for rule in (rf"{stem}([-.].*)", rf"{stem}/.*", rf"{stem}_.*"):
        chosen = chosen or [path for path in found if re.fullmatch(rule, path)]
    if not chosen:
        raise ValueError(f"{spec}: no file of split {split!r} among {found[:20]}")
    source = _concatenate(spec, [_open_file(str(base / path)) for path in chosen])
    return dataclasses.replace(source, digest=f"{spec}@{pathlib.Path(root).name}")


SCHEMES: Mapping[str, Callable[[str], Source]] = {
    "tfds": _open_tfds,
    "hf": _open_hub,
    "builtin": _open_builtin,
}
