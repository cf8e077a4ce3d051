# SPDX-License-Identifier: Apache-2.0
"""The table of chips."""

from __future__ import annotations

import jax

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
