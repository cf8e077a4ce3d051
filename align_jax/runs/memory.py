# SPDX-License-Identifier: Apache-2.0
"""Whether a run can fit at all: bytes counted from shapes, before any are asked for.

The count is from below: what a step must hold, whatever the compiler does.  ``align_jax.plan`` says
what it takes indeed.
"""

from __future__ import annotations

import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from align_jax.core.options import Config
from align_jax.core.schema import Batch
from align_jax.models.config import ModelConfig
from align_jax.parallel.chips import GIB
from align_jax.parallel.mesh import row_shards


def capacity(mesh: Mesh) -> int:
    """Return the bytes that each device of a mesh has; CPU devices share their host's."""
    mine = [one for one in mesh.devices.flat if one.process_index == jax.process_index()]
    known = (mine[0].memory_stats() or {}).get("bytes_limit")
    return known or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(mine)


def _on_device(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def check_weights(weights: Any, mesh: Mesh, path: str, nearest: str = "") -> None:
    """Refuse a checkpoint whose weights no device of a mesh can hold.

    Args:
        weights: as shapes with shardings.
        mesh: where they are to lie.
        path: of the checkpoint, for the message.
        nearest: what else would help, for the message.

    Raises:
        ValueError: what a device must hold, and what it has.
    """
    needed, has = sum(map(_on_device, jax.tree.leaves(weights))), capacity(mesh)
    if needed > has:
        raise ValueError(
            f"the weights of {path} take {needed / GIB:,.1f} GiB on each of {mesh.size} devices, "
            f"which has {has / GIB:,.1f} GiB: take a smaller model or more devices{nearest}"
        )


def check(config: Config, model: ModelConfig, held: Any, batch: Batch, mesh: Mesh) -> None:
    """Refuse sizes that no device of a mesh can hold.

    Args:
        config: of the run.
        model: the policy's.
        held: all that stays on the devices between steps, as shapes with shardings.
        batch: a step's, of the whole mesh, as shapes.
        mesh: where it runs.

    Raises:
        ValueError: what a device must hold at least, by part, and what it has.
    """
    parts = row_shards(mesh)
    rows, length = batch.tokens.shape
    weights = sum(map(_on_device, jax.tree.leaves(held)))
    tokens = sum(math.prod(one.shape) * one.dtype.itemsize for one in jax.tree.leaves(batch))
    # the backward pass finds each layer's input at least; a frozen layer may need none
    layers = 1 if config.model.freeze else model.num_layers
    width = model.num_streams * model.hidden_size * jnp.dtype(config.model.compute_dtype).itemsize
    at_once = parts * config.microbatches * mesh.shape["sequence"]
    inputs = rows * length * width * layers / at_once
    needed, has = weights + tokens / parts + inputs, capacity(mesh)
    if needed <= has:
        return
    raise ValueError(
        f"a step takes at least {needed / GIB:,.1f} GiB on each of {mesh.size} devices, which has "
        f"{has / GIB:,.1f} GiB: {weights / GIB:,.1f} of weights and optimizer, "
        f"{tokens / parts / GIB:,.1f} of a batch of {rows:,} rows of {length:,} tokens, "
        f"{inputs / GIB:,.1f} of the inputs of {layers:,} layers; lower config.batch_size or "
        "config.max_length, raise config.microbatches, take a smaller model or more devices"
    )
