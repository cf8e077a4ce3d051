# SPDX-License-Identifier: Apache-2.0
"""TPU slices that need not be there: described by libtpu, to be compiled for."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import jax

from align_jax.parallel.chips import CHIPS, Chip


@dataclasses.dataclass(frozen=True)
class Topology:
    """A TPU slice, or several equal ones, described and not connected to.

    Attributes:
        name: ``v5e:8x8``, or ``2*v5e:8x8`` for two slices.
        chip: the kind of device.
        shape: chips along each axis of the torus, of one slice.
        slices: how many slices.
        devices: descriptions that a mesh can be made of.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int
    devices: tuple[Any, ...]

    @property
    def chips(self) -> int:
        """Chips of all slices together."""
        return math.prod(self.shape) * self.slices

    def wraps(self, axis: int) -> bool:
        """Tell whether the torus closes along this axis, which doubles a ring's bandwidth.

        v5e and v6e close an axis of 16 chips; the three-dimensional ones close all axes of a slice
        made of whole 4x4x4 cubes (the data sheets' sections on topologies).
        """
        if self.chip.links == 4:
            return self.shape[axis] == 16
        return len(self.shape) == 3 and all(size % 4 == 0 for size in self.shape)


@functools.cache
def describe_topology(name: str) -> Topology:
    """Describe a slice of TPUs that this machine need not have.

    Args:
        name: ``CHIP:AxB`` or ``CHIP:AxBxC``, chips along each axis; ``2*v5e:8x8`` for two such
            slices.

    Returns:
        The topology; its devices can be compiled for, not run on.

    Raises:
        ValueError: the name has another form, the chip is not in the table, or libtpu refuses the
            shape.
        ModuleNotFoundError: libtpu is not installed.
    """
    match = re.fullmatch(r"(?:(\d+)\*)?([a-z0-9]+):(\d+(?:x\d+)*)", name)
    known = [key for key, chip in CHIPS.items() if chip.kind.startswith("TPU")]
    if not match or match[2] not in known:
        raise ValueError(
            f"topology {name!r}: expected CHIP:AxB or CHIP:AxBxC, with 2* before it for two "
            f"slices, and CHIP one of {', '.join(known)}; for instance v5e:8x8, v5p:2x2x2, "
            "2*v6e:16x16"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError("compiling for TPUs needs libtpu: pip install 'align_jax[plan]'")
    from jax.experimental import topologies

    slices, generation = int(match[1] or 1), match[2]
    # one device a chip, as Cloud has it
    options: dict[str, Any] = {"chip_config_name": "megacore"} if generation == "v4" else {}
    if slices > 1:
        options["num_slices"] = slices
    try:
        with _quiet_libtpu():
            devices = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{generation}:{match[3]}", **options
            ).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"topology {name!r}: libtpu does not know it: {str(error).splitlines()[0][:300]}"
        ) from error
    shape = tuple(int(size) for size in match[3].split("x"))
    return Topology(name, CHIPS[generation], shape, slices, tuple(devices))


@contextlib.contextmanager
def _quiet_libtpu() -> Iterator[None]:
    """Tell libtpu, while it starts, that it is nowhere: else it asks the cloud for minutes and
    complains to stderr."""
    given = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }  # and that it shares no chips with other processes
    before = {key: os.environ.get(key) for key in given}
    os.environ.update({key: value for key, value in given.items() if before[key] is None})
    try:
        yield
    finally:
        for key in given:
            if before[key] is None:
                del os.environ[key]
