# SPDX-License-Identifier: Apache-2.0
"""What each chip can do: the numbers behind MFU and the planner's rooflines.

A *device* is what JAX calls one: on TPU7x a chip has two, on the others one.  All figures are per
device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

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
