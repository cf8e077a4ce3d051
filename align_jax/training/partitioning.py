# SPDX-License-Identifier: Apache-2.0
"""Where everything lies on the mesh, and the steps compiled for it.

roles        ── trainable ───────┐                  ┌─ shardings of the state
logical axes ── tree_shardings ──┴─ abstract_state ─┤
                                                    └─ jit_train_step / lower_train_step
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Container, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from align_jax.core.schema import Batch
from align_jax.core.tree import flatten, unflatten
from align_jax.models.roles import role_of
from align_jax.parallel.lowering import lower
from align_jax.parallel.sharding import is_axes, row_sharding, tree_shardings
from align_jax.training import optim
from align_jax.training.steps import (
    StepSpec,
    eval_statistics,
    eval_step,
    init_state,
    reference_step,
    train_step,
)

Tree = Any


def trainable(
    params: Tree,
    roles: Tree,
    *,
    adapter: bool,
    freeze: Sequence[str] = (),
    whole: Container[str] = (),
) -> tuple[Tree, Tree]:
    """Divide a tree of parameters (or of shapes, or axes) into what is trained and the rest.

    Args:
        params: the policy's whole tree.
        roles: its tree of roles.
        adapter: train the low-rank adapters and the heads alone.
        freeze: regular expressions; parameters whose path one of them matches (search) are not
            trained.
        whole: paths that are trained beside an adapter.

    Returns:
        Two nested dicts that share no leaf; ``merge`` of them is the whole.

    Raises:
        ValueError: a pattern that matches no parameter, or nothing left to train.
    """
    leaves, known = flatten(params), flatten(roles)
    for pattern in freeze:
        if not any(re.search(pattern, path) for path in leaves):
            raise ValueError(
                f"config.model.freeze: {pattern!r} matches no parameter; paths are like "
                f"{min(leaves)!r}"
            )
    trained = {
        path: leaf
        for path, leaf in leaves.items()
        if (not adapter or role_of(known, path).beside_base or path in whole)
        and not any(re.search(pattern, path) for pattern in freeze)
    }
    if not trained:
        raise ValueError(
            f"nothing is left to train: config.model.freeze = {tuple(freeze)} matches every "
            "parameter"
        )
    return unflatten(trained), unflatten(
        {path: leaf for path, leaf in leaves.items() if path not in trained}
    )


def select(tree: Tree, like: Tree) -> Tree:
    """Take from a nested dict the leaves whose paths another one has."""
    leaves = flatten(tree)
    return unflatten({path: leaves[path] for path in flatten(like)})


def with_shardings(shapes: Tree, shardings: Tree) -> Tree:
    """Attach shardings to a tree of shapes: what is lowered, and what is restored into."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def abstract_params(mesh: Mesh, shapes: Tree, axes: Tree) -> Tree:
    """Return parameters' shapes with the shardings that their logical axes have on this mesh."""
    leaves, names = flatten(shapes), flatten(axes)
    if missing := sorted(leaves.keys() - names.keys()):
        raise ValueError(f"parameters without logical axes: {missing}")
    for path, leaf in leaves.items():
        if not is_axes(names[path]) or len(names[path]) != len(leaf.shape):
            raise ValueError(
                f"parameter {path} has shape {leaf.shape} and logical axes {names[path]}"
            )
    return with_shardings(shapes, tree_shardings(mesh, select(axes, shapes)))


def check_divisible(params: Tree) -> None:
    """Raise a ValueError that lists every parameter whose mesh axes do not divide it."""
    wrong = []
    for path, leaf in flatten(params).items():
        try:
            leaf.sharding.shard_shape(leaf.shape)
        except ValueError:
            wrong.append(f"{path} {leaf.shape} over {leaf.sharding.spec}")
    if wrong:
        raise ValueError(
            "the mesh does not divide these parameters (choose other sizes in "
            "config.mesh):\n  " + "\n  ".join(wrong)
        )


def abstract_state(spec: StepSpec, params: Tree, mesh: Mesh) -> Tree:
    """Return the state's shapes with their shardings: the optimizer's state as its parameters, the
    rest replicated.

    Args:
        spec: what the step is compiled from.
        params: trained parameters' shapes with shardings.
        mesh: the mesh.
    """
    shapes = jax.eval_shape(functools.partial(init_state, spec), params)
    own = jax.tree.map(lambda x: x.sharding, params)
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda _: replicated, shapes)
    shardings["params"] = own
    shardings["opt_state"] = optim.state_shardings(spec.optimizer, params, own, mesh)
    if "reference" in shardings:
        shardings["reference"] = own
    return with_shardings(shapes, shardings)


def abstract_batch(mesh: Mesh, batch: Batch) -> Batch:
    """Return a global batch's shapes with their sharding, from arrays or shapes."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=row_sharding(mesh)), batch
    )


def jit_train_step(
    spec: StepSpec, state: Tree, mesh: Mesh
) -> Callable[[Tree, Tree, Batch], tuple[Tree, Any]]:
    """Return the compiled train step; the state is donated and keeps its shardings.

    Args:
        spec: what the step is compiled from.
        state: from ``abstract_state``.
        mesh: the mesh.
    """
    out = (jax.tree.map(lambda x: x.sharding, state), NamedSharding(mesh, PartitionSpec()))
    return jax.jit(functools.partial(train_step, spec), donate_argnums=0, out_shardings=out)


def jit_eval_step(spec: StepSpec, mesh: Mesh) -> Callable[..., Any]:
    """Return the compiled eval step; nothing is donated."""
    return jax.jit(
        functools.partial(eval_step, spec), out_shardings=NamedSharding(mesh, PartitionSpec())
    )


def jit_eval_statistics(spec: StepSpec, mesh: Mesh) -> Callable[[Tree, Tree, Batch], Any]:
    """Return the compiled first pass of an evaluation."""
    return jax.jit(
        functools.partial(eval_statistics, spec), out_shardings=NamedSharding(mesh, PartitionSpec())
    )


def jit_reference_step(spec: StepSpec) -> Callable[[Tree, Batch], jax.Array]:
    """Return the compiled reference step, which fills the cache of the reference's
    log-probabilities."""
    return jax.jit(functools.partial(reference_step, spec))


def lower_train_step(
    spec: StepSpec, state: Tree, frozen: Tree, batch: Batch, mesh: Mesh, platform: str | None = None
) -> jax.stages.Lowered:
    """Lower the very train step of a run.

    Args:
        spec: what the step is compiled from.
        state: from ``abstract_state``.
        frozen: shapes with shardings.
        batch: from ``abstract_batch``.
        mesh, platform: as ``lower`` takes them.
    """
    return lower(jit_train_step(spec, state, mesh), mesh, state, frozen, batch, platform=platform)
