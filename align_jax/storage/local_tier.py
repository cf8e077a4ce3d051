# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on each host's own storage (a RAM disk, a local SSD): frequent, cheap, and gone with
the host.

    LOCAL/RUN/0/120/    one step of a process (0: its host's first): state (its parts of every array), record (JSON)

Orbax writes them: in the background, committed on all processes or on none.  A killed process finds
its own again. One that lost them, or whose own are damaged, is given its part by a process that
holds the same part (mesh axis data > 1: another replica).  Hosts may have changed places: what a
process has saved, not its number, says where it stood.

Orbax 0.12 has managers for two tiers (`experimental.emergency`), and this file uses the parts of
them that hold: its `CheckpointManager` keeps nothing locally with one replica, nor on the first of
several; it broadcasts by adding zeros, which turns -0.0 into 0.0; its `p2p` manager serves the
files to whoever connects; none of them checks what it reads.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from align_jax.storage.checksums import bits_of, checksums, leaf_name, shard_checksums
from align_jax.storage.multihost import DAMAGED, GOOD, allgather_messages, brief, worst_verdict

KEEP = 2  # the newest may be damaged, or not yet committed on every host
MOST_FAILURES = 3  # running; then this tier is off
_log = logging.getLogger(__name__)


class Found(NamedTuple):
    """A local checkpoint read back."""

    step: int
    state: Any
    extra: dict[str, Any]


class LocalCheckpoints:
    """A run's checkpoints on the hosts' own storage.  Every process makes the same calls with the
    same arguments.

    Trouble with this tier never stops a run: it is named in a warning, and the persistent tier
    stays.

    Args:
        folder: a path that is another folder on each host; every process of a host gets a place of
            its own in it.
        run: names the run, its configuration and its history; what another has left is not read.
        every_steps: steps between saves.
        timeout_seconds: how long the processes wait for each other in a save.

    Raises:
        ValueError: a process cannot write there, or hosts share the folder.
    """

    def __init__(
        self,
        folder: str | epath.PathLike,
        run: str,
        *,
        every_steps: int,
        timeout_seconds: int = 120,
    ):
        hosts = [message["host"] for message in allgather_messages({"host": socket.gethostname()})]
        place = hosts[: jax.process_index()].count(hosts[jax.process_index()])
        self.folder = epath.Path(os.path.abspath(folder)) / str(place)
        self._run, self._every, self._timeout = run, every_steps, timeout_seconds
        self._failures, self._pending_step, self._saved_step, self._restored_step = (
            0,
            None,
            None,
            None,
        )
        self._error: Exception | None = None
        _claim(self.folder)
        logging.getLogger("absl").addFilter(_worth_saying)
        self._manager = self._open()

    def steps(self) -> list[int]:
        """Return the steps that this process can go back to, oldest first."""
        own = {step for step in self._manager.all_steps() if step != self._pending_step}
        return sorted(own | ({self._restored_step} - {None}))

    def due(self, step: int) -> bool:
        """Tell whether this step is one to save at."""
        return self._failures < MOST_FAILURES and step % self._every == 0

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """Save in the background, unless this step is saved; the state may be donated as soon as
        this returns."""
        self.settle()
        if self._failures >= MOST_FAILURES or step == self._saved_step:
            return
        names, arrays = _flat(state)
        mesh, sums = arrays[0].sharding.mesh, shard_checksums(arrays)
        places = _places(mesh)
        record = {
            "run": self._run,
            "mesh": dict(mesh.shape),
            "processes": jax.process_count(),
            "extra": dict(extra),
            "checksums": checksums(dict(zip(names, arrays))),
            "places": list(places.values()),
            "sums": [sums[device] for device in places],
        }
        self._pending_step = self._saved_step = step
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(arrays), record=ocp.args.JsonSave(record)
                ),
                force=True,
            )
        except Exception as error:  # a full or broken disk: settle tells the other processes
            self._error = error

    def settle(self) -> None:
        """Wait for the save in the background; a failed one is only named."""
        if self._pending_step is None:
            return
        error, self._error = self._error, None
        try:
            self._manager.wait_until_finished()
        except Exception as caught:  # whatever a disk throws
            error = error or caught
        step, self._pending_step = self._pending_step, None
        if worst_verdict(GOOD if error is None else DAMAGED) == GOOD:
            self._failures = 0
            return
        self._failures += 1
        _log.warning(
            "local checkpoint of step %d could not be saved to %s (%s)%s",
            step,
            self.folder,
            "seen by another process" if error is None else brief(error),
            "; no more are tried" if self._failures == MOST_FAILURES else "",
        )
        with contextlib.suppress(Exception):  # its own threads' errors, reported above
            self._manager.close()
        self._manager = self._open()  # forget what was half done

    def restore(self, abstract_state: Any, *, at_least: int) -> Found | None:
        """Read the newest step that the processes have together; None if there is none from step
        ``at_least`` on.

        What turns out to be damaged is deleted, and the next best tried.
        """
        self.settle()
        names, wanted = _flat(abstract_state)
        mesh = wanted[0].sharding.mesh
        records = self._usable(mesh, names)
        while True:
            offers = allgather_messages(
                {
                    step: {"key": _key(record), "places": record["places"]}
                    for step, record in records.items()
                    if int(step) >= at_least
                }
            )
            choice = _newest(offers, mesh, wanted)
            if choice is None:
                self.clear(after=at_least)
                return None
            step, old_mesh, holders = choice
            mine = records[step] if jax.process_index() in holders else None
            with jax.set_mesh(old_mesh):
                arrays, problem = self._read(step, mine, wanted, old_mesh)
                told = allgather_messages({"record": None if problem else mine})
                sound = tuple(process for process, message in enumerate(told) if message["record"])
                whole = _covered(wanted, old_mesh, sound)
                if whole and len(sound) < jax.process_count():
                    arrays = [_given(array, sound) for array in arrays]
            if whole:
                arrays = [
                    jax.device_put(array, leaf.sharding) for array, leaf in zip(arrays, wanted)
                ]
                common = told[sound[0]]["record"]
                if checksums(dict(zip(names, arrays))) == common["checksums"]:
                    break
                problem = problem or "the parts do not belong together"
            if mine and problem:
                del records[step]
                self._drop(step, problem)
        _say_who_lost(step, sound)
        self.clear(after=int(step))
        self._restored_step = self._saved_step = int(step)
        return Found(
            int(step),
            jax.tree.unflatten(jax.tree.structure(abstract_state), arrays),
            common["extra"],
        )

    def clear(self, *, after: int = -1) -> None:
        """Delete this process's steps later than ``after``: not the past of what is trained from
        here on."""
        for step in self._manager.all_steps():
            if step > after:
                (self.folder / str(step)).rmtree()
        self._manager.reload()

    def begin_anew(self, run: str) -> None:
        """Delete all steps, and go on under another name: copies that turn up later are not
        read."""
        self._run, self._restored_step = run, None
        self.clear()

    def wait_until_finished(self) -> None:
        """Wait for the save in the background, without a word to the other processes."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for the save in the background and let go of the threads."""
        self.settle()
        self._manager.close()

    def _open(self) -> ocp.CheckpointManager:
        for path in self.folder.iterdir():
            # half written: by a kill, or on a disk that was full
            if path.is_dir() and not path.name.isdigit():
                path.rmtree()
        everyone = ocp.options.MultiprocessingOptions(
            primary_host=None, barrier_sync_key_prefix="local"
        )
        handlers = {
            "state": _handler(everyone),
            "record": ocp.JsonCheckpointHandler(multiprocessing_options=everyone),
        }
        return ocp.CheckpointManager(
            self.folder,
            item_handlers=handlers,
            options=ocp.CheckpointManagerOptions(
                create=False,
                max_to_keep=KEEP,
                multiprocessing_options=everyone,
                enable_per_process_directory_creation=True,
                save_root_metadata=False,
                async_options=ocp.AsyncOptions(timeout_secs=self._timeout),
            ),
        )

    def _usable(self, mesh: Mesh, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Read this process's records; delete what this run cannot go on from."""
        usable = {}
        for step in map(str, sorted(self._manager.all_steps())):
            try:
                record = json.loads((self.folder / step / "record" / "metadata").read_text())
                saved_on = (record["mesh"], record["processes"])
                if record["run"] != self._run:
                    raise ValueError("it is of another run, configuration or past")
                if saved_on != (dict(mesh.shape), jax.process_count()):
                    raise ValueError(
                        f"saved on the mesh {saved_on[0]} by {saved_on[1]} "
                        "processes, this run has "
                        f"{dict(mesh.shape)} and {jax.process_count()}"
                    )
                if list(record["checksums"]) != list(names):
                    raise ValueError("it holds other arrays than this run's state")
                usable[step] = record
            # what a damaged file makes a reader throw is anybody's guess
            except Exception as error:
                self._drop(step, brief(error))
        return usable

    def _read(
        self, step: str, record: Mapping[str, Any] | None, wanted: Sequence[Any], mesh: Mesh
    ) -> tuple[list[jax.Array], str]:
        """Read this process's parts, zeros where it has none; and say what is wrong with them, ""
        if nothing is."""
        targets = [
            jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, leaf.sharding.spec)
            )
            for leaf in wanted
        ]
        arrays, problem = None, "" if record else "lost"
        try:
            if record:
                arrays = _handler(ocp.options.MultiprocessingOptions(primary_host=None)).restore(
                    self.folder / step / "state",
                    args=ocp.args.PyTreeRestore(
                        item=targets,
                        restore_args=ocp.checkpoint_utils.construct_restore_args(targets),
                    ),
                )
        except Exception as error:  # as above
            problem = brief(error)
        if arrays is None:
            arrays = [
                jax.make_array_from_callback(
                    leaf.shape, leaf.sharding, functools.partial(_zeros, leaf)
                )
                for leaf in targets
            ]
        sums = shard_checksums(arrays)  # all processes together
        if record and not problem and [sums[device] for device in _places(mesh)] != record["sums"]:
            problem = "the contents are not what was saved"
        return arrays, problem

    def _drop(self, step: str, why: str) -> None:
        _log.warning(
            "local checkpoint of step %s in %s on process %d is not used (%s): deleted",
            step,
            self.folder,
            jax.process_index(),
            why,
        )
        (self.folder / step).rmtree()
        self._manager.reload()


