# SPDX-License-Identifier: Apache-2.0
"""The one reduction: a weighted sum of objectives over the whole global batch, divided once.

    total = Σ_k weight_k · (Σ_i losses_ki · weights_ki) / (Σ_i weights_ki)        k terms, i groups

The denominators depend on the batch alone, so each microbatch gives its share of the loss, and the
result does not depend on how the batch was split over devices and microbatches.  The train step,
the eval step and the functions for notebooks all call ``total``.

    Inputs ─┬─► batch_statistics (each microbatch, no gradient) ──► reduce_statistics (once) ─┐
            └─► total (each microbatch) ◄──────────────────────── stats ──────────────────────┘
                                                        only where a term needs a statistic
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from align_jax.core.schema import Batch
from align_jax.losses.objective import Inputs, Metrics, StatisticsLoss, Term, Tree


class Total(NamedTuple):
    """The loss of some groups of a batch, and what it is made of.

    Attributes:
        loss: these groups' share of the batch's loss.
        sums: per term (its weight times Σ losses · weights, Σ weights) over these groups: added up
            over batches and then divided, they give the loss of all of them.
        losses, weights: of each group.
        metrics: (sum, weight) pairs; where two terms report one quantity, the first one's.
    """

    loss: Float[Array, ""]
    sums: tuple[Float[Array, "K"], Float[Array, "K"]]
    losses: Float[Array, "K B"]
    weights: Float[Array, "K B"]
    metrics: Metrics


def weights(terms: Sequence[Term], batch: Batch) -> Float[Array, "K B"]:
    """Return each term's weights of the groups, which no model has a say in."""
    return jnp.stack([term.loss.weights(batch) for term in terms])


def total(
    terms: Sequence[Term],
    inputs: Inputs,
    stats: Tree = None,
    denominators: Float[Array, "K"] | None = None,
) -> Total:
    """Compute a weighted sum of objectives.

    Args:
        terms: from ``resolve``.
        inputs: what the models say of some groups of a batch.
        stats: the batch's statistics, by term; see ``own_statistics``.
        denominators: each term's sum of weights over the whole batch; None: these groups are the
            whole batch.

    Raises:
        ValueError: a term needs a reference or statistics and got none.
    """
    tops, losses, weighed = [], [], weights(terms, inputs.batch)
    metrics: Metrics = {}
    bottoms = weighed.sum(axis=1)
    for index, term in enumerate(terms):
        found, reported = _apply(term, inputs._replace(stats=(stats or {}).get(str(index))))
        weighted_sum = (found * weighed[index]).sum()
        tops.append(term.weight * weighted_sum)
        losses.append(found)
        if len(terms) > 1:
            reported = {**reported, f"loss/{term.name}": (weighted_sum, bottoms[index])}
        metrics = reported | metrics
    sums = jnp.stack(tops), bottoms
    loss = quotient(sums[0], bottoms if denominators is None else denominators)
    return Total(loss, sums, jnp.stack(losses), weighed, jax.lax.stop_gradient(metrics))


def quotient(sums: Float[Array, "K"], denominators: Float[Array, "K"]) -> Float[Array, ""]:
    """Divide, once: a term without any weight gives 0."""
    return (sums / jnp.maximum(denominators, 1e-8)).sum()


def _apply(term: Term, inputs: Inputs) -> tuple[Float[Array, "B"], Metrics]:
    """Compute a term's losses and metrics."""
    if term.loss.uses_statistics and inputs.stats is None:
        raise ValueError(
            f"objective {term.name!r} needs stats of the whole batch: see losses.own_statistics"
        )
    with jax.named_scope(f"objective_{term.name}"):
        return term.loss.losses(term.clamped(inputs))


def _with_statistics(terms: Sequence[Term]) -> Iterator[tuple[int, Term, StatisticsLoss]]:
    for index, term in enumerate(terms):
        if isinstance(term.loss, StatisticsLoss) and term.loss.uses_statistics:
            yield index, term, term.loss


def needs_statistics(terms: Sequence[Term]) -> bool:
    """Tell whether any term depends on statistics of the whole batch."""
    return any(True for _ in _with_statistics(terms))


def first_running(terms: Sequence[Term]) -> Tree:
    """Return the running statistics of step 0, by term."""
    return {
        str(index): {name: jnp.asarray(value) for name, value in loss.running.items()}
        for index, _, loss in _with_statistics(terms)
    }


def batch_statistics(terms: Sequence[Term], inputs: Inputs) -> Tree:
    """Return a microbatch's share of the statistics, by term, and the groups' weights.

    Raises:
        ValueError: a term needs the outputs of ``batch.mismatched`` and got none.
    """
    found, inputs = {}, jax.lax.stop_gradient(inputs)
    for index, term, loss in _with_statistics(terms):
        if loss.mismatched and inputs.mismatched is None:
            raise ValueError(f"objective {term.name!r} needs the outputs of batch.mismatched")
        share = loss.batch_statistics(term.clamped(inputs))
        found[str(index)] = share, loss.weights(inputs.batch)
    return found


def reduce_statistics(terms: Sequence[Term], found: Tree, running: Tree) -> tuple[Tree, Tree]:
    """Reduce the shares of all microbatches, stacked along a first axis.

    Returns:
        The statistics, by term, with that axis first again, and the next step's running ones.
    """
    stats, after = {}, {}
    for index, _, loss in _with_statistics(terms):
        key = str(index)
        share, group_weights = found[key]
        stats[key], after[key] = loss.reduce_statistics(share, group_weights, running[key])
    return stats, after


def own_statistics(
    terms: Sequence[Term], inputs: Inputs, running: Tree = None
) -> tuple[Tree, Tree]:
    """Compute the statistics of a whole batch that is in one piece.

    Args:
        terms: from ``resolve``.
        inputs: of all the batch's groups.
        running: the running statistics; None: those of step 0.

    Returns:
        The statistics for ``total``, and the next step's running ones.
    """
    running = first_running(terms) if running is None else running
    found = jax.tree.map(lambda x: x[None], batch_statistics(terms, inputs))
    stats, after = reduce_statistics(terms, found, running)
    return jax.tree.map(lambda x: x[0], stats), after
