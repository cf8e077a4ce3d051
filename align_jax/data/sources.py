# SPDX-License-Identifier: Apache-2.0
"""Where rows come from: files, TFDS, the Hugging Face hub, code; all read as random-access rows
that know their place.

    path, glob, gs://...      .json .jsonl .csv .tsv (each also .gz .bz2 .xz) .parquet .arrow
                              .feather
    tfds:name:split           a TFDS builder prepared with file_format="array_record", or its
                              directory
    hf:owner/name[/folder]:split   a data set repository's own JSON or Parquet files
    builtin:name:split[?seed=0&size=512]   made by code (data/synthetic.py)

Rows from Python (``data.given``) are a source, too: ``rows:NAME@FINGERPRINT`` in a run's config.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
import glob
import itertools
import os
import pathlib
import re
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from align_jax.core import files
from align_jax.core.choose import nearest
from align_jax.data import synthetic
from align_jax.data.messages import Row
from align_jax.data.row_files import SUFFIXES, Rows, find_kind, numbered, open_file

MOST_FILES = 10_000  # of one source


@dataclasses.dataclass(frozen=True)
class Source:
    """Rows by number, opened when the first is asked for.

    Attributes:
        spec: what the user wrote.
        digest: changes when the data does (path, size and time of change; or name and version):
            part of cache keys.
        open: opens it.
    """

    spec: str
    digest: str
    open: Callable[[], Rows]

    @functools.cached_property
    def rows(self) -> Rows:
        """The opened rows.

        Raises:
            ValueError: a damaged file, or no rows.
        """
        rows = self.open()
        if not rows.size:
            raise ValueError(f"{self.spec}: no rows")
        return rows

    def __len__(self) -> int:
        return self.rows.size

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.spec}: row {index} of {len(self)}")
        return self.rows.read(index)

    def where(self, index: int) -> str:
        """Return a row's place: ``file:line`` or ``name[index]``."""
        return self.rows.where(index)


def find_source(spec: str) -> Source:
    """Find a data source, without reading it.

    Args:
        spec: a path, a glob, ``tfds:name:split``, ``hf:owner/name:split`` or
            ``builtin:name:split``.

    Returns:
        The source; several files are one source, in the order of their names.

    Raises:
        FileNotFoundError: no such file, or a glob that matches nothing; the nearest names are
            given.
        ValueError: a malformed spec, an unknown kind of file, or no file (a folder, a pipe).
    """
    scheme = spec.split(":", 1)[0]
    if scheme in SCHEMES:
        return SCHEMES[scheme](spec)
    return _concatenate(spec, [_find_file(path) for path in _expand(spec)])


def open_source(spec: str) -> Source:
    """Open a data source as random-access rows.

    Args:
        spec: as in ``find_source``.

    Raises:
        FileNotFoundError, ValueError: as ``find_source``; malformed JSON or CSV (with file and
            line), a damaged file, or no rows.
    """
    source = find_source(spec)
    _ = source.rows
    return source


def _find_file(path: str) -> Source:
    files.check_is_file(path)
    find_kind(path)
    _check_saved(path)
    digest = _digest(path)

    def open_unchanged() -> Rows:
        rows = open_file(path)
        if _digest(path) != digest:
            raise ValueError(f"{path}: it changed while it was read; wait until it is whole")
        return rows

    return Source(path, digest, open_unchanged)


SAVED = "state.json"  # beside the files of Dataset.save_to_disk, which it names


def _check_saved(path: str) -> None:
    """Refuse a file beside a saved data set that is none of its own: a cache of its rows, changed.

    Raises:
        ValueError: with its own.
    """
    folder, name = os.path.split(path)
    own = _saved_in(folder) if name.endswith(".arrow") else []
    if own and name not in own:
        raise ValueError(
            f"{path}: no file of the data set saved there, as {SAVED} tells: give "
            f"{os.path.join(folder, _pattern(own[0]))}"
        )


@functools.lru_cache(maxsize=64)
def _saved_in(folder: str) -> list[str]:
    """Return the files of the data set that is saved in a folder; [] where none is."""
    state = os.path.join(folder, SAVED)
    if "://" in folder or not os.path.exists(state):
        return []
    return [str(one.get("filename")) for one in files.read_json(state).get("_data_files") or ()]


def _pattern(name: str) -> str:
    """Return the pattern of a shard and its likes, or of all files of a kind.

    >>> _pattern("train-00000-of-00002.parquet"), _pattern("a.jsonl.gz")
    ('train-*.parquet', '*.jsonl.gz')
    """
    kind = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
    shards = re.sub(r"\d+-of-\d+", "*", name)
    return shards if shards != name else f"*{kind}"


def _digest(path: str) -> str:
    if "://" in path:
        stat = epath.Path(path).stat()
        return f"{path}:{stat.length}:{stat.mtime}"
    here = os.stat(path)
    return f"{path}:{here.st_size}:{here.st_mtime_ns}"


