# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on each host's own storage (a RAM disk, a local SSD): frequent, cheap, and gone with
the host.

    LOCAL/RUN/0/120/    one step of a process (0: its host's first): state (its shards of every
                        array), record (JSON)

Orbax writes them: in the background, committed on all processes or on none.  A killed process finds
its own again.  One that lost them, or whose own are corrupt, is given its shards by a process that
holds the same ones (mesh axis data > 1: another replica).  Hosts may have changed places: what a
process has saved, not its number, says where on the mesh it stood.

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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from align_jax.storage.checksums import (
    bits_of,
    checksums,
    is_sound_extra,
    json_checksum,
    named_leaves,
    shard_checksums,
)
from align_jax.storage.multihost import allgather_messages, any_process, one_line

KEEP = 2  # the newest may be corrupt, or not yet committed on every host
MAX_FAILURES = 3  # running; then this tier is off
_log = logging.getLogger(__name__)
Record = Mapping[str, Any]  # the JSON beside a process's shards


class LocalRestored(NamedTuple):
    """A local checkpoint read back."""

    step: int
    state: Any
    extra: dict[str, Any]


class LocalCheckpoints:
    """A run's checkpoints on the hosts' own storage; every process makes the same calls.

    Trouble with this tier never stops a run: it is named in a warning, and the persistent tier
    stays.

    Args:
        folder: a path that is another folder on each host; every process of a host gets a
            subfolder of its own.
        lineage: names the run, its configuration and its history; what another has left is not
            read.
        every_steps: steps between saves.
        timeout_seconds: how long the processes wait for each other in a save.

    Raises:
        ValueError: a process cannot write there, or hosts share the folder.
    """

    def __init__(
        self, folder: epath.PathLike, lineage: str, *, every_steps: int, timeout_seconds: int = 120
    ):
        hosts = [message["host"] for message in allgather_messages({"host": socket.gethostname()})]
        local_index = hosts[: jax.process_index()].count(hosts[jax.process_index()])
        self.folder = epath.Path(os.path.abspath(folder)) / str(local_index)
        self._lineage, self._every, self._timeout = lineage, every_steps, timeout_seconds
        self._failures = 0
        self._pending_step: int | None = None
        self._saved_step: int | None = None
        self._restored_step: int | None = None
        self._error: Exception | None = None
        _claim_folder(self.folder)
        logging.getLogger("absl").addFilter(_not_a_size_notice)
        self._manager = self._open()

    def steps(self) -> list[int]:
        """Return the steps that this process can go back to, oldest first."""
        steps = {step for step in self._manager.all_steps() if step != self._pending_step}
        if self._restored_step is not None:  # another process may have given it
            steps.add(self._restored_step)
        return sorted(steps)

    def due(self, step: int) -> bool:
        """Tell whether this step is one to save at."""
        return self._failures < MAX_FAILURES and step % self._every == 0

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """Save in the background; the state may be donated as soon as this returns.

        A step that is saved already is not saved again.
        """
        self.wait()
        if self._failures >= MAX_FAILURES or step == self._saved_step:
            return
        leaves = named_leaves(state)
        arrays = list(leaves.values())
        mesh, sums = arrays[0].sharding.mesh, shard_checksums(arrays)
        positions = _positions(mesh)
        record = {
            "lineage": self._lineage,
            "mesh": dict(mesh.shape),
            "processes": jax.process_count(),
            "extra": dict(extra),
            "extra_checksum": json_checksum(dict(extra)),
            "checksums": checksums(leaves),
            "positions": list(positions.values()),
            "shard_checksums": [sums[device] for device in positions],
        }
        self._pending_step = self._saved_step = step
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(arrays), record=ocp.args.JsonSave(record)
        )
        try:
            self._manager.save(step, args=items, force=True)
        except Exception as error:  # a full or broken disk: wait() tells the other processes
            self._error = error

    def wait(self) -> None:
        """Wait for the save in the background; a failed one is only named."""
        if self._pending_step is None:
            return
        error, self._error = self._error, None
        try:
            self._manager.wait_until_finished()
        except Exception as caught:  # whatever a disk throws
            error = error or caught
        step, self._pending_step = self._pending_step, None
        if not any_process(error is not None):
            self._failures = 0
            return
        self._failures += 1
        _log.warning(
            "local checkpoint of step %d could not be saved to %s (%s)%s",
            step,
            self.folder,
            one_line(error),
            "; no more are tried" if self._failures == MAX_FAILURES else "",
        )
        with contextlib.suppress(Exception):  # its own threads' errors, reported above
            self._manager.close()
        self._manager = self._open()  # forget what was half done

    def restore(self, abstract_state: Any, *, at_least: int) -> LocalRestored | None:
        """Read the newest step that the processes have together, from step ``at_least`` on.

        What turns out to be corrupt is deleted, and the next best tried.

        Returns:
            The checkpoint; None if there is none.
        """
        self.wait()
        wanted = named_leaves(abstract_state)
        mesh = next(iter(wanted.values())).sharding.mesh
        records = self._usable_records(mesh, list(wanted))
        # Ends: every round that fails deletes a process's copy of a step.
        while True:
            choice = _newest_complete(_offers(records, at_least), mesh, list(wanted.values()))
            if choice is None:
                self.clear(after=at_least)
                return None
            record = records[choice.step] if jax.process_index() in choice.holders else None
            arrays, extra, problem = self._read(choice, record, wanted)
            if arrays is not None:
                break
            if record is not None and problem:
                del records[choice.step]
                self._delete(choice.step, problem)
        step = int(choice.step)
        self.clear(after=step)
        self._restored_step = self._saved_step = step
        return LocalRestored(
            step, jax.tree.unflatten(jax.tree.structure(abstract_state), arrays), extra
        )

    def clear(self, *, after: int = -1) -> None:
        """Delete this process's steps later than ``after``: the run's history ends there."""
        for step in self._manager.all_steps():
            if step > after:
                (self.folder / str(step)).rmtree()
        self._manager.reload()

    def reset(self, lineage: str) -> None:
        """Delete all steps, and go on under another name: copies that turn up later are not
        read."""
        self._lineage, self._restored_step = lineage, None
        self.clear()

    def wait_until_finished(self) -> None:
        """Wait for the save in the background, without a word to the other processes."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for the save in the background and let go of the threads."""
        self.wait()
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
            "state": _make_handler(everyone),
            "record": ocp.JsonCheckpointHandler(multiprocessing_options=everyone),
        }
        options = ocp.CheckpointManagerOptions(
            create=False,
            max_to_keep=KEEP,
            multiprocessing_options=everyone,
            enable_per_process_directory_creation=True,
            save_root_metadata=False,
            async_options=ocp.AsyncOptions(timeout_secs=self._timeout),
        )
        return ocp.CheckpointManager(self.folder, item_handlers=handlers, options=options)

    def _usable_records(self, mesh: Mesh, names: list[str]) -> dict[str, Record]:
        """Read this process's records; delete the steps that this run cannot go on from."""
        usable = {}
        for step in map(str, sorted(self._manager.all_steps())):
            try:
                record = json.loads((self.folder / step / "record" / "metadata").read_text())
                problem = self._unusable(record, mesh, names)
            except (
                Exception
            ) as error:  # what a corrupt file makes a reader throw is anybody's guess
                problem = one_line(error)
            if problem:
                self._delete(step, problem)
            else:
                usable[step] = record
        return usable

    def _unusable(self, record: Record, mesh: Mesh, names: list[str]) -> str:
        """Say why this run cannot go on from what a record describes; "" if it can."""
        if record["lineage"] != self._lineage:
            return "it is of another run, configuration or past"
        if (record["mesh"], record["processes"]) != (dict(mesh.shape), jax.process_count()):
            return (
                f"saved on the mesh {record['mesh']} by {record['processes']} processes, this run "
                f"has {dict(mesh.shape)} and {jax.process_count()}"
            )
        if list(record["checksums"]) != names:
            return "it holds other arrays than this run's state"
        if not is_sound_extra(record):
            return "extra (the data position, counts) is not what was saved"
        return ""

    def _read(
        self, choice: _Choice, record: Record | None, wanted: Mapping[str, Any]
    ) -> tuple[list[jax.Array] | None, dict[str, Any], str]:
        """Read a step together: each process its own shards, and those it lacks from others.

        Returns:
            The arrays on this run's mesh (None if they are not whole and sound), what was saved
            beside them, and what is wrong with this process's shards ("" if nothing is).
        """
        leaves = list(wanted.values())
        # On the mesh as it was saved: this process's devices own the shards that its files hold,
        # wherever on this run's mesh they stand.
        with jax.set_mesh(choice.mesh):
            arrays, problem = self._read_own(choice, record, leaves)
            messages = allgather_messages({"record": None if problem else record})
            sound = tuple(i for i, message in enumerate(messages) if message["record"])
            if not _complete(leaves, choice.mesh, sound):
                return None, {}, problem
            if len(sound) < jax.process_count():
                arrays = [_share_shards(array, sound) for array in arrays]
        arrays = [jax.device_put(array, leaf.sharding) for array, leaf in zip(arrays, leaves)]
        common = messages[sound[0]]["record"]
        if checksums(dict(zip(wanted, arrays))) != common["checksums"]:
            return None, {}, problem or "the shards do not belong together"
        lost = [i for i in range(jax.process_count()) if i not in sound]
        if lost and jax.process_index() == 0:
            _log.warning(
                "local checkpoint of step %s: processes %s had no sound one; others gave them "
                "theirs",
                choice.step,
                lost,
            )
        return arrays, common["extra"], problem

    def _read_own(
        self, choice: _Choice, record: Record | None, leaves: Sequence[Any]
    ) -> tuple[list[jax.Array], str]:
        """Read this process's shards, zeros where it has none; and say what is wrong with them."""
        targets = [
            jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=NamedSharding(choice.mesh, leaf.sharding.spec)
            )
            for leaf in leaves
        ]
        arrays, problem = None, "" if record else "lost"
        try:
            if record:
                arguments = ocp.args.PyTreeRestore(
                    item=targets, restore_args=ocp.checkpoint_utils.construct_restore_args(targets)
                )
                handler = _make_handler(ocp.options.MultiprocessingOptions(primary_host=None))
                arrays = handler.restore(self.folder / choice.step / "state", args=arguments)
        except Exception as error:  # as above
            problem = one_line(error)
        if arrays is None:
            arrays = [jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding) for leaf in targets]
        sums = shard_checksums(arrays)  # all processes together, those without a sound copy too
        if record and not problem:
            found = [sums[device] for device in _positions(choice.mesh)]
            problem = (
                "" if found == record["shard_checksums"] else "the contents are not what was saved"
            )
        return arrays, problem

    def _delete(self, step: str, why: str) -> None:
        _log.warning(
            "local checkpoint of step %s in %s on process %d is not used (%s): deleted",
            step,
            self.folder,
            jax.process_index(),
            why,
        )
        (self.folder / step).rmtree()
        self._manager.reload()


