# SPDX-License-Identifier: Apache-2.0
"""The device mesh: five named axes, of which one may take the rest of the devices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

# slowest network first: tensor's collectives are the hottest
AXES = ("data", "fsdp", "expert", "sequence", "tensor")
ROWS = ("data", "fsdp", "expert")  # the axes over which a batch's rows are split


def mesh_shape(sizes: Mapping[str, int], devices: int) -> tuple[int, ...]:
    """Resolve the sizes of the mesh's axes, in the order of ``AXES``.

    Args:
        sizes: axis -> size; missing axes are 1; one axis may be -1, the rest of the devices.
        devices: how many devices there are.

    Returns:
        The sizes; their product is ``devices``.

    Raises:
        ValueError: an unknown axis, more than one -1, or a product that is not the number of
            devices.
    """
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise ValueError(f"unknown mesh axes {unknown}; known: {list(AXES)}")
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    if any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1:
        raise ValueError(
            f"mesh axes must be positive, and at most one may be -1; got {dict(zip(AXES, shape))}"
        )
    fixed = math.prod(size for size in shape if size != -1)
    if -1 in shape:
        if devices % fixed:
            raise ValueError(
                f"mesh {dict(zip(AXES, shape))}: {devices} devices are not divisible by {fixed}"
            )
        shape[shape.index(-1)] = devices // fixed
    elif fixed != devices:
        largest = shape.index(max(shape))
        rest = fixed // shape[largest]
        fix = f"--config.mesh.{AXES[largest]}=-1 takes all of them"
        raise ValueError(
            f"mesh {dict(zip(AXES, shape))} needs {fixed} devices, there are {devices}; "
            + (fix if devices % rest == 0 else f"the axes must multiply to {devices}")
        )
    return tuple(shape)


def make_mesh(
    sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """Make the mesh over all devices (or the given ones), neighbors in the interconnect next to
    each other.

    With several slices the ``data`` axis spans them (its one all-reduce a step is what the
    data-center network bears).
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(sizes, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        if shape[0] % slices:
            raise ValueError(
                f"mesh axis data={shape[0]} must be a multiple of the number of slices, {slices}"
            )
        array = mesh_utils.create_hybrid_device_mesh(
            (shape[0] // slices, *shape[1:]), (slices, *(1,) * (len(shape) - 1)), devices=devices
        )
    elif devices[0].platform == "cpu":
        array = np.asarray(devices).reshape(shape)
    else:
        array = mesh_utils.create_device_mesh(
            shape, devices=devices, allow_split_physical_axes=True
        )
    return jax.sharding.Mesh(array, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def row_shards(mesh: jax.sharding.Mesh) -> int:
    """Return over how many devices a batch's rows are split."""
    return math.prod(mesh.shape[axis] for axis in ROWS)
