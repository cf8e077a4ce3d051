# SPDX-License-Identifier: Apache-2.0
"""What is kept on disk is whole, or made anew; two that make it do not disturb each other."""

import concurrent.futures
import errno
import json
import threading
import time

import numpy as np
import pytest

from align_jax.data import cache


def made():
    return cache.Kept({"a": np.arange(1000), "none": np.zeros(0, np.int32)}, {"note": "x"})


def refuse():
    raise AssertionError("it is kept already")


def assert_kept(found):
    np.testing.assert_array_equal(found.arrays["a"], np.arange(1000))
    assert found.arrays["none"].shape == (0,) and found.notes == {"note": "x"}


def rewrite(change):
    """Change the index, its own checksum made right again."""

    def damage(entry):
        index = json.loads((entry / cache.INDEX).read_text())
        change(index)
        del index["digest"]
        index["digest"] = cache._digest(index)
        (entry / cache.INDEX).write_text(json.dumps(index))

    return damage


def flip(name, at):
    def damage(entry):
        data = bytearray((entry / name).read_bytes())
        data[at] ^= 1
        (entry / name).write_bytes(data)

    return damage


DAMAGE = {
    "a flipped bit in the data": flip("a.npy", 500),
    "a flipped bit in the header": flip("a.npy", 60),
    "a digit of the index": lambda entry: (entry / cache.INDEX).write_text(
        (entry / cache.INDEX).read_text().replace('"x"', '"y"')
    ),
    "cut short": lambda entry: (entry / "a.npy").write_bytes((entry / "a.npy").read_bytes()[:-9]),
    "empty": lambda entry: (entry / "a.npy").write_bytes(b""),
    "no index": lambda entry: (entry / cache.INDEX).unlink(),
    "no array": lambda entry: (entry / "a.npy").unlink(),
    "an index of something else": lambda entry: (entry / cache.INDEX).write_text("[1]"),
    "another version": rewrite(lambda index: index.update(version=99)),
    "a foreign file list": rewrite(lambda index: index.update(files=3)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_damaged_is_made_anew_and_said_in_one_line(tmp_path, damage, caplog):
    cache.keep(str(tmp_path), "entry", made)
    assert_kept(cache.keep(str(tmp_path), "entry", refuse))
    for _ in range(2):  # what was set aside is no obstacle
        damage(tmp_path / "entry")
        caplog.clear()
        assert_kept(cache.keep(str(tmp_path), "entry", made))
        (record,) = caplog.records
        assert "made anew" in record.message and f"{tmp_path}/entry" in record.message
        assert_kept(cache.keep(str(tmp_path), "entry", refuse))


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / "entry.part-host-1").mkdir()
    cache.keep(str(tmp_path), "entry", made)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["entry", "entry.lock"]


def test_a_full_disk_costs_the_cache_and_not_the_run(tmp_path, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        assert_kept(cache.keep(str(tmp_path), "entry", made))
    (record,) = caplog.records
    assert "No space left on device" in record.message and "goes on" in record.message
    assert [path.name for path in tmp_path.iterdir()] == ["entry.lock"]


@pytest.mark.parametrize("folder", ["file", "gs://bucket/cache"])
def test_a_folder_that_cannot_be_written_is_told_before_anything_is_made(tmp_path, folder):
    (tmp_path / "file").write_text("")
    folder = folder if "://" in folder else str(tmp_path / folder)
    with pytest.raises(ValueError, match="config.data.cache = "):
        cache.keep(folder, "entry", refuse)


def test_of_several_that_start_at_once_one_makes_it(tmp_path):
    calls, barrier = [], threading.Barrier(4)

    def slowly():
        calls.append(1)
        time.sleep(0.05)
        return made()

    def start(_):
        barrier.wait()
        for name in ("one", "two", "three"):
            assert_kept(cache.keep(str(tmp_path), name, slowly))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(start, range(4)))
    assert len(calls) == 3
