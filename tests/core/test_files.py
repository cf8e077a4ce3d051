# SPDX-License-Identifier: Apache-2.0
"""A file that is not what its name says is refused by name, with what it seems to be."""

import gzip
import io
import resource

import numpy as np
import pytest

from align_jax.core import files, metrics
from align_jax.storage import lock, workdir

JSON = [  # bytes of x.json, what is said of them
    (b"", "x.json: expected a JSON object, got an empty file"),
    (b"\0" * 64, "nothing but zero bytes"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a git-lfs .*git lfs pull"),
    (b"\n<!DOCTYPE html>\n<html>", "an HTML page"),
    (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML document"),
    (b"PK\x03\x04", "a zip archive"),
    (b"[1, 2]", "x.json: expected a JSON object, got a list of 2"),
    (b"64.0", "got 64.0"),
    (b'{"a": 1,\n"b": ', r"x.json:2: malformed JSON: Expecting value .*cut short\?"),
    (b'{"a": 1,\n"b": }', r"x.json:2: malformed JSON: Expecting value \(column 6\)$"),
    (b'{"a": 1, "a": 2}', "x.json: malformed JSON: 'a' is given twice: 1 and 2"),
    ("{}".encode("utf-8-sig"), "plain UTF-8, got UTF-8 with a mark"),
    ("{}".encode("utf-16"), "plain UTF-8, got UTF-16"),
    (b'{"a": "\xe4"}', "x.json:1: not UTF-8 .byte 0xe4"),
    (b'{"a": ' + b"[" * 100_000, "x.json: malformed JSON"),
    (b'{"a": ' + b"9" * 5000 + b"}", "x.json: malformed JSON"),
]


@pytest.mark.parametrize("data, message", JSON, ids=[case[1][:24] for case in JSON])
def test_json_is_one_object_or_refused_by_name(tmp_path, data, message):
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        files.read_json(tmp_path / "x.json")


def test_a_key_may_be_there_twice_with_one_value(tmp_path):
    text = '{"a": "ä", "b": 1, "b": 1}'.encode()
    (tmp_path / "x.json").write_bytes(text)
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(text))
    assert files.read_json(tmp_path / "x.json") == {"a": "ä", "b": 1}
    assert files.read_json(tmp_path / "x.json.gz") == {"a": "ä", "b": 1}


def test_no_byte_of_an_array_file_is_changed_unseen(tmp_path):
    buffer = io.BytesIO()
    arrays = {"a": np.arange(7), "b": np.ones((2, 3), np.float32)}
    np.savez(buffer, **arrays)
    whole, draw, path = buffer.getvalue(), np.random.default_rng(0), tmp_path / "x.npz"
    refused = 0
    for at in [*range(0, len(whole), 37), *draw.integers(0, len(whole), 200)]:
        for data in (whole[:at], whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]):
            path.write_bytes(data)
            try:
                found = files.read_arrays(path)
            except ValueError as error:
                assert str(path) in str(error)
                refused += 1
                continue
            # what is left are the archive's own notes: dates, versions
            for name in arrays.keys() & found.keys():
                np.testing.assert_array_equal(found[name], arrays[name])
    assert refused > 200


def test_what_a_file_looks_like(tmp_path):
    for data, expected in [
        (b"hello\n", "text that begins 'hello"),
        (bytes(range(9)), "data that begin"),
        (b"\x40" + bytes(7) + b'{"a"', "a safetensors file"),
    ]:
        (tmp_path / "x").write_bytes(data)
        assert expected in files.looks_like(tmp_path / "x")
    assert files.looks_like(tmp_path) == "a directory"


def _locked(folder):
    with lock.hold(folder):
        pass


def _append(path):
    rows = metrics.JsonLines(path)
    try:
        rows.append({"said": "x" * 200})
    finally:
        rows.close()


FIRST_WRITES = {  # what a run writes first, in its workdir
    "lock.json": lambda folder: _locked(folder),
    "config.json.partial": lambda folder: workdir.write_record(folder, {}),
    "metrics.jsonl": lambda folder: _append(folder / "metrics.jsonl"),
    "found.json": lambda folder: files.write_text(folder / "found.json", "x" * 200),
}


@pytest.mark.parametrize("name", FIRST_WRITES)
def test_a_write_that_does_not_fit_names_the_file_and_the_room(tmp_path, name):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))
    try:
        with pytest.raises(OSError) as found:
            FIRST_WRITES[name](tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert found.value.filename == str(tmp_path / name)
    assert "File too large (a file may have 16 bytes here: ulimit -f)" in str(found.value)
    with pytest.raises(OSError, match=r"No space left on device \([\d,]+ bytes are free\)"):
        files.write_text("/dev/full", "x")
