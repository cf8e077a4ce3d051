# SPDX-License-Identifier: Apache-2.0
"""Real processes: checkpoints written by some and read by others, agreed stops, deaths that end
with a message."""

import re
import time

import processes

WORKER = str(processes.ROOT / "tests/faults/library_worker.py")


def _run(action, workdir, count, log, **options):
    return processes.wait(
        processes.fork(WORKER, [action, str(workdir)], count, log=log), log, **options
    )


def test_a_checkpoint_of_two_processes_is_read_by_four_and_corruption_that_one_sees_sends_all_back(
    tmp_path,
):
    for output in _run("save_and_lose_one", tmp_path / "run", 2, tmp_path / "log"):
        assert "restored 1 2 True" in output and "step 2 is corrupt" in output
    assert (tmp_path / "run/checkpoints/corrupt-2").is_dir()
    for output in _run("restore", tmp_path / "run", 4, tmp_path / "log"):
        assert "restored 2 2 True" in output


def test_hosts_that_changed_places_or_lost_their_storage_get_their_shards_from_those_that_hold_them(
    tmp_path,
):
    outputs = _run("lose_local_storage", tmp_path, 4, tmp_path / "log")
    for output in outputs:
        assert re.findall("^restored.*", output, re.M) == [
            f"restored {step} {step} True" for step in (3, 2, 1)
        ]
    assert "step 3: processes [1] had no sound one; others gave them theirs" in outputs[0]
    assert "step 3 is not used: processes [0, 1] have lost their shards" in outputs[0]


def test_a_workdir_that_is_not_shared_and_a_local_folder_that_is_are_named(tmp_path):
    for output in _run("mistakes", tmp_path, 2, tmp_path / "log"):
        assert "not all processes see the same folder" in output
        assert "is one folder that several hosts share" in output


def test_ctrl_c_in_one_process_makes_all_save_the_same_step_and_exit_0(tmp_path):
    outputs = _run("interrupted", tmp_path, 2, tmp_path / "log")
    steps = [re.search(r"^saved (\d+)$", output, re.M).group(1) for output in outputs]
    assert steps[0] == steps[1] and (tmp_path / "checkpoints" / steps[0]).is_dir()


def test_a_process_that_dies_ends_the_others(tmp_path):
    began = time.monotonic()
    output = _run("killed", tmp_path, 2, tmp_path / "log", expect=None, seconds=60)[0]
    assert "never stopped" not in output and time.monotonic() - began < 60
    assert re.search("died|peer|unavailable|heartbeat", output, re.I)


def test_an_error_on_one_process_is_told_ends_the_others_and_loses_no_save(tmp_path):
    _, second = _run("fails", tmp_path, 2, tmp_path / "log", expect=None, seconds=100)
    assert "ValueError: a row that only this process reads" in second
    assert (tmp_path / "checkpoints/5/_CHECKPOINT_METADATA").exists()
    assert len(list(tmp_path.glob("local/*/*/5/record/metadata"))) == 2