def _handler(everyone: ocp.options.MultiprocessingOptions) -> ocp.PyTreeCheckpointHandler:
    """Return a handler with which each process writes and reads all that it holds, not one replica
    of it."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (
            jax.Array,
            ocp.type_handlers.ArrayHandler(
                primary_host=None, replica_id=None, use_replica_parallel=False
            ),
        )
    )
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=True,
        use_zarr3=True,
        multiprocessing_options=everyone,
        type_handler_registry=registry,
    )


def _worth_saying(record: logging.LogRecord) -> bool:
    # Orbax says it at every save of this kind
    return "Global object size logging disabled" not in str(record.msg)


def _claim(folder: epath.Path) -> None:
    """Make the folder, and see that no other process has the same one."""
    error, token = None, str(jax.process_index())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "owner").write_text(token)
    except OSError as caught:
        error = caught
    if worst_verdict(GOOD if error is None else DAMAGED) != GOOD:
        raise ValueError(
            "checkpoint.local: expected a folder on every host that its processes "
            "can write to; "
            f"{folder} is not: "
            f"{'on another process' if error is None else brief(error)}"
        ) from error
    shared = (folder / "owner").read_text() != token
    if worst_verdict(DAMAGED if shared else GOOD) != GOOD:
        raise ValueError(
            f"checkpoint.local: {folder} is one folder that several hosts share; "
            "expected one of each "
            "host's own, such as /dev/shm/align_jax (what all hosts share is "
            "--workdir)"
        )


def _flat(tree: Any) -> tuple[list[str], list[Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [leaf_name(path) for path, _ in leaves], [leaf for _, leaf in leaves]


def _zeros(leaf: Any, index: tuple[slice, ...]) -> np.ndarray:
    return np.zeros(
        [len(range(*part.indices(size))) for part, size in zip(index, leaf.shape)], leaf.dtype
    )


def _key(record: Mapping[str, Any]) -> str:
    """Name the state that a process's part belongs to: parts of the same step from two attempts may
    differ in bits."""
    return hashlib.sha256(json.dumps(record["checksums"]).encode()).hexdigest()


def _places(mesh: Mesh) -> dict[jax.Device, int]:
    """Say where on the mesh this process's devices stand, in the order of their numbers."""
    places = {
        device: place
        for place, device in enumerate(mesh.devices.flat)
        if device.process_index == jax.process_index()
    }
    return dict(sorted(places.items(), key=lambda item: item[0].id))


