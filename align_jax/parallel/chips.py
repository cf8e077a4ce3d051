# SPDX-License-Identifier: Apache-2.0
"""What each chip can do: the numbers behind roofline estimates and MFU, and TPU topologies that
need not be there.

A *device* is what JAX calls one: on TPU7x a chip has two, on the others one.  All figures are per
device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device.

    Attributes:
        kind: what ``jax.Device.device_kind`` begins with.
        flops: peak dense bfloat16 FLOP/s.
        hbm: bytes of device memory that a program may use; for TPUs as the compiler states it
            (libtpu 0.0.52 gives the figure when a program does not fit), which is below what the
            data sheet says.
        hbm_bandwidth: bytes/s.
        link: bytes/s of one interconnect link in one direction.
        links: interconnect links; a torus axis has two.
        network: bytes/s between slices (the data-center network) or hosts.
        devices_per_chip: devices that share a chip; figures above are already divided by it.
        source: where the figures are from.
    """

    kind: str
    flops: float
    hbm: int
    hbm_bandwidth: float
    link: float
    links: int
    network: float
    devices_per_chip: int = 1
    source: str = ""


_DOCS = "https://docs.cloud.google.com/tpu/docs"
CHIPS: Mapping[str, Chip] = {
    # v4's data sheet gives neither links nor network: links from Jouppi et al. 2023 (arXiv
    # 2304.01433, six of 50 GB/s), the network as for v5p, whose hosts hold four chips as well.
    "v4": Chip("TPU v4", 275e12, int(30.75 * GIB), 1200e9, 50e9, 6, 6.25e9, source=f"{_DOCS}/v4"),
    "v5e": Chip(
        "TPU v5 lite", 197e12, int(15.75 * GIB), 819e9, 50e9, 4, 3.125e9, source=f"{_DOCS}/v5e"
    ),
    "v5p": Chip(
        "TPU v5",
        459e12,
        int(95.73 * GIB),
        2765e9,
        100e9,
        6,
        6.25e9,
        source=f"{_DOCS}/tpu7x (its table)",
    ),
    "v6e": Chip(
        "TPU v6 lite", 918e12, int(31.24 * GIB), 1638e9, 100e9, 4, 12.5e9, source=f"{_DOCS}/v6e"
    ),
    "tpu7x": Chip(
        "TPU7x",
        2307e12 / 2,
        int(94.74 * GIB),
        7380e9 / 2,
        100e9 / 2,
        6,
        12.5e9 / 2,
        2,
        source=f"{_DOCS}/tpu7x",
    ),
    # GPUs, for MFU only: dense bfloat16 without sparsity, the NVLink of one GPU as one link.
    "h100": Chip(
        "NVIDIA H100",
        989e12,
        80 * 10**9,
        3350e9,
        450e9,
        1,
        50e9,
        source="https://www.nvidia.com/en-us/data-center/h100",
    ),
    "h200": Chip(
        "NVIDIA H200",
        989e12,
        141 * 10**9,
        4800e9,
        450e9,
        1,
        50e9,
        source="https://www.nvidia.com/en-us/data-center/h200",
    ),
    "a100": Chip(
        "NVIDIA A100",
        312e12,
        80 * 10**9,
        2039e9,
        300e9,
        1,
        25e9,
        source="https://www.nvidia.com/en-us/data-center/a100",
    ),
}


def chip_of(device: Any) -> Chip | None:
    """Return the table's row for a device; None for a kind that the table lacks (a CPU).

    Args:
        device: a ``jax.Device``, or one of a topology.
    """
    # "TPU v5 lite" before "TPU v5"
    kinds = sorted(CHIPS.values(), key=lambda chip: -len(chip.kind))
    return next((chip for chip in kinds if device.device_kind.startswith(chip.kind)), None)


def peak_flops(devices: Sequence[Any]) -> float:
    """Return the peak bfloat16 FLOP/s of all these devices together; 0 where it is not known."""
    chips = [chip_of(device) for device in devices]
    known = [chip.flops for chip in chips if chip is not None]
    return sum(known) if len(known) == len(chips) else 0.0


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
            f"topology {name!r}: expected CHIP:AxB or CHIP:AxBxC, with 2* before it "
            "for two slices, and "
            f"CHIP one of {', '.join(known)}; for instance v5e:8x8, v5p:2x2x2, "
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
