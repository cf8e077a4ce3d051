# SPDX-License-Identifier: Apache-2.0
"""One process of the tests of checkpoints and signals: ``library_worker.py ACTION WORKDIR``."""

import logging
import os
import pathlib
import shutil
import signal
import socket
import sys
import time

from align_jax.parallel import distributed

distributed.start()

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from align_jax.core.options import CheckpointOptions
from align_jax.parallel.mesh import make_mesh
from align_jax.storage import checkpoint
from align_jax.storage.checkpoint import Checkpoints

OPTIONS = CheckpointOptions(every_steps=0)


def _sharding():
    return jax.sharding.NamedSharding(make_mesh({"fsdp": -1}), jax.sharding.PartitionSpec("fsdp"))


def _state(step):
    values = np.arange(32, dtype=np.float32).reshape(16, 2) + 100 * step
    everywhere = jax.sharding.NamedSharding(_sharding().mesh, jax.sharding.PartitionSpec())
    return {
        "params": {
            "kernel": jax.make_array_from_callback(
                (16, 2), _sharding(), lambda index: values[index]
            )
        },
        "step": jax.make_array_from_callback((), everywhere, lambda index: np.int32(step)),
    }


def _abstract():
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _state(0)
    )


def save(workdir):
    """Save two steps."""
    with Checkpoints(workdir, OPTIONS) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, _state(step), {"from": jax.process_count()})


def restore(workdir):
    """Restore the newest; print its step, who wrote it and whether every value is right."""
    with Checkpoints(workdir, OPTIONS, backoff_seconds=0.0) as checkpoints:
        restored = checkpoints.restore(_abstract())
        kernels = [state["params"]["kernel"] for state in (restored.state, _state(restored.step))]
        same = jax.jit(lambda x, y: jnp.all(x == y))(*kernels)
        print("restored", restored.step, restored.extra["from"], bool(same))


def save_and_lose_one(workdir):
    """Save two steps, restore with the last process alone finding the newest unreadable, and save
    it anew."""
    save(workdir)
    read = checkpoint._read_here

    def fail(path, abstract_state):
        if path.name == "2" and jax.process_index() == jax.process_count() - 1:
            raise ValueError("DATA_LOSS: seen by one")
        return read(path, abstract_state)

    checkpoint._read_here = fail
    restore(workdir)
    with Checkpoints(workdir, OPTIONS) as checkpoints:
        checkpoints.save(2, _state(2), {"from": jax.process_count()})


def _replicated(step):
    mesh = make_mesh({"data": 2, "fsdp": -1})
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _state(step))
    values = {
        "params": {"kernel": np.arange(32, dtype=np.float32).reshape(16, 2) * -step},
        "step": np.int32(step),
    }
    return jax.tree.map(
        lambda x, value: jax.make_array_from_callback(
            x.shape,
            jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*("fsdp",)[: x.ndim])),
            lambda index: value[index],
        ),
        state,
        values,
    )


def _local(workdir):
    options = CheckpointOptions(every_steps=0, local=f"{workdir}/local", local_every_steps=1)
    return Checkpoints(workdir, options)


def _restore_locally(workdir):
    state = _replicated(0)
    with jax.set_mesh(state["step"].sharding.mesh), _local(workdir) as checkpoints:
        restored = checkpoints.restore(
            jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
            )
        )
        same = jax.jit(lambda x, y: jnp.all(x == y))(
            restored.state["params"]["kernel"], _replicated(restored.step)["params"]["kernel"]
        )
        print("restored", restored.step, restored.extra["count"], bool(same))


def _meanwhile(action):
    """Let the first process do something while the others wait."""
    multihost_utils.sync_global_devices("before")
    if jax.process_index() == 0:
        action()
    multihost_utils.sync_global_devices("after")


def lose_local_storage(workdir):
    """Save on four hosts, each one half of one replica; restore after hosts changed places and lost
    their storage."""
    with _local(workdir) as checkpoints:
        checkpoints.save(1, _replicated(1), {"count": 1})
        for step in (2, 3):
            checkpoints.save(step, _replicated(step), {"count": step}, tier="local")
    (local,) = pathlib.Path(workdir, "local").iterdir()

    def change_places():
        (local / "0").rename(local / "moved")  # 0 held a first half, 3 a second one
        (local / "3").rename(local / "0")
        (local / "moved").rename(local / "3")
        shutil.rmtree(local / "1")  # the other second half

    _meanwhile(change_places)
    _restore_locally(workdir)
    _meanwhile(lambda: shutil.rmtree(local / "0" / "3"))  # the last second half of step 3
    _restore_locally(workdir)
    _meanwhile(lambda: shutil.rmtree(local / "0"))
    _restore_locally(workdir)


def mistakes(workdir):
    """Open a workdir that is another folder for each process, and a local one that is not."""
    try:
        Checkpoints(f"{workdir}/{jax.process_index()}", OPTIONS)
    except ValueError as error:
        print(error)
    socket.gethostname = lambda: f"host{jax.process_index()}"
    try:
        _local(workdir)
    except ValueError as error:
        print(error)


def _loop(workdir, stop):
    add = jax.jit(lambda x: (x + 1.0, jnp.sum(x)))
    with distributed.stop_signal() as stopping, Checkpoints(workdir, OPTIONS) as checkpoints:
        state = _state(0)
        for step in range(1, 10_000):
            state["params"]["kernel"], total = add(state["params"]["kernel"])
            jax.block_until_ready(total)
            time.sleep(0.02)
            if step == 5:
                (pathlib.Path(workdir) / f"ready{jax.process_index()}").touch()
            if step == 20 and jax.process_index() == 1 and stop is not None:
                os.kill(os.getpid(), stop)
            if stopping(step):
                checkpoints.save(step, state, wait=True)
                print("saved", step)
                return
    print("never stopped")


def interrupted(workdir):
    """The second process gets Ctrl-C."""
    _loop(workdir, signal.SIGINT)


def killed(workdir):
    """The second process dies."""
    _loop(workdir, signal.SIGKILL)


def fails(workdir):
    """The second process meets an error of its own between two steps, with a save behind it."""
    add = jax.jit(lambda x: (x + 1.0, jnp.sum(x)))
    with _local(workdir) as checkpoints:
        state = _state(0)
        for step in range(1, 500):
            state["params"]["kernel"], total = add(state["params"]["kernel"])
            jax.block_until_ready(total)
            time.sleep(0.02)
            if step == 5:
                checkpoints.save(step, state)
            if step == 6 and jax.process_index() == 1:
                raise ValueError("a row that only this process reads")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    globals()[sys.argv[1]](sys.argv[2])
