# SPDX-License-Identifier: Apache-2.0
"""Start several JAX processes on this machine, as the hosts of a pod would be started."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pathlib
import runpy
import signal
import socket
import subprocess
import sys
import time

import compile_cache  # noqa: F401

ROOT = pathlib.Path(__file__).parents[2]
IMPORTED = ["align_jax.runs.loop", "orbax.checkpoint", "transformers.models.auto", __name__]


def environment(
    count: int = 1, index: int = 0, port: int = 0, *, devices: int = 1
) -> dict[str, str]:
    """Make the environment of process ``index`` of ``count``, each with ``devices`` simulated CPU
    devices."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_", "TPU_", "XLA_"))
    }
    clean |= {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        # compiled as the tests are; of the two counts of devices the last one holds
        "XLA_FLAGS": os.environ.get("ALIGN_JAX_TEST_FLAGS", "--xla_backend_optimization_level=0")
        + f" --xla_force_host_platform_device_count={devices}",
        "ALIGN_JAX_WAIT_SECONDS": "120",
        "ALIGN_JAX_HEARTBEAT_SECONDS": "10",
    }
    if count > 1:
        clean |= {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
        }
    return clean


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Forked:
    """``python PROGRAM ARGUMENTS``, forked from a process that has done the imports already: five
    seconds less each.

    It has ``Popen``'s methods.
    """

    def __init__(
        self,
        program: str,
        arguments: list[str],
        environment: dict[str, str],
        log: str,
        folder: pathlib.Path = ROOT,
    ):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        # daemon: whatever a failed test leaves behind ends with it
        self._process = context.Process(
            target=_run, args=(program, arguments, environment, log, folder), daemon=True
        )
        self._process.start()

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status when it has ended."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("forked", timeout)
        return self._process.exitcode

    def kill(self) -> None:
        """Kill it with signal 9."""
        self._process.kill()

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self._process.pid, number)


def _run(
    program: str, arguments: list[str], environment: dict[str, str], log: str, folder: pathlib.Path
) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import jax

    # JAX has read its own variables long ago.
    jax.config.update("jax_compilation_cache_dir", environment["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    sys.argv = [program, *arguments]
    for one in (program, ".".join([program, *arguments[:1]])):
        sys.modules.pop(one, None)  # runpy warns of a program that is there already
    try:
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            sys.path.insert(0, str(folder))  # as python -m does
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except Exception:
        sys.excepthook(*sys.exc_info())  # which may be the package's own, and end this process
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # as at an ordinary end: JAX takes its leave of the other processes


def fork(
    program: str,
    arguments: list[str],
    count: int = 1,
    *,
    devices: int = 1,
    log: pathlib.Path,
    folder: pathlib.Path = ROOT,
) -> list[Forked]:
    """Start ``count`` processes of ``python PROGRAM ARGUMENTS``; process i writes to ``LOG.i``.

    Every compiled program is kept, so that a restart does not compile it again.

    Args:
        program: a module (``python -m``), or the path of a script.
        arguments: after it.
        count: how many.
        devices: simulated devices of each.
        log: where the output goes.
        folder: where it runs.
    """
    port, cache = free_port(), os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
    kept = {"JAX_COMPILATION_CACHE_DIR": cache}
    return [
        Forked(
            program,
            arguments,
            environment(count, index, port, devices=devices) | kept,
            f"{log}.{index}",
            folder,
        )
        for index in range(count)
    ]


def wait(
    started: list[Forked], log: pathlib.Path, *, seconds: float = 120, expect: int | None = 0
) -> list[str]:
    """Wait for all; return what they wrote.

    Raises:
        AssertionError: one took too long, or did not exit with ``expect`` (None: any status).
    """
    end = time.monotonic() + seconds
    try:
        statuses = [process.wait(max(end - time.monotonic(), 0.1)) for process in started]
    except subprocess.TimeoutExpired:
        statuses = None
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
    outputs = [pathlib.Path(f"{log}.{index}").read_text() for index in range(len(started))]
    shown = "\n".join(
        f"--- process {index}\n{output[-3000:]}" for index, output in enumerate(outputs)
    )
    assert statuses is not None, f"still running after {seconds} s\n{shown}"
    assert expect is None or all(status == expect for status in statuses), (
        f"exit statuses {statuses}\n{shown}"
    )
    return outputs
