# SPDX-License-Identifier: Apache-2.0
"""Two hosts with a replica each, killed between persistent saves: nothing is lost that one of them
still holds."""

import shutil
import time

import kills

STEPS, EVERY, LOCAL_EVERY = 48, 30, 4


def _start(folder, name):
    return kills.start(
        folder,
        name,
        STEPS,
        2,
        "--config.mesh.data=2",
        "--config.mesh.fsdp=1",
        f"--config.checkpoint.every_steps={EVERY}",
        f"--config.checkpoint.local={folder / 'local'}",
        f"--config.checkpoint.local_every_steps={LOCAL_EVERY}",
    )


def _hosts(folder, name):
    return sorted(folder.glob(f"local/{name}-*/*"))


def _newest(host):
    return max((int(path.name) for path in host.glob("*") if path.name.isdigit()), default=0)


def _kill_after(folder, name, started, step):
    """Wait until both hosts hold a step, then kill the processes with signal 9; return the newest
    that both hold."""
    end = time.monotonic() + 240
    while len(hosts := _hosts(folder, name)) < 2 or min(map(_newest, hosts)) < step:
        assert all(process.poll() is None for process in started) and time.monotonic() < end
        time.sleep(0.005)
    for process in started:
        process.kill()
    for process in started:
        process.wait(60)
    return min(map(_newest, hosts))


def _resumed_after(folder, name, step):
    """Tell whether the last start of a run went on after this step; return what it wrote too."""
    output = (folder / f"{name}.log.0").read_text()
    return f"step {step + 1}/{STEPS}" in output and f"step {step}/{STEPS}" not in output, output


def _flip_a_bit(step):
    largest = max(step.glob("state/**/d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 3] ^= 4
    largest.write_bytes(bytes(data))


def test_a_run_killed_between_persistent_saves_goes_on_from_the_hosts_own_storage_to_the_same_bits(
    tmp_path,
):
    kills.finish(tmp_path, "reference", _start(tmp_path, "reference"))
    first_kill = _kill_after(tmp_path, "victim", _start(tmp_path, "victim"), LOCAL_EVERY)
    assert kills.newest(tmp_path / "victim") == 0

    second_kill = _kill_after(
        tmp_path, "victim", _start(tmp_path, "victim"), first_kill + 2 * LOCAL_EVERY
    )
    # lost are only the steps since the local save
    assert _resumed_after(tmp_path, "victim", first_kill)[0]

    first, second = _hosts(tmp_path, "victim")
    # one host lost its storage, and the newest that the other holds is damaged
    shutil.rmtree(second)
    for step in range(second_kill, _newest(first) + 1, LOCAL_EVERY):
        _flip_a_bit(first / str(step))
    _kill_after(tmp_path, "victim", _start(tmp_path, "victim"), max(EVERY + 2, second_kill))
    resumed, output = _resumed_after(tmp_path, "victim", second_kill - LOCAL_EVERY)
    assert (
        resumed
        and f"local checkpoint of step {second_kill} in {first} on process 0 is not used" in output
    )
    assert (
        f"step {second_kill - LOCAL_EVERY}: processes [1] had no sound one; others gave them theirs"
        in output
    )

    shutil.rmtree(first)  # all is lost on the hosts: the persistent one is there
    shutil.rmtree(second)
    assert kills.newest(tmp_path / "victim") == EVERY
    kills.finish(tmp_path, "victim", _start(tmp_path, "victim"))
    assert _resumed_after(tmp_path, "victim", EVERY)[0]
    kills.compare(tmp_path / "reference", tmp_path / "victim")