def _expand(spec: str) -> list[str]:
    """Return the paths that a path or glob names.

    Raises:
        FileNotFoundError: none; with the nearest name.
        ValueError: a folder, an empty name, or too many files.
    """
    if not spec.strip():
        raise ValueError("an empty name among the data sources: is there a comma too many?")
    path = epath.Path(spec)
    if any(character in spec for character in "*?[") and not path.exists():
        paths = sorted(itertools.islice(_matching(spec), MOST_FILES + 1))
        if len(paths) > MOST_FILES:
            raise ValueError(
                f"{spec!r} matches more than {MOST_FILES:,} files; join them into fewer (cat "
                "a/*.jsonl > a.jsonl), or give a narrower pattern"
            )
        if not paths:
            raise FileNotFoundError(f"no file matches {spec!r}{_nearest(spec)}")
        return paths
    if path.is_dir():
        raise ValueError(f"{spec!r} is a directory: {_files_in(spec.rstrip('/'))}")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {spec!r}{_nearest(spec)}")
    return [spec]


def _files_in(folder: str) -> str:
    """Say by which patterns a folder's data files are named."""
    if "://" in folder:
        return f"name its files, for example {folder}/*.jsonl"
    found: collections.Counter[str] = collections.Counter()
    everything = glob.iglob(f"{glob.escape(folder)}/**", recursive=True)
    for path in itertools.islice(everything, MOST_FILES):
        above, name = os.path.split(path)
        own = _saved_in(above) or [name]
        if name.endswith(tuple(SUFFIXES)) and name in own and name != "dataset_dict.json":
            found[os.path.join(above, _pattern(name))] += 1
    if not found:
        return f"no file of a known kind is in it; known: {', '.join(SUFFIXES)}"
    counted = [f"{name} ({count})" for name, count in sorted(found.items())]
    more = f", and {len(counted) - 8} more" if len(counted) > 8 else ""
    return f"name its files: {', '.join(counted[:8])}{more}"


def _matching(spec: str) -> Iterator[str]:
    if "://" not in spec:
        return glob.iglob(spec, recursive=True)
    folder, _, pattern = spec.rpartition("/")
    return map(str, epath.Path(folder).glob(pattern))


def _nearest(spec: str) -> str:
    """Say which data file is nearest to one that is not there."""
    folder = os.path.dirname(spec.partition("*")[0]) or "."
    if "://" in spec or not os.path.isdir(folder):
        return ""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in itertools.islice(entries, MOST_FILES)]
    beside = os.path.dirname(spec.partition("*")[0])
    known = [os.path.join(beside, one) for one in sorted(names) if one.endswith(tuple(SUFFIXES))]
    return nearest(spec, known[:100]) if known else ""


def _concatenate(spec: str, parts: Sequence[Source]) -> Source:
    if len(parts) == 1:
        return dataclasses.replace(parts[0], spec=spec)

    def open_all() -> Rows:
        opened = [part.open() for part in parts]
        ends = np.cumsum([rows.size for rows in opened]).tolist()

        def locate(index: int) -> tuple[Rows, int]:
            part = bisect.bisect_right(ends, index)
            return opened[part], index - (ends[part - 1] if part else 0)

        def read(index: int) -> Row:
            rows, offset = locate(index)
            return rows.read(offset)

        def where(index: int) -> str:
            rows, offset = locate(index)
            return rows.where(offset)

        return Rows(ends[-1], read, where)

    return Source(spec, "|".join(part.digest for part in parts), open_all)


def _open_builtin(spec: str) -> Source:
    head, _, query = spec.partition("?")
    fields = head.split(":")
    options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    unknown = sorted(set(options) - {"seed", "size"})
    if unknown or not 1 < len(fields) < 4:
        raise ValueError(
            f"{spec!r}: expected builtin:NAME:SPLIT?seed=0&size=512, got options {unknown}"
        )
    name, split = fields[1], fields[2] if len(fields) == 3 else "train"
    numbers = {}
    for key, value in options.items():
        if not re.fullmatch(r"[0-9]{1,18}", value):
            raise ValueError(f"{spec!r}: {key} = {value!r}: expected a whole number, 0 or above")
        numbers[key] = int(value)
    made = synthetic.make(name, split, **numbers)
    rows = Rows(made.size, made.row, numbered(head))
    return Source(spec, f"{spec}@{synthetic.VERSION}", lambda: rows)


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
        return plain(rows[index])

    opened = Rows(len(rows), read, numbered(spec))
    return Source(spec, f"{builder.data_dir}:{split}", lambda: opened)


def plain(value: Any) -> Any:
    """Turn numpy arrays and scalars, bytes and tuples into plain Python values, as files have."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray):
        return [plain(entry) for entry in value.tolist()] if value.ndim else plain(value.item())
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
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
        if path.name.endswith(tuple(SUFFIXES))
    )
    # train.jsonl, train-00000-of-00002.parquet; else a folder named train; else
    # train_something.json
    stem = rf"(.*/)?{re.escape(split)}"
    chosen: list[str] = []
    for rule in (rf"{stem}([-.].*)", rf"{stem}/.*", rf"{stem}_.*"):
        chosen = chosen or [path for path in found if re.fullmatch(rule, path)]
    if not chosen:
        raise ValueError(f"{spec}: no file of split {split!r} among {found[:20]}")
    source = _concatenate(spec, [_find_file(str(base / path)) for path in chosen])
    return dataclasses.replace(source, digest=f"{spec}@{pathlib.Path(root).name}")


def _rows_of_python(spec: str) -> Source:
    raise ValueError(
        f"{spec!r} are rows that align_jax.train was given in Python: give them to it again"
    )


SCHEMES: Mapping[str, Callable[[str], Source]] = {
    "tfds": _open_tfds,
    "hf": _open_hub,
    "builtin": _open_builtin,
    "rows": _rows_of_python,
}