def _make_handler(everyone: ocp.options.MultiprocessingOptions) -> ocp.PyTreeCheckpointHandler:
    """Make a handler with which each process writes and reads all its shards, not one replica."""
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


def _not_a_size_notice(record: logging.LogRecord) -> bool:
    # Orbax says it at every save of this kind
    return "Global object size logging disabled" not in str(record.msg)


def _claim_folder(folder: epath.Path) -> None:
    """Make the folder, and see that no other process has the same one."""
    error, token = None, str(jax.process_index())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "owner").write_text(token)
    except OSError as caught:
        error = caught
    if any_process(error is not None):
        raise ValueError(
            "checkpoint.local: expected a folder on every host that its processes can write to; "
            f"{folder} is not: {one_line(error)}"
        ) from error
    # All have written: where two share the folder, one of them reads the other's number.
    if any_process((folder / "owner").read_text() != token):
        raise ValueError(
            f"checkpoint.local: {folder} is one folder that several hosts share; expected one of "
            "each host's own, such as /dev/shm/align_jax (what all hosts share is --workdir)"
        )


def _positions(mesh: Mesh) -> dict[jax.Device, int]:
    """Return where on the mesh this process's devices stand, in the order of their ids."""
    flat = list(mesh.devices.flat)
    own = [device for device in flat if device.process_index == jax.process_index()]
    return {device: flat.index(device) for device in sorted(own, key=lambda device: device.id)}


