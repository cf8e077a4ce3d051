# SPDX-License-Identifier: Apache-2.0
"""The table of chips and the description of TPU slices that are not there."""

from __future__ import annotations

import jax
import pytest

from align_jax.parallel import chips


def test_a_device_kind_finds_its_own_row():
    class Device:
        def __init__(self, kind):
            self.device_kind = kind

    assert chips.chip_of(Device("TPU v5 lite")) is chips.CHIPS["v5e"]
    assert chips.chip_of(Device("TPU v5")) is chips.CHIPS["v5p"]
    assert chips.chip_of(Device("TPU v6 lite")) is chips.CHIPS["v6e"]
    assert chips.chip_of(Device("NVIDIA H100 80GB HBM3")) is chips.CHIPS["h100"]
    assert chips.chip_of(jax.devices()[0]) is None
    assert chips.peak_flops(jax.devices()) == 0
    assert chips.peak_flops([Device("TPU v4")] * 4) == 4 * 275e12


@pytest.mark.parametrize("name", ["v5e", "v5e-8", "v9z:2x2", "h100:2x2", "v5e:3x3"])
def test_a_topology_that_is_not_known_is_an_error_that_says_so(name):
    pytest.importorskip("libtpu")
    with pytest.raises(ValueError, match="topology '" + name):
        chips.describe_topology(name)


@pytest.mark.parametrize(
    "name, count, slices",
    [
        ("v4:2x2x2", 8, 1),
        ("v5e:4x8", 32, 1),
        ("2*v5e:4x4", 32, 2),
        ("v5p:2x2x2", 8, 1),
        ("v6e:2x4", 8, 1),
        ("tpu7x:2x2x1", 8, 1),
    ],
)
def test_topologies_are_described_without_a_tpu(name, count, slices):
    pytest.importorskip("libtpu")
    topology = chips.describe_topology(name)
    assert len(topology.devices) == count == topology.chips * topology.chip.devices_per_chip
    assert chips.chip_of(topology.devices[0]) is topology.chip
    assert len({getattr(device, "slice_index", None) or 0 for device in topology.devices}) == slices


def test_a_torus_closes_where_the_data_sheet_says():
    pytest.importorskip("libtpu")
    wraps = {
        name: [chips.describe_topology(name).wraps(axis) for axis in range(len(name.split("x")))]
        for name in ("v5e:8x16", "v5p:4x4x4", "v5p:2x2x2")
    }
    assert wraps == {"v5e:8x16": [False, True], "v5p:4x4x4": [True] * 3, "v5p:2x2x2": [False] * 3}