def _newest(
    offers: Sequence[Mapping[str, Any]], mesh: Mesh, wanted: Sequence[Any]
) -> tuple[str, Mesh, tuple[int, ...]] | None:
    """Choose the newest step of which the offers hold every part: (step, mesh it stands on, who
    holds parts of it)."""
    for step in sorted({step for offer in offers for step in offer}, key=int, reverse=True):
        for key in sorted({offer[step]["key"] for offer in offers if step in offer}):
            places = {
                process: offer[step]["places"]
                for process, offer in enumerate(offers)
                if step in offer and offer[step]["key"] == key
            }
            old_mesh, holders = _mesh_at(mesh, places)
            if _covered(wanted, old_mesh, holders):
                return step, old_mesh, holders
        if jax.process_index() == 0:
            _log.warning(
                "local checkpoint of step %s is not used: processes %s have lost their "
                "parts, and no other "
                "replica holds them",
                step,
                [i for i, offer in enumerate(offers) if step not in offer],
            )
    return None


def _mesh_at(mesh: Mesh, places: Mapping[int, Sequence[int]]) -> tuple[Mesh, tuple[int, ...]]:
    """Put each process's devices where they stood when it saved, the others on what is left."""
    devices: dict[int, list[jax.Device]] = {}
    for device in sorted(mesh.devices.flat, key=lambda device: device.id):
        devices.setdefault(device.process_index, []).append(device)
    seats: list[jax.Device | None] = [None] * mesh.size
    holders = []
    for process, own in sorted(places.items()):
        if len(own) == len(devices[process]) and all(seats[place] is None for place in own):
            holders.append(process)
            for place, device in zip(own, devices[process]):
                seats[place] = device
    rest = iter([device for device in mesh.devices.flat if device not in seats])
    array = np.array([next(rest) if seat is None else seat for seat in seats]).reshape(
        mesh.devices.shape
    )
    return Mesh(array, mesh.axis_names, axis_types=mesh.axis_types), tuple(holders)