class _Choice(NamedTuple):
    """A step that the processes hold together."""

    step: str
    mesh: Mesh  # each holder's devices where they stood when it saved
    holders: tuple[int, ...]  # processes that hold shards of it


def _offers(records: Mapping[str, Record], at_least: int) -> list[dict[str, Any]]:
    """Tell all processes which steps each holds, of what state, and where its devices stood.

    Shards of the same step from two attempts may differ in bits: the state's name is a digest of
    its checksums.
    """
    offer = {}
    for step, record in records.items():
        if int(step) >= at_least:
            state = hashlib.sha256(json.dumps(record["checksums"]).encode()).hexdigest()
            offer[step] = {"state": state, "positions": record["positions"]}
    return allgather_messages(offer)


def _newest_complete(
    offers: Sequence[Mapping[str, Any]], mesh: Mesh, leaves: Sequence[Any]
) -> _Choice | None:
    """Choose the newest step of which the processes hold every shard."""
    steps = {step for offer in offers for step in offer}
    for step in sorted(steps, key=int, reverse=True):
        found = {process: offer[step] for process, offer in enumerate(offers) if step in offer}
        for state in sorted({one["state"] for one in found.values()}):
            positions = {
                process: one["positions"] for process, one in found.items() if one["state"] == state
            }
            saved_mesh, holders = _mesh_as_saved(mesh, positions)
            if _complete(leaves, saved_mesh, holders):
                return _Choice(step, saved_mesh, holders)
        if jax.process_index() == 0:
            _log.warning(
                "local checkpoint of step %s is not used: processes %s have lost their shards, and "
                "no other replica holds them",
                step,
                [process for process in range(len(offers)) if process not in found],
            )
    return None


