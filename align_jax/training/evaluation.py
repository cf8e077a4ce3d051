# SPDX-License-Identifier: Apache-2.0
"""A held-out set's loss and metrics: sums over all of it, divided once.

batches ─ statistics of the whole set (where an objective has any) ─┐
batches ──────────────────────────────────────────── eval step ─────┴─ sums ─ means
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from align_jax import losses
from align_jax.core import metrics
from align_jax.core.schema import Batch
from align_jax.training import partitioning
from align_jax.training.steps import StepSpec, part

Tree = Any


def make_evaluation(
    spec: StepSpec, mesh: Mesh, batches: Callable[[], Iterable[Batch]]
) -> Callable[[Tree, Tree], dict[str, float]]:
    """Return a function from (state, frozen) to the set's means.

    They do not depend on how the set is cut into batches.

    Args:
        spec: what the steps are compiled from.
        mesh: the mesh.
        batches: gives the set's batches, on the mesh, each time anew.
    """
    step = partitioning.jit_eval_step(spec, mesh)
    share = partitioning.jit_eval_statistics(spec, mesh)
    reduce = jax.jit(functools.partial(losses.reduce_statistics, spec.terms))

    def evaluate(state: Tree, frozen: Tree) -> dict[str, float]:
        stats: Tree = None
        if spec.wants_statistics:
            shares = [share(state, frozen, batch) for batch in batches()]
            found = jax.tree.map(lambda *x: jnp.stack(x), *shares)
            stats, _ = reduce(found, state["running"])
        sums: metrics.Sums | None = None
        for number, batch in enumerate(batches()):
            own = None if stats is None else part(stats, number)
            sums = metrics.add_sums(sums, step(state, frozen, batch, own))
        return metrics.means(sums or {})

    return evaluate
