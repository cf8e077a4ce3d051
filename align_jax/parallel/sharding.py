# SPDX-License-Identifier: Apache-2.0
"""From logical axes to mesh axes.

A parameter's axes have names ("embed", "heads", ...), kept as a tree beside the parameters.
``RULES`` says which mesh axes split each name; a name without a rule is an error, so no parameter
is replicated by oversight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from align_jax.parallel.mesh import ROWS

RULES: Mapping[str, tuple[str, ...]] = {
    # parameters
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head": (),
    "ffn": ("tensor",),
    "experts": ("expert",),
    "norm": (),
    "latent": (),
    "rank": (),
    "positions": (),
    "score": (),
    # activations
    "rows": ROWS,
    "length": ("sequence",),
    "features": (),
}


def spec(
    axes: tuple[str | None, ...], rules: Mapping[str, tuple[str, ...]] = RULES
) -> PartitionSpec:
    """Return the partition of an array whose axes have these logical names (None: not split).

    Raises:
        KeyError: a name without a rule, or a mesh axis that would split two of the array's axes.
    """
    entries: list[str | tuple[str, ...] | None] = []
    used: set[str] = set()
    for name in axes:
        if name is not None and name not in rules:
            raise KeyError(
                f"no sharding rule for the logical axis {name!r} in {axes}; known: {sorted(rules)}"
            )
        mesh_axes = () if name is None else rules[name]
        if used & set(mesh_axes):
            raise KeyError(
                f"logical axes {axes}: mesh axes {sorted(used & set(mesh_axes))} would be used "
                "twice"
            )
        used |= set(mesh_axes)
        entries.append(
            None if not mesh_axes else mesh_axes[0] if len(mesh_axes) == 1 else tuple(mesh_axes)
        )
    return PartitionSpec(*entries)


def is_axes(node: Any) -> bool:
    """Tell whether a node of an axes tree is a leaf: a tuple of names."""
    return isinstance(node, tuple) and all(name is None or isinstance(name, str) for name in node)


def tree_shardings(
    mesh: Mesh | AbstractMesh, axes: Any, rules: Mapping[str, tuple[str, ...]] = RULES
) -> Any:
    """Map a tree of logical axes to a tree of shardings."""
    return jax.tree.map(
        lambda names: NamedSharding(mesh, spec(names, rules)), axes, is_leaf=is_axes
    )


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation's sharding under the ambient mesh (``jax.set_mesh``); without a mesh, do
    nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


def spread(x: jax.Array, *axes: str | None) -> jax.Array:
    """Lay a copy of an array on every shard of the rows: ``[...] -> [G, ...]``, under the ambient
    mesh (else G = 1).

    For weights that a loop uses: they are gathered once, and what each turn adds to their gradient
    stays on its device until the copies' gradients are summed after the loop.  The gradient of one
    array would be summed over the devices in every turn.

    Args:
        x: the array.
        axes: the logical axes that stay split, None or "features" for those that are gathered.
    """
    mesh = jax.sharding.get_abstract_mesh()
    copies = math.prod(mesh.shape[axis] for axis in ROWS) if not mesh.empty else 1
    return constrain(jnp.broadcast_to(constrain(x, *axes), (copies, *x.shape)), "rows", *axes)


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of every batch array: its first axis over the row axes of the mesh."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """Copy this process's share of a batch to the devices as global arrays: the only host-to-device
    copy.

    Args:
        mesh: the mesh.
        batch: a Batch of numpy arrays, this process's rows only; every leading axis is split over
            the row axes.
    """
    sharding = row_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
    )
