# SPDX-License-Identifier: Apache-2.0
"""Is a tree of arrays what it was?  Checksums of whole arrays, whatever their sharding, and of each
device's shards; what differs, by name."""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def checksums(tree: Any) -> dict[str, int]:
    """Sum every array's bits, weighted by position, modulo 2^32; the same for any sharding.

    Any single flipped bit changes the sum: each weight is odd, so its product with a power of two
    is not 0 modulo 2^32.

    Returns:
        The array's path in the tree (``params/layers/kernel``) -> its sum.
    """
    leaves = named_leaves(tree)
    shardings = [getattr(leaf, "sharding", None) for leaf in leaves.values()]
    mesh = next((one.mesh for one in shardings if isinstance(one, NamedSharding)), None)
    replicated = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    sums = jax.device_get(_bit_sums(replicated)(list(leaves.values())))
    return dict(zip(leaves, map(int, sums)))


def json_checksum(value: Any) -> int:
    """Sum a JSON value, whatever the order of its keys."""
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True)
    return zlib.crc32(text.encode())


def is_sound_extra(record: Mapping[str, Any]) -> bool:
    """Tell whether the JSON beside the arrays is what was saved; earlier records do not tell."""
    found = json_checksum(record["extra"])
    return record.get("extra_checksum", found) == found


def shard_checksums(arrays: Sequence[jax.Array]) -> dict[jax.Device, list[int]]:
    """Sum the bits of each device's own shards, as `checksums` does those of whole arrays.

    Every process makes the same call; nothing travels between the devices.

    Args:
        arrays: all on one mesh.

    Returns:
        This process's device -> a sum for each array, modulo 2^32.
    """
    shardings: list[Any] = [array.sharding for array in arrays]  # NamedSharding
    specs = tuple(sharding.spec for sharding in shardings)
    sums = _shard_sums(shardings[0].mesh, specs)(list(arrays))
    return {shard.device: np.asarray(shard.data)[0].tolist() for shard in sums.addressable_shards}


# Compiled once a sharding, not once a save.
@functools.lru_cache
def _bit_sums(sharding: NamedSharding | None) -> Callable[[list[jax.Array]], jax.Array]:
    return jax.jit(_stacked_sums, out_shardings=sharding)


@functools.lru_cache
def _shard_sums(
    mesh: Mesh, specs: tuple[PartitionSpec, ...]
) -> Callable[[list[jax.Array]], jax.Array]:
    def on_device(shards: list[jax.Array]) -> jax.Array:
        return _stacked_sums(shards)[None]

    return jax.jit(
        jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(list(specs),),
            out_specs=PartitionSpec(mesh.axis_names),  # [devices, arrays]
            check_vma=False,
        )
    )


def _stacked_sums(arrays: list[jax.Array]) -> jax.Array:
    return jnp.stack([_bit_sum(array) for array in arrays])


def _bit_sum(array: jax.Array) -> jax.Array:
    bits = bits_of(array).astype(jnp.uint32)
    # An even number along each axis, so that swapped elements show; the last bit makes it odd.
    weight = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        prime_power = jnp.uint32(2 * (7919 ** (axis + 1) % 2**30))
        weight = weight + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * prime_power
    return jnp.sum(bits * (weight | jnp.uint32(1)), dtype=jnp.uint32)


def bits_of(array: jax.Array) -> jax.Array:
    """Return an array's bits as unsigned integers of its width (a bool's as a byte)."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint8)
    width = min(jnp.dtype(array.dtype).itemsize, 4)
    return jax.lax.bitcast_convert_type(array, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width])


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return a tree's leaves by their paths, written with slashes: ``params/layers/kernel``."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def leaf_name(path: tuple[Any, ...]) -> str:
    """Write a leaf's path in a tree with slashes."""
    return "/".join(
        str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path
    )


def differences(saved: Any, wanted: Any) -> list[str]:
    """Compare the names, shapes and dtypes of the leaves of two trees; containers do not matter.

    Returns:
        One line for each difference, which says what was saved and what is wanted.
    """
    there, here = named_leaves(saved), named_leaves(wanted)
    problems = [f"{name}: not in the checkpoint" for name in here if name not in there]
    problems += [
        f"{name}: in the checkpoint, but not in this run's state"
        for name in there
        if name not in here
    ]
    for name in here:
        if name in there and _form(there[name]) != _form(here[name]):
            problems.append(
                f"{name}: saved as {_form(there[name])}, this run has {_form(here[name])}"
            )
    return problems


def _form(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"
