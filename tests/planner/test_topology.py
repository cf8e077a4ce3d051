# SPDX-License-Identifier: Apache-2.0
"""TPU slices that are not there, described."""

from __future__ import annotations

import pytest

from align_jax.parallel.chips import chip_of
from align_jax.planner.topology import describe_topology

pytest.importorskip("libtpu", reason="describing TPUs needs libtpu")


@pytest.mark.parametrize("name", ["v5e", "v5e-8", "v9z:2x2", "h100:2x2", "v5e:3x3"])
def test_a_topology_that_is_not_known_is_an_error_that_says_so(name):
    with pytest.raises(ValueError, match="topology '" + name):
        describe_topology(name)


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
    topology = describe_topology(name)
    assert len(topology.devices) == count == topology.chips * topology.chip.devices_per_chip
    assert chip_of(topology.devices[0]) is topology.chip
    assert len({getattr(device, "slice_index", None) or 0 for device in topology.devices}) == slices


def test_a_torus_closes_where_the_data_sheet_says():
    wraps = {
        name: [describe_topology(name).wraps(axis) for axis in range(len(name.split("x")))]
        for name in ("v5e:8x16", "v5p:4x4x4", "v5p:2x2x2")
    }
    assert wraps == {"v5e:8x16": [False, True], "v5p:4x4x4": [True] * 3, "v5p:2x2x2": [False] * 3}
