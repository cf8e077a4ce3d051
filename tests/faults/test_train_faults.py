# SPDX-License-Identifier: Apache-2.0
"""The whole program on several processes, stopped and killed: the same run comes out."""
import re
import signal
import time

import campaign
import pytest

STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


def _stop_one(folder, name, count, after, *overrides):
    """Start processes, send SIGTERM to the last one after a few steps; return the step that all of them saved."""
    started = campaign.start(folder, name, STEPS, count, *overrides)
    while max(campaign.losses(folder / name), default=0) < after and started[0].poll() is None:
        time.sleep(0.005)
    started[-1].send_signal(signal.SIGTERM)
    campaign.finish(folder, name, started)  # all exit with status 0
    return campaign.newest(folder / name)


def test_a_run_moves_between_process_counts_and_meshes_and_comes_out_the_same(folder):
    campaign.finish(folder, "reference", campaign.start(folder, "reference", STEPS))
    first = _stop_one(folder, "moved", 2, 8, "--config.mesh.data=2", "--config.mesh.fsdp=1")
    assert 8 <= first < STEPS
    second = _stop_one(folder, "moved", 4, first + 5, "--config.mesh.data=1", "--config.mesh.fsdp=4")
    assert first + 5 <= second < STEPS
    output = campaign.finish(folder, "moved", campaign.start(folder, "moved", STEPS))[0]
    assert f"step {second + 1}/{STEPS}" in output and f"step {second}/{STEPS}" not in output
    expected, found = campaign.losses(folder / "reference"), campaign.losses(folder / "moved")
    assert list(expected) == list(found) == list(range(1, STEPS + 1))
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_a_run_killed_at_random_moments_ends_with_the_same_bits(folder):
    tally = campaign.campaign(folder, kills=4, count=1, steps=STEPS, seed=3)
    assert sum(tally.values()) - tally["runs"] == 4


def test_a_process_killed_in_mid_step_ends_its_peer_and_a_restart_resumes(folder):
    campaign.finish(folder, "pair", campaign.start(folder, "pair", STEPS, 2))
    started = campaign.start(folder, "killed", STEPS, 2)
    while campaign.newest(folder / "killed") < 10 and started[0].poll() is None:
        time.sleep(0.005)
    started[1].kill()
    assert started[0].wait(60) != 0
    assert re.search("died|peer|unavailable", (folder / "killed.log.0").read_text(), re.I)
    before = campaign.newest(folder / "killed")
    output = campaign.finish(folder, "killed", campaign.start(folder, "killed", STEPS, 2))[0]
    assert f"step {before + 1}/{STEPS}" in output and f"step {before}/{STEPS}" not in output
    campaign.compare(folder / "pair", folder / "killed")
