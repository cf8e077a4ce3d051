# SPDX-License-Identifier: Apache-2.0
"""Processes: how they find each other, wait for each other, and stop together.

``start()`` comes before anything else in a program.  It looks at the environment only; the same
command runs on a laptop, on one chip, and on every host of a pod:

    explicit    JAX_COORDINATOR_ADDRESS=host:port  JAX_NUM_PROCESSES=n  JAX_PROCESS_ID=i
    Slurm       srun (SLURM_PROCID and SLURM_NTASKS)
    TPU, GKE    the metadata of the TPU virtual machine; TPU_WORKER_HOSTNAMES and TPU_WORKER_ID;
                MEGASCALE_* for slices
    else        one process
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import re
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_ON_A_TPU = (
    "TPU_WORKER_HOSTNAMES",
    "TPU_PROCESS_ADDRESSES",
    "TPU_ACCELERATOR_TYPE",
    "TPU_NAME",
    "COLAB_TPU_ADDR",
)


class Processes(NamedTuple):
    """What the environment says of the processes; None: left to JAX to find out."""

    how: str  # "explicit", "slurm", "tpu" or "single"
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def detect(environment: Mapping[str, str], tpu: bool) -> Processes:
    """Read from the environment how many processes there are and which this one is.

    Args:
        environment: ``os.environ``.
        tpu: there is a TPU on this machine.

    Raises:
        ValueError: some of the explicit variables are set and not all, or their values make no
            sense.
    """
    given = {name: environment[name] for name in EXPLICIT if environment.get(name)}
    if given:
        missing = [name for name in EXPLICIT if name not in given]
        if missing:
            raise ValueError(
                f"{sorted(given)} are set, {missing} are not: set all three, or none to let JAX "
                "find out"
            )
        address, count, index = (given[name] for name in EXPLICIT)
        if not count.isdigit() or not index.isdigit() or not int(index) < int(count):
            raise ValueError(
                f"expected 0 <= JAX_PROCESS_ID < JAX_NUM_PROCESSES, got {index} and {count}"
            )
        if not address.rpartition(":")[2].isdigit():
            raise ValueError(f"JAX_COORDINATOR_ADDRESS must be host:port, got {address!r}")
        return Processes("explicit", address, int(count), int(index))
    if (
        environment.get("SLURM_PROCID", "").isdigit()
        and int(environment.get("SLURM_NTASKS", "1")) > 1
    ):
        return Processes(
            "slurm", None, int(environment["SLURM_NTASKS"]), int(environment["SLURM_PROCID"])
        )
    hosts = (
        environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    )
    alone = hosts and "," not in hosts and int(environment.get("MEGASCALE_NUM_SLICES") or 1) == 1
    return Processes("tpu" if tpu and not alone else "single")


def tpu_present(environment: Mapping[str, str], root: pathlib.Path = pathlib.Path("/")) -> bool:
    """Tell whether this machine has a TPU: a device file, Google's PCI id on a device that is no
    network card, or the environment that a TPU platform gives its programs.

    Args:
        environment: ``os.environ``.
        root: the file system's root; another one in tests.
    """
    if any(environment.get(name) for name in _ON_A_TPU):
        return True
    if any(root.glob("dev/accel*")) or any(path.name.isdigit() for path in root.glob("dev/vfio/*")):
        return True
    for device in root.glob("sys/bus/pci/devices/*"):
        with contextlib.suppress(OSError):
            google = (device / "vendor").read_text().strip() == "0x1ae0"
            if google and not (device / "class").read_text().startswith("0x02"):
                return True
    return False


def quiet_without_tpu(environment: dict[str, str] | os._Environ[str], tpu: bool) -> None:
    """Keep libtpu asleep on a machine without a TPU: it is there to compile for one, and complains
    loudly of the lack.

    JAX_PLATFORMS, where the user has set it, is left alone; so are machines with another
    accelerator's plugin, where JAX chooses.
    """
    if tpu:
        return
    # no search for a metadata server that is not there
    environment.setdefault("TPU_SKIP_MDS_QUERY", "1")
    plugins = importlib.util.find_spec("jax_plugins")
    if not environment.get("JAX_PLATFORMS") and plugins is None:
        environment["JAX_PLATFORMS"] = "cpu"  # for the processes started from here
        jax.config.update("jax_platforms", "cpu")


def tpu_holders(root: pathlib.Path = pathlib.Path("/")) -> list[str]:
    """Return the processes that hold a TPU chip's device open, beside this one: number and command.

    Those of other users are seen by root alone.

    Args:
        root: the file system's root; another one in tests.
    """
    found = []
    for process in sorted(root.glob("proc/[0-9]*"), key=lambda path: path.name):
        if process.name == str(os.getpid()):
            continue
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            opened = [os.readlink(link) for link in (process / "fd").iterdir()]
            if any(re.fullmatch(r"/dev/(accel\w*|vfio/\d+)", file) for file in opened):
                words = (process / "cmdline").read_bytes().replace(b"\0", b" ")
                found.append(f"process {process.name} ({words.decode(errors='replace').strip()})")
    return found


def check_tpu(
    environment: Mapping[str, str],
    backend: Callable[[], str] = jax.default_backend,
    root: pathlib.Path = pathlib.Path("/"),
) -> None:
    """Refuse to go on by CPU on a machine whose TPU is not to be had; JAX would only warn of it.

    Args:
        environment: ``os.environ``; a JAX_PLATFORMS without tpu in it is the user's own choice.
        backend: starts JAX's devices and returns their kind.
        root: the file system's root; another one in tests.

    Raises:
        SystemExit: who holds the chip, if that is to be seen, and what to do.
    """
    chosen = environment.get("JAX_PLATFORMS", "")
    if chosen and "tpu" not in chosen.split(","):
        return
    said = ""
    try:
        if backend() != "cpu":
            return
    except RuntimeError as error:
        said = f" ({str(error).strip().splitlines()[0]})"
    lock = root / "tmp/libtpu_lockfile"
    if importlib.util.find_spec("libtpu") is None:
        why = "libtpu is not installed: pip install libtpu"
    elif holders := tpu_holders(root):
        why = f"it is held by {', '.join(holders)}: wait for it, or end it"
    elif lock.exists():
        why = f"no process is seen that holds it; if none runs, take away {lock} and try again"
    else:
        why = "no process is seen that holds it; it may be another user's, or broken (sudo dmesg)"
    raise SystemExit(
        f"align_jax: this machine has a TPU, and JAX could not start it{said}: {why}. To run on "
        "its CPU on purpose: JAX_PLATFORMS=cpu"
    )


def start(*, wait_seconds: int | None = None, heartbeat_seconds: int | None = None) -> Processes:
    """Bring this process up, with its peers where there are any.  Call it before any other use of
    JAX; called again it changes nothing.

    Args:
        wait_seconds: how long to wait for the peers; default $ALIGN_JAX_WAIT_SECONDS or 300.
        heartbeat_seconds: a peer silent for so long counts as dead, and all end with a message;
            default $ALIGN_JAX_HEARTBEAT_SECONDS or 100.

    Returns:
        How the processes were found, how many there are and which this one is.

    Raises:
        ValueError: contradictory environment.
        SystemExit: the peers did not appear (the message names the coordinator and this process);
            or as ``check_tpu``.
    """
    tpu = tpu_present(os.environ)
    quiet_without_tpu(os.environ, tpu)
    found = _join(tpu, wait_seconds, heartbeat_seconds)
    if tpu:
        check_tpu(os.environ)
    return found


def _join(tpu: bool, wait_seconds: int | None, heartbeat_seconds: int | None) -> Processes:
    """Join the peers, where there are any."""
    if jax.distributed.is_initialized():
        return Processes("explicit", None, jax.process_count(), jax.process_index())
    found = detect(os.environ, tpu)
    if found.how == "single" or found.num_processes == 1:
        return Processes("single", None, 1, 0)
    wait = wait_seconds or int(os.environ.get("ALIGN_JAX_WAIT_SECONDS", 300))
    heartbeat = heartbeat_seconds or int(os.environ.get("ALIGN_JAX_HEARTBEAT_SECONDS", 100))
    this = "this process"
    if found.num_processes:
        this = f"process {found.process_id} of {found.num_processes}"
    with deadline(
        f"{this} waited {wait} s for its peers at the coordinator "
        f"{found.coordinator or '(found by JAX)'} in vain: are all processes started, with the "
        "same address, and is the port open between the hosts?",
        wait,
    ):
        try:
            # JAX's own time-out aborts without a word of use, so it is set later than ours.
            jax.distributed.initialize(
                found.coordinator,
                found.num_processes,
                found.process_id,
                initialization_timeout=wait + 60,
                heartbeat_timeout_seconds=heartbeat,
            )
        except ValueError:
            if found.how != "tpu" or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
                raise
            return Processes("single", None, 1, 0)  # one TPU host without a pod's metadata (Colab)
    if jax.process_count() > 1:
        sys.excepthook = _leave_at_once
    return Processes(found.how, found.coordinator, jax.process_count(), jax.process_index())


def _leave_at_once(
    kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
) -> None:
    """End on an error: JAX would wait minutes at the exit for peers that wait for this process in a
    step."""
    sys.__excepthook__(kind, error, trace)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # the coordinator notices, and ends the others


def is_main() -> bool:
    """Tell whether this is the process that writes metrics and talks to the user."""
    return jax.process_index() == 0


@contextlib.contextmanager
def deadline(message: str, seconds: float | int) -> Iterator[None]:
    """End the process with a message if the body takes longer: for waits inside which Python gets
    no turn.

    Args:
        message: printed to standard error.
        seconds: of wall-clock time.
    """

    def end() -> None:
        print(f"align_jax: {message}", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread sits in native code: no exception would reach it

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[int], bool]]:
    """Notice SIGTERM (the platform takes the machine back), SIGHUP (the terminal is closed, unless
    nohup has it ignored) and Ctrl-C, and agree on the step to save at.

    One process: the function is true from the first step after the signal.  Several: the notice to
    any of them spreads through JAX's coordinator, and the function is true on all at the same step.
    A second Ctrl-C interrupts at once.

    A scheduler that takes status 0 for "finished" (a Kubernetes Job) would not start a preempted
    run again: with $ALIGN_JAX_STOPPED_STATUS set, a program that was told to stop exits with that
    status instead.

    Yields:
        ``stop(step)``: save at this step and stop?  Every process calls it after every step, with
            the same step.

    Raises:
        SystemExit: at the end of the block, after ``stop`` was true, with $ALIGN_JAX_STOPPED_STATUS
            if that is set.

    >>> with stop_signal() as stop:
    ...     stop(1)
    False
    """
    together = jax.distributed.is_initialized() and jax.process_count() > 1
    notices: list[str] = []

    def take(number: int, _: Any) -> None:
        if notices and number == signal.SIGINT:
            raise KeyboardInterrupt
        notices.append(signal.Signals(number).name)
        # the terminal may be gone, or another line be half written
        with contextlib.suppress(OSError, RuntimeError):
            print(
                f"align_jax: {notices[-1]}: saving after this step, then stopping (Ctrl-C again: "
                "stop at once)",
                file=sys.stderr,
                flush=True,
            )
        if together:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX's notifier tells the other processes

    before = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
        numbers = [signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        if not together:  # JAX's own otherwise
            numbers.append(signal.SIGTERM)
        for number in numbers:
            before[number] = signal.signal(number, take)
    stopped: list[int] = []  # the steps at which the answer was yes

    def stop(step: int) -> bool:
        if multihost_utils.reached_preemption_sync_point(step) if together else notices:
            stopped.append(step)
        return bool(stopped)

    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped and os.environ.get("ALIGN_JAX_STOPPED_STATUS"):
        sys.exit(int(os.environ["ALIGN_JAX_STOPPED_STATUS"]))