def _mesh_as_saved(
    mesh: Mesh, positions: Mapping[int, Sequence[int]]
) -> tuple[Mesh, tuple[int, ...]]:
    """Put each process's devices where they stood when it saved, the others on what is left.

    Returns:
        That mesh, and the processes whose devices could be put there.
    """
    own: dict[int, list[jax.Device]] = {}
    for device in sorted(mesh.devices.flat, key=lambda device: device.id):
        own.setdefault(device.process_index, []).append(device)
    taken: dict[int, jax.Device] = {}
    holders = []
    for process, wanted in sorted(positions.items()):
        # two hosts may both hold a shard's files, copied there by hand: the first is taken
        if len(wanted) == len(own[process]) and not taken.keys() & set(wanted):
            holders.append(process)
            taken.update(zip(wanted, own[process]))
    rest = iter([device for device in mesh.devices.flat if device not in taken.values()])
    devices = [taken[i] if i in taken else next(rest) for i in range(mesh.size)]
    array = np.array(devices).reshape(mesh.devices.shape)
    return Mesh(array, mesh.axis_names, axis_types=mesh.axis_types), tuple(holders)


def _complete(leaves: Sequence[Any], mesh: Mesh, holders: tuple[int, ...]) -> bool:
    """Tell whether the holders have every shard of every array between them."""
    forms = {(leaf.sharding.spec, leaf.shape) for leaf in leaves}
    return all(_source_devices(NamedSharding(mesh, spec), shape, holders) for spec, shape in forms)


@functools.lru_cache
def _source_devices(
    sharding: NamedSharding, shape: tuple[int, ...], holders: tuple[int, ...]
) -> frozenset[jax.Device]:
    """Choose for every shard of an array one device that has it; none at all if one is nowhere."""
    sources: dict[Any, Any] = {}  # shard -> device; None: nowhere so far
    indices: Mapping[Any, Any] = sharding.devices_indices_map(shape)
    for device, index in indices.items():
        shard = tuple((axis.start, axis.stop) for axis in index)
        if sources.get(shard) is None:
            sources[shard] = device if device.process_index in holders else None
    return frozenset() if None in sources.values() else frozenset(sources.values())


def _share_shards(array: jax.Array, holders: tuple[int, ...]) -> jax.Array:
    """Give each shard of an array, bit for bit, from the device that has it to its replicas.

    The replicas of a shard lie along the mesh axes that its spec leaves out.  Stacked along these,
    all but the source zeros, their bits sum to the source's.
    """
    sharding: Any = array.sharding  # a NamedSharding
    mesh, spec = sharding.mesh, sharding.spec
    replicated = tuple(axis for axis in mesh.axis_names if axis not in _axes_of(spec))
    sources = _source_devices(sharding, array.shape, holders)
    copies = []
    for shard in array.addressable_shards:
        values = np.asarray(shard.data) if shard.device in sources else np.zeros_like(shard.data)
        copies.append(jax.device_put(values[None], shard.device))
    stacked = jax.make_array_from_single_device_arrays(
        (math.prod(mesh.shape[axis] for axis in replicated), *array.shape),
        NamedSharding(mesh, PartitionSpec(replicated, *spec)),
        copies,
    )
    return _sum_of_bits(sharding)(stacked)


def _axes_of(spec: PartitionSpec) -> set[str]:
    axes: set[str] = set()
    for entry in spec:
        if entry is not None:
            axes |= {entry} if isinstance(entry, str) else set(entry)
    return axes


@functools.lru_cache
def _sum_of_bits(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    # As integers: a floating-point sum with zeros would turn -0.0 into 0.0.
    def add(stacked: jax.Array) -> jax.Array:
        bits = bits_of(stacked)
        total = jnp.sum(bits, axis=0, dtype=jnp.uint32).astype(bits.dtype)
        if stacked.dtype == jnp.bool_:
            return total.astype(jnp.bool_)
        return jax.lax.bitcast_convert_type(total, stacked.dtype)

    return jax.jit(add, out_shardings=sharding)
