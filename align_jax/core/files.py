# SPDX-License-Identifier: Apache-2.0
"""Files: what a user hands in is read whole, or refused by name with what it seems to be instead;
a write that fails names the file and the room that is left.

A download that failed leaves a file of the right name: a git-lfs pointer, a login page, the first
half. What a library says of those ("invalid UTF-8", "EOF") names neither file nor remedy.
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import errno
import gzip
import json
import math
import os
import pathlib
import resource
import shutil
import stat
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

SAFETENSORS = "a safetensors file"
# how a file begins -> what it is
SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself (run: git lfs pull)"),
    (b"<!doctype html", "an HTML page (a login or an error page, saved by a download?)"),
    (b"<html", "an HTML page (a login or an error page, saved by a download?)"),
    (b"<?xml", "an XML document (a store's error message, saved by a download?)"),
    (b"<<<<<<< ", "a file with git's conflict marks"),
    (b"\x1f\x8b", "gzip data (unpack it, or give it a name that ends in .gz)"),
    (b"\xfd7zXZ", "xz data (unpack it, or give it a name that ends in .xz)"),
    (b"BZh", "bzip2 data (unpack it, or give it a name that ends in .bz2)"),
    (b"PK\x03\x04", "a zip archive (as torch.save and numpy.savez write)"),
    (b"\x80\x02", "a Python pickle (as torch.save writes)"),
    (b"\x80\x04", "a Python pickle"),
    (b"\x28\xb5\x2f\xfd", "zstd data"),
    (b"GGUF", "a GGUF file (llama.cpp's)"),
    (b"PAR1", "a Parquet file"),
    (b"\x93NUMPY", "a numpy array"),
    (b"\x89HDF", "an HDF5 file"),
    (b"%PDF", "a PDF document"),
)
MARKS = ((b"\xef\xbb\xbf", "UTF-8 with a mark"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))


def signature(start: bytes) -> str:
    """Return what data seem to be that cannot be what was wanted; "" where nothing is known.

    Args:
        start: the first bytes, 512 or so.

    >>> signature(b"version https://git-lfs.github.com/spec/v1")
    'a git-lfs pointer, not the file itself (run: git lfs pull)'
    """
    if not start:
        return "an empty file"
    if not start.strip(b"\x00"):
        return "nothing but zero bytes (a copy that was broken off?)"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for mark, kind in SIGNATURES:
        if start.startswith(mark) or text.startswith(mark):
            return kind
    if len(start) > 9 and start[8:10] == b'{"' and start[3:8] == bytes(5):
        return SAFETENSORS
    return ""


def looks_like(path: epath.PathLike) -> str:
    """Return what a file seems to be, for a message: "an empty file", "text that begins 'x'"."""
    file = epath.Path(path)
    if file.is_dir():
        return "a directory"
    with file.open("rb") as opened:
        start = opened.read(512)
    if kind := signature(start):
        return kind
    head = start[:40]
    if all(byte >= 32 or byte in b"\t\r\n" for byte in start):
        return f"text that begins {head.decode(errors='replace')!r}"
    return f"data that begin {head[:16]!r}"


SPECIAL = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def check_is_file(path: epath.PathLike) -> None:
    """Refuse what can be opened and never ends, or waits forever.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: a pipe, a socket, a device or a directory.
    """
    if "://" in str(path):
        return
    mode = os.stat(path).st_mode
    for is_kind, kind in SPECIAL:
        if is_kind(mode):
            raise ValueError(f"{path}: is {kind}, not a file")


def read_bytes(path: epath.PathLike) -> bytes:
    """Read a file, unpacked if its name has an ending of ``PACKED``.

    Raises:
        ValueError: not a file, or not a whole packed one.
    """
    check_is_file(path)
    data = epath.Path(path).read_bytes()
    ending = os.path.splitext(str(path))[1]
    if ending not in PACKED:
        return data
    kind, unpack = PACKED[ending]
    try:
        return unpack(data)
    except MemoryError:
        raise
    # each library has errors of its own
    except Exception as error:
        cut = isinstance(error, EOFError)
        fault = "it ends too early, as a copy that was broken off" if cut else str(error)
        looks = "" if signature(data[:512]).startswith(kind) else f"; it is {looks_like(path)}"
        raise ValueError(f"{path}: not a whole {kind} file: {fault}{looks}") from error


def _unpack_bz2(data: bytes) -> bytes:
    import bz2

    return _unpack_streams(data, bz2.BZ2Decompressor)


def _unpack_xz(data: bytes) -> bytes:
    import lzma

    return _unpack_streams(data, lzma.LZMADecompressor)


def _unpack_streams(data: bytes, start: Callable[[], Any]) -> bytes:
    """Unpack one stream after the other: a whole library's reader drops what follows the first
    and is damaged.

    Raises:
        EOFError: the last one does not end.
    """
    parts, stream, begun, step = [], start(), False, 1 << 20
    for place in range(0, len(data), step):
        block = data[place : place + step]
        while block := block if begun else block.lstrip(b"\x00"):  # padding between streams
            parts.append(stream.decompress(block))
            block, begun = stream.unused_data, not stream.eof
            if stream.eof:
                stream = start()
    if begun or not parts:
        raise EOFError
    return b"".join(parts)


# how a file's name ends -> what it is packed by, and what unpacks it
PACKED: Mapping[str, tuple[str, Callable[[bytes], bytes]]] = {
    ".gz": ("gzip", gzip.decompress),
    ".bz2": ("bzip2", _unpack_bz2),
    ".xz": ("xz", _unpack_xz),
}


def read_text(path: epath.PathLike) -> str:
    """Read a UTF-8 text, gzipped or not.

    Raises:
        ValueError: it is another kind of file, or in another encoding.
    """
    return _decoded(path, read_bytes(path), "a text")


def _decoded(path: epath.PathLike, data: bytes, expected: str) -> str:
    if data and (kind := signature(data[:512])):
        raise ValueError(f"{path}: expected {expected}, got {kind}")
    for mark, encoding in MARKS:
        if data.startswith(mark):
            raise ValueError(
                f"{path}: expected {expected} in plain UTF-8, got {encoding} (other libraries stop "
                f"at its mark: iconv -f {encoding.split()[0]} -t utf-8, without the mark)"
            )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line}: not UTF-8 (byte {data[error.start]:#x}): expected {expected}"
        ) from error


def read_json(path: epath.PathLike) -> dict[str, Any]:
    """Read a JSON file that holds one object, gzipped or not.

    Raises:
        ValueError: anything else, with the line and what the file seems to be; a key that is given
            twice with unlike values.
    """
    text = _decoded(path, read_bytes(path), "a JSON object")
    if not text.strip():
        raise ValueError(f"{path}: expected a JSON object, got an empty file")
    try:
        value = json.loads(text, object_pairs_hook=no_key_twice)
    except json.JSONDecodeError as error:
        cut = " (the file ends there: cut short?)" if not error.doc[error.pos :].strip() else ""
        raise ValueError(
            f"{path}:{error.lineno}: malformed JSON: {error.msg} (column {error.colno}){cut}"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; deep nesting
        raise ValueError(f"{path}: malformed JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {json_kind(value)}")
    return value


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[None]:
    """Name the file that does not fit, which the system's error does not, and the room left.

    Raises:
        OSError: as the write did.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise OSError(error.errno, f"{error.strerror}{_room(path)}", str(path)) from error


