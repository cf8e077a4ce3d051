# SPDX-License-Identifier: Apache-2.0
"""The whole program on several processes, killed, stopped and moved: the same run comes out."""

import re
import shutil
import signal
import time

import kills
import pytest

STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a finished, undisturbed run in it, and its compiled programs."""
    folder = tmp_path_factory.mktemp("faults")
    kills.finish(folder, "reference", kills.start(folder, "reference", STEPS))
    return folder


def _wait_for_step(folder, name, started, step):
    """Wait until a step is logged by these processes."""
    since = time.time()
    while kills.last_step(folder / name, since) < step and started[0].poll() is None:
        time.sleep(0.02)


def test_a_run_is_killed_on_two_processes_stopped_on_four_finished_on_one_and_comes_out_the_same(
    folder,
):
    started = kills.start(folder, "moved", STEPS, 2, "--config.mesh.data=2", "--config.mesh.fsdp=1")
    _wait_for_step(folder, "moved", started, 12)
    while kills.newest(folder / "moved") < 10 and started[0].poll() is None:
        time.sleep(0.02)  # the save of step 10 goes on beside the steps
    started[1].kill()
    assert started[0].wait(60) != 0  # it ends, with a message
    assert re.search("died|peer|unavailable", (folder / "moved.log.0").read_text(), re.I)
    first = kills.newest(folder / "moved")
    assert first >= 10
    # from two processes to one, with no four between
    shutil.copytree(folder / "moved", folder / "direct")

    started = kills.start(folder, "moved", STEPS, 4, "--config.mesh.data=1", "--config.mesh.fsdp=4")
    _wait_for_step(folder, "moved", started, first + 3)
    started[3].send_signal(signal.SIGTERM)
    # all exit with status 0, having saved the same step
    output = kills.finish(folder, "moved", started)[0]
    second = kills.newest(folder / "moved")
    assert first + 3 <= second < STEPS
    assert f"step {first + 1}/{STEPS}" in output and f"step {first}/{STEPS}" not in output

    expected = kills.losses(folder / "reference")
    for name, last in (("moved", second), ("direct", first)):
        output = kills.finish(folder, name, kills.start(folder, name, STEPS))[0]
        assert f"step {last + 1}/{STEPS}" in output and f"step {last}/{STEPS}" not in output
        found = kills.losses(folder / name)
        assert list(expected) == list(found) == list(range(1, STEPS + 1))
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_a_run_killed_at_random_moments_ends_with_the_same_bits(folder):
    tally = kills.campaign(folder, kills=3, steps=STEPS, seed=3)
    assert sum(tally.values()) - tally["runs"] == 3