def _covered(wanted: Sequence[Any], mesh: Mesh, holders: tuple[int, ...]) -> bool:
    return all(
        _givers(NamedSharding(mesh, spec), shape, holders)
        for spec, shape in {(leaf.sharding.spec, leaf.shape) for leaf in wanted}
    )


@functools.lru_cache
def _givers(
    sharding: NamedSharding, shape: tuple[int, ...], holders: tuple[int, ...]
) -> frozenset[jax.Device]:
    """Choose for every part of an array one device that has it; none at all if a part is
    nowhere."""
    parts: dict[tuple[Any, ...], jax.Device | None] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        part = tuple((axis.start, axis.stop) for axis in index)
        if parts.get(part) is None:
            parts[part] = device if device.process_index in holders else None
    return frozenset() if None in parts.values() else frozenset(parts.values())


def _given(array: jax.Array, holders: tuple[int, ...]) -> jax.Array:
    """Give each part of an array, bit for bit, from the device that has it to all that should."""
    mesh, spec = array.sharding.mesh, array.sharding.spec
    used = {
        axis
        for part in spec
        if part is not None
        for axis in ((part,) if isinstance(part, str) else part)
    }
    spare = tuple(axis for axis in mesh.axis_names if axis not in used)  # along them lie copies
    givers = _givers(array.sharding, array.shape, holders)
    copies = [
        jax.device_put(
            (np.asarray if shard.device in givers else np.zeros_like)(shard.data)[None],
            shard.device,
        )
        for shard in array.addressable_shards
    ]
    stacked = jax.make_array_from_single_device_arrays(
        (math.prod(mesh.shape[axis] for axis in spare), *array.shape),
        NamedSharding(mesh, PartitionSpec(spare, *spec)),
        copies,
    )
    return _sum_of_bits(array.sharding)(stacked)


@functools.lru_cache
def _sum_of_bits(sharding: NamedSharding) -> Any:
    def add(stacked: jax.Array) -> jax.Array:
        bits = bits_of(stacked)
        total = jnp.sum(bits, axis=0, dtype=jnp.uint32).astype(bits.dtype)
        if stacked.dtype == jnp.bool_:
            return total.astype(jnp.bool_)
        return jax.lax.bitcast_convert_type(total, stacked.dtype)

    return jax.jit(add, out_shardings=sharding)


def _say_who_lost(step: str, sound: Sequence[int]) -> None:
    lost = [process for process in range(jax.process_count()) if process not in sound]
    if lost and jax.process_index() == 0:
        _log.warning(
            "local checkpoint of step %s: processes %s had no sound one; others gave them theirs",
            step,
            lost,
        )
