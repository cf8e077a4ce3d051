# SPDX-License-Identifier: Apache-2.0
"""A held-out set's loss and metrics: sums over all of it, divided once.

batches ─ statistics of the whole set (where an objective has any) ─┐
batches ──────────────────────────────────────────── eval step ─────┴─ sums ─ means
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from align_jax import losses
from align_jax.core import metrics
from align_jax.core.choose import nearest
from align_jax.core.options import EvalOptions
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


class Stopping(NamedTuple):
    """What early stopping remembers; a checkpoint keeps it, so that a resumed run stops where the
    whole one does.

    Attributes:
        best: the best value of ``eval.stop_metric`` so far, its sign turned where smaller is
            better; None before the first.
        step: of that evaluation.
        misses: evaluations since then.
    """

    best: float | None = None
    step: int = 0
    misses: int = 0

    def after(self, step: int, values: Mapping[str, float], options: EvalOptions) -> Stopping:
        """Return what is remembered after an evaluation.

        Raises:
            ValueError: the evaluation does not give the metric; known ones are named.
        """
        if not options.stop_metric:
            return self
        name = options.stop_metric.removeprefix("-")
        if name not in values:
            raise ValueError(
                f"config.eval.stop_metric = {options.stop_metric!r} is not among the evaluation's "
                f"metrics{nearest(name, sorted(values))}"
            )
        value = -values[name] if options.stop_metric.startswith("-") else values[name]
        if math.isfinite(value) and (self.best is None or value > self.best + options.least_gain):
            return Stopping(value, step)
        return self._replace(misses=self.misses + 1)

    def is_spent(self, options: EvalOptions) -> bool:
        """Tell whether the run is to stop."""
        return bool(options.stop_metric) and self.misses >= options.patience

    def words(self, options: EvalOptions) -> str:
        """Say why it stops."""
        sign = -1 if options.stop_metric.startswith("-") else 1
        return (
            f"stopped early: {options.stop_metric.removeprefix('-')} has not been better than "
            f"{sign * (self.best or 0.0):.4g} (step {self.step}) in {self.misses} evaluations "
            "(config.eval.patience)"
        )
