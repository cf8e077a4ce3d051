# SPDX-License-Identifier: Apache-2.0
"""Start-up by environment, waits that end with a message, and signals."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from align_jax.parallel import distributed
from align_jax.parallel.distributed import Processes

EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


@pytest.mark.parametrize(
    "environment, tpu, expected",
    [
        ({}, False, Processes("single")),
        ({}, True, Processes("tpu")),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True, Processes("tpu")),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, True, Processes("single")),  # Colab
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True, Processes("tpu")),
        (EXPLICIT, True, Processes("explicit", "h:1", 4, 3)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, False, Processes("slurm", None, 2, 1)),
        # a shell inside sbatch, not srun
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, False, Processes("single")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, False, Processes("single")),
    ],
)
def test_the_environment_says_how_many_processes_there_are(environment, tpu, expected):
    assert distributed.detect(environment, tpu) == expected


@pytest.mark.parametrize(
    "change, message",
    [
        ({"JAX_PROCESS_ID": ""}, r"\['JAX_PROCESS_ID'\] are not"),
        ({"JAX_PROCESS_ID": "4"}, "got 4 and 4"),
        ({"JAX_PROCESS_ID": "-1"}, "got -1 and 4"),
        ({"JAX_COORDINATOR_ADDRESS": "host"}, "host:port, got 'host'"),
    ],
)
def test_a_contradictory_environment_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        distributed.detect(EXPLICIT | change, False)


def _pci(root, vendor, kind):
    device = root / f"sys/bus/pci/devices/{vendor}{kind}"
    device.mkdir(parents=True)
    (device / "vendor").write_text(vendor + "\n")
    (device / "class").write_text(kind + "\n")


def test_a_tpu_is_known_by_its_device_and_a_network_card_is_none(tmp_path):
    assert not distributed.tpu_present({}, tmp_path)
    _pci(tmp_path, "0x1ae0", "0x020000")  # Google's virtual network card
    _pci(tmp_path, "0x10de", "0x030200")
    assert not distributed.tpu_present({}, tmp_path)
    _pci(tmp_path, "0x1ae0", "0x120000")
    assert distributed.tpu_present({}, tmp_path)
    assert distributed.tpu_present({"TPU_WORKER_HOSTNAMES": "a,b"}, tmp_path / "none")
    (tmp_path / "second/dev/vfio").mkdir(parents=True)
    (tmp_path / "second/dev/vfio/vfio").touch()
    assert not distributed.tpu_present({}, tmp_path / "second")
    (tmp_path / "second/dev/vfio/0").touch()
    assert distributed.tpu_present({}, tmp_path / "second")


def _process(root, number, files, command=b"python\0-m\0other\0"):
    folder = root / f"proc/{number}"
    (folder / "fd").mkdir(parents=True)
    (folder / "cmdline").write_bytes(command)
    for place, file in enumerate(files):
        (folder / "fd" / str(place)).symlink_to(file)


def _broken():
    raise RuntimeError("Unable to initialize backend 'tpu': UNAVAILABLE: no chip\nmore")


@pytest.mark.parametrize(
    "opened, backend, words",
    [
        ("/dev/accel0", lambda: "cpu", r"held by process 71 \(python -m other\): wait"),
        ("/dev/vfio/3", lambda: "cpu", r"held by process 71 \(python -m other\): wait"),
        ("/dev/vfio/vfio", lambda: "cpu", "no process is seen .* broken"),
        ("/dev/null", _broken, r"start it \(Unable to initialize.*no chip\): no process"),
        ("/tmp/libtpu_lockfile", lambda: "cpu", "take away .*/tmp/libtpu_lockfile"),
    ],
)
def test_a_tpu_that_is_not_to_be_had_is_no_reason_for_the_cpu(tmp_path, opened, backend, words):
    _process(tmp_path, 7, ["/dev/null", "/dev/accelerometer/x"])
    _process(tmp_path, 71, ["/dev/null", opened])
    _process(tmp_path, os.getpid(), ["/dev/accel0"])
    if "lockfile" in opened:
        (tmp_path / "tmp").mkdir()
        (tmp_path / "tmp/libtpu_lockfile").touch()
    with pytest.raises(SystemExit, match=words) as error:
        distributed.check_tpu({}, backend, tmp_path)
    assert "JAX_PLATFORMS=cpu" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(SystemExit):
        distributed.check_tpu({"JAX_PLATFORMS": "tpu,cpu"}, backend, tmp_path)
    distributed.check_tpu({"JAX_PLATFORMS": "cpu"}, backend, tmp_path)
    distributed.check_tpu({}, lambda: "tpu", tmp_path)


def test_the_users_platform_is_left_alone():
    environment = {"JAX_PLATFORMS": "cuda"}
    distributed.quiet_without_tpu(environment, tpu=False)
    assert environment["JAX_PLATFORMS"] == "cuda"
    environment = {}
    distributed.quiet_without_tpu(environment, tpu=True)
    assert environment == {}


def _run(code, timeout=60, **environment):
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_", "TPU_", "XLA_"))
    }
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=clean | environment,
        timeout=timeout,
        capture_output=True,
        text=True,
    )


def test_a_machine_without_a_tpu_runs_on_the_cpu_without_a_word():
    if distributed.tpu_present(os.environ):
        pytest.skip("there is a TPU here")
    result = _run("""
        from align_jax.parallel import distributed
        distributed.start()
        import jax
        print(jax.default_backend())
    """)
    assert (result.stdout, result.stderr) == ("cpu\n", "")


def test_peers_that_never_come_end_the_wait_with_a_message():
    began = time.monotonic()
    result = _run(
        """
        from align_jax.parallel import distributed
        distributed.start(wait_seconds=2)
    """,
        JAX_COORDINATOR_ADDRESS="localhost:1",
        JAX_NUM_PROCESSES="2",
        JAX_PROCESS_ID="1",
        JAX_PLATFORMS="cpu",
    )
    assert result.returncode == 1 and time.monotonic() - began < 30
    assert "process 1 of 2 waited 2 s for its peers at the coordinator localhost:1" in result.stderr


@pytest.fixture
def hangup():
    """SIGHUP as it is in a terminal, whatever started the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_is_noticed_once_and_the_old_handler_comes_back(number, hangup):
    before = signal.getsignal(number)
    with distributed.stop_signal() as stop:
        assert not stop(1)
        os.kill(os.getpid(), number)
        assert stop(2)
    assert signal.getsignal(number) is before


def test_a_closed_terminal_stops_no_run_under_nohup_and_no_word_of_it_fails(monkeypatch, hangup):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys.stderr, "write", fail)
    with distributed.stop_signal() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop(1)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with distributed.stop_signal() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop(1)


def test_a_scheduler_can_tell_a_stopped_run_from_a_finished_one(monkeypatch):
    monkeypatch.setenv("ALIGN_JAX_STOPPED_STATUS", "75")
    with distributed.stop_signal() as stop:
        assert not stop(1)
    with pytest.raises(SystemExit) as status, distributed.stop_signal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop(2)
    assert status.value.code == 75


def test_a_second_interrupt_stops_at_once():
    with distributed.stop_signal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop(1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_a_deadline_that_is_kept_does_nothing():
    with distributed.deadline("late", 0.2):
        pass
    time.sleep(0.3)
