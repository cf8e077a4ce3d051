# SPDX-License-Identifier: Apache-2.0
"""Where a policy's weights lie while it generates: a copy in the compute type, split over a few
neighbors.

Training splits each weight over the whole mesh and gathers it where it is used, once for many rows
of many tokens.  A decoded token is one for each row: gathering for it would move all weights for
every token (15 GB a token of a 7B model, on every chip).  So the devices are dealt out anew:

    training     fsdp=64             a weight over 64 devices, each with its own rows
    generating   data=16  tensor=4   a weight over 4 devices of one host, which share their rows
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from align_jax.core.tree import flatten, unflatten
from align_jax.models.model import Model, Params
from align_jax.models.quantize import Quantized
from align_jax.parallel.mesh import AXES


def decode_mesh(mesh: Mesh, tensor: int) -> Mesh:
    """Return a mesh over the same devices on which so many neighbors split each weight and share
    their rows.

    Args:
        mesh: the training mesh.
        tensor: devices that hold one copy of the weights together; all of one host, so that each
            process brings its own rows.

    Raises:
        ValueError: the devices of a host do not divide into groups of this size.
    """
    devices = sorted(mesh.devices.flat, key=lambda one: (one.process_index, one.id))
    hosts = {one.process_index for one in devices}
    each = len(devices) // len(hosts)
    if tensor < 1 or each % tensor:
        raise ValueError(
            f"config.rollout.tensor = {tensor}: expected a divisor of the {each} devices of a host"
        )
    sizes = {"data": len(devices) // tensor, "tensor": tensor}
    array = np.asarray(devices).reshape([sizes.get(axis, 1) for axis in AXES])
    return Mesh(array, AXES, axis_types=mesh.axis_types)


def _decode_params(model: Model, params: Params) -> Params:
    """Leave the scalar heads out, and cast what is cast to the compute type wherever it is used.

    Norms' scales are not, nor what DoRA takes float32 norms of; quantized maps stay as they are:
    generation computes what it would without a copy.
    """
    roles, lora, dtype = flatten(model.roles()), model.options.lora, model.options.dtype
    kept = {path: leaf for path, leaf in flatten(params).items() if roles[path].part != "head"}
    if lora is not None and lora.dora:
        return unflatten(kept)
    for path, leaf in kept.items():
        if roles[path].matrix and not isinstance(leaf, Quantized):
            kept[path] = leaf.astype(dtype)
    return unflatten(kept)


def decode_specs(model: Model, params: Params, mesh: Mesh) -> Params:
    """Return the shapes, types and shardings of a policy's weights while it generates.

    Args:
        model: the policy.
        params: its parameters on the training mesh: arrays, or shapes with shardings.
        mesh: from ``decode_mesh``.
    """
    shapes = jax.eval_shape(functools.partial(_decode_params, model), params)
    trained = flatten(params)
    like = unflatten({path: trained[path] for path in flatten(shapes)})

    def spec(shape: jax.ShapeDtypeStruct, leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, leaf.sharding.spec)
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    return jax.tree.map(spec, shapes, like)


def make_resharder(model: Model, mesh: Mesh) -> Callable[[Params], Params]:
    """Return a function that copies the policy's newest weights to where ``decode_specs`` wants
    them.

    They are cast where they lie, then dealt out.
    """
    cast = jax.jit(functools.partial(_decode_params, model))

    def reshard(params: Params) -> Params:
        specs = decode_specs(model, params, mesh)
        return jax.device_put(cast(params), jax.tree.map(operator.attrgetter("sharding"), specs))

    return reshard
