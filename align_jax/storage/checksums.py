# SPDX-License-Identifier: Apache-2.0
"""Is a tree of arrays what it was?  Fingerprints of whole arrays, which do not depend on the
sharding, and of each device's part of them; differences by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# What a store says when it is the store that is in trouble, not the checkpoint.
TRANSIENT = (
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "RESOURCE_EXHAUSTED",
    "PERMISSION_DENIED",
    "UNAUTHENTICATED",
    "ABORTED",
    "Permission denied",
    "Input/output error",
    "timed out",
)


def checksums(tree: Any) -> dict[str, int]:
    """Sum every array's bits, weighted by place, modulo 2^32; the same for any sharding of the same
    values.

    Any single flipped bit changes the sum: each weight is odd, so its product with a power of two
    is not 0 modulo 2^32.

    Returns:
        The array's path in the tree (``params/layers/kernel``) -> its sum.
    """
    leaves = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    meshes = [
        leaf.sharding.mesh
        for leaf in leaves.values()
        if hasattr(getattr(leaf, "sharding", None), "mesh")
    ]
    everywhere = (
        jax.sharding.NamedSharding(meshes[0], jax.sharding.PartitionSpec()) if meshes else None
    )
    sums = jax.device_get(_bit_sums(everywhere)(list(leaves.values())))
    return dict(zip(leaves, map(int, sums)))


@functools.lru_cache
def _bit_sums(sharding: jax.sharding.Sharding | None) -> Callable[..., jax.Array]:
    return jax.jit(
        lambda arrays: jnp.stack([_bit_sum(array) for array in arrays]), out_shardings=sharding
    )


def shard_checksums(arrays: Sequence[jax.Array]) -> dict[jax.Device, list[int]]:
    """Sum the bits of each device's own part of the arrays, as `checksums` does those of whole
    arrays.

    Every process makes the same call; nothing travels between the devices.

    Args:
        arrays: all on one mesh.

    Returns:
        This process's device -> a sum for each array, modulo 2^32.
    """
    sums = _shard_sums(arrays[0].sharding.mesh, tuple(array.sharding.spec for array in arrays))(
        list(arrays)
    )
    return {shard.device: np.asarray(shard.data)[0].tolist() for shard in sums.addressable_shards}


@functools.lru_cache
def _shard_sums(
    mesh: jax.sharding.Mesh, specs: tuple[jax.sharding.PartitionSpec, ...]
) -> Callable[..., jax.Array]:
    return jax.jit(
        jax.shard_map(  # -> [devices, arrays]
            lambda arrays: jnp.stack([_bit_sum(array) for array in arrays])[None],
            mesh=mesh,
            in_specs=(list(specs),),
            out_specs=jax.sharding.PartitionSpec(mesh.axis_names),
            check_vma=False,
        )
    )


def bits_of(array: jax.Array) -> jax.Array:
    """Return an array's bits as unsigned integers of its width (a bool's as a byte)."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint8)
    width = min(jnp.dtype(array.dtype).itemsize, 4)
    return jax.lax.bitcast_convert_type(array, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width])


def _bit_sum(array: jax.Array) -> jax.Array:
    bits = bits_of(array).astype(jnp.uint32)
    weight = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        prime_power = jnp.uint32(2 * (7919 ** (axis + 1) % 2**30))
        weight = weight + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * prime_power
    return jnp.sum(bits * (weight | jnp.uint32(1)), dtype=jnp.uint32)


def leaf_name(path: tuple[Any, ...]) -> str:
    """Write a leaf's path in a tree with slashes: ``params/layers/kernel``."""
    return "/".join(
        str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path
    )


def differences(saved: Any, wanted: Any) -> list[str]:
    """Compare the arrays' names, shapes and dtypes of two trees (of arrays, or of anything with
    shape and dtype).

    Containers do not matter, only the names of the leaves: a tuple read back as a list is no
    difference.

    Returns:
        One line for each difference, which says what was saved and what is wanted; empty: the trees
        agree.
    """
    there = {leaf_name(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(saved)}
    here = {leaf_name(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(wanted)}
    problems = [f"{name}: not in the checkpoint" for name in here if name not in there]
    problems += [
        f"{name}: in the checkpoint, but not in this run's state"
        for name in there
        if name not in here
    ]
    problems += [
        f"{name}: saved as {there[name].dtype}{list(there[name].shape)}, this run has "
        f"{here[name].dtype}{list(here[name].shape)}"
        for name in here
        if name in there
        and (tuple(there[name].shape), there[name].dtype)
        != (tuple(here[name].shape), here[name].dtype)
    ]
    return problems


def is_transient(error: Exception) -> bool:
    """Tell trouble with the store, which may pass, from damage, which stays."""
    known = isinstance(error, (PermissionError, ConnectionError, TimeoutError, MemoryError))
    return known or any(word in str(error) for word in TRANSIENT)