def write_text(path: epath.PathLike, text: str) -> None:
    """Write a text file.

    Raises:
        OSError: as ``writing``.
    """
    with writing(path):
        epath.Path(path).write_text(text)


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _room(path: epath.PathLike) -> str:
    """Say how much can still be written where a file lies; "" where nobody can tell."""
    if (limit := most_bytes()) < math.inf:
        return f" (a file may have {limit:,} bytes here: ulimit -f)"
    if "://" in str(path):
        return ""
    above = (one for one in pathlib.Path(path).absolute().parents if one.exists())
    return f" ({shutil.disk_usage(next(above)).free:,} bytes are free)"


def most_bytes() -> float | int:
    """Return how many bytes a file may have here (``ulimit -f``), however much room there is."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return math.inf if limit == resource.RLIM_INFINITY else limit


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object of its pairs; a ValueError where a key has two values."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(f"{key!r} is given twice: {found[key]!r:.40} and {value!r:.40}")
        found[key] = value
    return found


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Write a value as JSON that every file can hold and nothing of it is lost in.

    Half of a pair of surrogates, which is no character, is escaped; what the files of rows have and
    JSON has no kind for becomes its text (dates, times, decimals, bytes) or a list (arrays).

    Raises:
        TypeError: a value of another kind.

    >>> print(json_text({"said": "é\\ud83d"}))
    {"said": "é\\ud83d"}
    """
    return escaped(json.dumps(value, ensure_ascii=False, indent=indent, default=_plain))


_TEXTS = (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, uuid.UUID, bytes)


def _plain(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, _TEXTS):
        return str(value)
    raise TypeError(f"expected what JSON can hold, got {type(value).__name__}: {value!r:.60}")


def escaped(text: str) -> str:
    """Return a text in which half characters are written out, so that it can be encoded."""
    return text.encode(errors="backslashreplace").decode()


def json_kind(value: Any) -> str:
    """Return a JSON value as a message names it: short, in JSON's words."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_arrays(path: epath.PathLike) -> dict[str, np.ndarray]:
    """Read all arrays of an .npz file.

    Raises:
        ValueError: the file is cut short, damaged, or another kind of file.
    """
    found = {}
    try:
        with epath.Path(path).open("rb") as opened, zipfile.ZipFile(opened) as archive:
            for name in archive.namelist():
                with archive.open(name) as file:
                    found[name.removesuffix(".npy")] = np.lib.format.read_array(file)
                    # at a member's end its checksum is compared; a damaged header may tell of less
                    if file.read(1):
                        raise ValueError(f"{name} is longer than it says")
    # each part of the format has its own errors, a damaged field of flags some more
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(
            f"{path}: not a whole .npz file: {error or type(error).__name__}; it is "
            f"{looks_like(path)}"
        ) from error
    return found
