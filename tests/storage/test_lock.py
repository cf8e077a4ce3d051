# SPDX-License-Identifier: Apache-2.0
"""Two runs do not write into one workdir."""

import json
import multiprocessing
import os
import signal
import time

import pytest
from etils import epath

from align_jax.storage import lock


def hold_and_tell(folder, pipe):
    with lock.hold(folder):
        pipe.send("held")
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold_and_tell, args=(tmp_path, theirs), daemon=True)
    process.start()
    assert ours.poll(60)
    yield process
    process.kill()
    process.join()


def test_the_second_run_is_told_who_holds_the_folder(tmp_path, holder):
    with pytest.raises(ValueError, match=rf"in use by another run \(host .*, pid {holder.pid}, "):
        with lock.hold(tmp_path):
            pass


def test_a_killed_run_leaves_no_lock_behind(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert json.loads((tmp_path / lock.FILE).read_text())["pid"] == holder.pid
    with lock.hold(tmp_path):
        assert json.loads((tmp_path / lock.FILE).read_text())["pid"] == os.getpid()
    with lock.hold(tmp_path):  # and one that ended neither
        pass


def test_one_process_does_not_hold_a_folder_twice(tmp_path):
    with lock.hold(tmp_path), pytest.raises(ValueError, match=f"pid {os.getpid()}"):
        with lock.hold(f"{tmp_path}/."):
            pass


def test_a_bucket_is_held_by_signs_of_life(tmp_path):
    folder, me = epath.Path(tmp_path), {"host": "a", "pid": 1, "since": "then"}
    with lock._beating(folder, me, 0.05):
        with pytest.raises(ValueError, match="host a, pid 1, since then"):
            with lock._beating(folder, me, 0.05):
                pass
    assert not (tmp_path / lock.FILE).exists()
    (tmp_path / lock.FILE).write_text('{"host": "dead"}')  # of a run that was killed
    with lock._beating(folder, me, 0.05):
        assert "dead" not in (tmp_path / lock.FILE).read_text()
