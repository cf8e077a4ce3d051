# SPDX-License-Identifier: Apache-2.0
"""Data files cut short, with bits flipped, in other encodings: the rows that are in them, or the
file's name."""

import gzip
import json

import hypothesis
import pytest
from hypothesis import strategies as st
from oracle import fuzzed, judge, same

from align_jax.core.options import DataOptions
from align_jax.data import datasets

ROWS = [{"prompt": f"é {i}", "chosen": f"yes {i}\u2028", "rejected": f"no {i}"} for i in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
FORMS = {
    "a.jsonl": (LINES, json.dumps(ROWS, ensure_ascii=False), LINES.replace("\n", "\r\n\n")),
    "a.json": (json.dumps({"data": ROWS}), json.dumps(ROWS, indent=1), json.dumps(ROWS[0])),
}
ENCODINGS = ("utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp037")
STRANGE = (b"[" * 5000, b'{"a":' * 5000, b"9" * 5000, b"\x00", b'{"a": 1, "a": 2}', b"\xff", b"[]")


@st.composite
def files(draw):
    """(name, bytes)."""
    name = draw(st.sampled_from(list(FORMS)))
    text = draw(st.sampled_from(FORMS[name]))
    data = text.encode(draw(st.sampled_from(ENCODINGS)), errors="replace")
    if zipped := draw(st.booleans()):
        data = gzip.compress(data, mtime=0)
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        how = draw(st.sampled_from(("cut", "flip", "insert", "twice")))
        if how == "cut":
            data = data[:at]
        elif how == "flip" and data:
            data = data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
        elif how == "insert":
            data = data[:at] + draw(st.sampled_from(STRANGE)) + data[at:]
        else:
            data = data + data[at:]
    return name + ".gz" * zipped, data


def unlike(found):
    """Refuse a key that stands twice with unlike values."""
    if len(dict(found)) != len(found) and len(set(map(str, found))) != len(dict(found)):
        raise ValueError("a key twice")
    return dict(found)


def rows_of(name, data):
    """The rows that a file says, by another reading than the package's."""
    data = gzip.decompress(data) if name.endswith(".gz") else data
    text = data.decode(json.detect_encoding(data))
    decoder = json.JSONDecoder(object_pairs_hook=unlike)
    found, at = [], 0
    while text[at:].strip():
        at += len(text[at:]) - len(text[at:].lstrip())
        value, at = decoder.raw_decode(text, at)
        found += value if isinstance(value, list) else value.get("data", [value])
    return [(row["prompt"], (row["chosen"], row["rejected"])) for row in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bytes")


@fuzzed(short=60, share=2)
@hypothesis.given(case=files())
def test_a_damaged_file_is_read_whole_or_named(folder, case):
    name, data = case
    path = folder / name
    path.write_bytes(data)

    def act():
        made = datasets.load([str(path)], "pairs", DataOptions(format="pairs"), chat=True)
        return [(one.prompt, one.responses) for one in made.items]

    judge(
        "data files",
        case,
        act,
        names=[name],
        check=lambda found: same(found, rows_of(name, data), "rows"),
    )
