# SPDX-License-Identifier: Apache-2.0
"""The least that sharding must move: bytes that each device receives in a step, counted from shapes
alone.

    fsdp       gathers each weight for each forward and each backward pass, and scatters its gradient
    data       (and expert, sequence, for weights that they do not split) reduces what is left of the gradients
    tensor     sums the partial results of attention and of the feed-forward part, and their gradients
    sequence   gathers keys and values, and scatters their gradients
    expert     gathers the tokens of its rows, and scatters what the experts add to them

Everything travels in the compute type (codes of a quantized base: as they are) by bandwidth-optimal
rings.  Left out is what counts tokens and not their features: the statistics of logits that are
split over the vocabulary, routing.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from align_jax.core.schema import Batch
from align_jax.models.lora import merge
from align_jax.models.model import Model
from align_jax.parallel.mesh import ROWS
from align_jax.training.initialize import StateSpecs
from align_jax.training.steps import StepSpec

Tree = Any


class Pass(NamedTuple):
    """One model's run over rows.

    Attributes:
        model: the model.
        params: its parameters, shapes with shardings.
        rows, length: N and T, of the whole mesh.
        positions: P, loss positions of a row; their gradient flows into the hidden states.
        backward: gradients are taken.
        parts: microbatches: each sees all weights once.
    """

    model: Model
    params: Tree
    rows: int
    length: int
    positions: int
    backward: bool = False
    parts: int = 1


def passes(spec: StepSpec, specs: StateSpecs, batch: Batch, *, train: bool = True) -> list[Pass]:
    """List the runs over rows that a step has.

    Args:
        spec: what the step is compiled from.
        specs: what lies where.
        batch: the global batch, or its shapes.
        train: false: the eval step, which has no gradients and no microbatches.
    """
    policy, parts = merge(specs.base, specs.trained), spec.microbatches if train else 1
    reference = specs.base if specs.reference is None else specs.reference
    if spec.sync_every_steps:
        reference = policy

    def run(model: Model, params: Tree, part: Batch, backward: bool = False) -> Pass:
        return Pass(model, params, *part.tokens.shape, part.loss_index.shape[1], backward, parts)

    found = [run(spec.policy, policy, batch, train)]
    if spec.wants_reference and batch.reference_token_logps is None:
        found.append(run(spec.base, reference, batch))
    if spec.measured and parts > 1:
        found.append(run(spec.policy, policy, batch))
    if spec.measured and batch.mismatched is not None:
        found.append(run(spec.policy, policy, batch.mismatched))
        found += [run(spec.base, reference, batch.mismatched)] if spec.wants_reference else []
    return found


def least(
    runs: Sequence[Pass], mesh: Mapping[str, int], trained: Tree = (), parts: int = 1
) -> dict[str, float]:
    """Return the least bytes that a device receives, by mesh axes as ``collectives.summarize``
    names them.

    Args:
        runs: over which rows each model runs.
        mesh: axis -> size.
        trained: the parameters that get gradients, shapes with shardings.
        parts: microbatches that each scatter them.
    """
    total: collections.Counter[str] = collections.Counter()
    for run in runs:
        for axis, size in _activations(run, mesh).items():
            total[axis] += size
        again = run.backward and run.model.options.remat != "none"  # else what was gathered is kept
        total["fsdp"] += run.parts * (2 if again else 1) * _gathered(run, mesh)
    if runs:
        itemsize = np.dtype(runs[0].model.options.dtype).itemsize
        for axes, size in _gradients(trained, mesh, itemsize, parts).items():
            total[axes] += size
    return {axes: float(size) for axes, size in total.items() if size}


def _split(leaf: Any) -> set[str]:
    """Return the mesh axes that split an array."""
    axes: set[str] = set()
    for entry in leaf.sharding.spec:
        axes |= set() if entry is None else {entry} if isinstance(entry, str) else set(entry)
    return axes


def _local(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape))


def _gathered(run: Pass, mesh: Mapping[str, int]) -> int:
    """Bytes of weights that a device lacks, once."""
    itemsize = np.dtype(run.model.options.dtype).itemsize
    return (mesh["fsdp"] - 1) * sum(
        _local(leaf) * min(itemsize, np.dtype(leaf.dtype).itemsize)
        for leaf in jax.tree.leaves(run.params)
        if "fsdp" in _split(leaf)
    )


def _gradients(
    trained: Tree, mesh: Mapping[str, int], itemsize: int, parts: int
) -> dict[str, float | int]:
    """Scatter over fsdp in each microbatch; reduce over the other axes that split the tokens,
    once."""
    total: collections.Counter[str] = collections.Counter()
    for leaf in jax.tree.leaves(trained):
        split = _split(leaf)
        if "fsdp" in split:
            total["fsdp"] += parts * (mesh["fsdp"] - 1) * _local(leaf) * itemsize
        others = [axis for axis in (*ROWS, "sequence") if axis not in split and mesh[axis] > 1]
        shared = math.prod(mesh[axis] for axis in others)
        total["+".join(axis for axis in mesh if axis in others)] += (
            2 * (1 - 1 / shared) * _local(leaf) * itemsize
        )
    return total


def _activations(run: Pass, mesh: Mapping[str, int]) -> dict[str, float | int]:
    """Count what moves with the tokens: over tensor, sequence and expert."""
    config, remat, backward = run.model.config, run.model.options.remat, run.backward
    itemsize = np.dtype(run.model.options.dtype).itemsize
    shards, length = math.prod(mesh[axis] for axis in ROWS), run.length / mesh["sequence"]
    rows, L, tensor = run.rows / shards, config.num_layers, mesh["tensor"]
    states = rows * length * config.hidden_size * itemsize  # of one layer, on one device
    # forward; what the backward pass computes anew and does not find saved; backward
    again = int(backward and remat in ("full", "attention"))
    sums = 1 if config.parallel_residual else 2
    reduced = states * (L * (sums + (sums - 1) * again + sums * backward) + 1)
    reduced += rows * run.positions / mesh["sequence"] * config.hidden_size * itemsize * backward
    heads = max(1.0, config.num_kv_heads / tensor)
    keys = 2 * rows * run.length * heads * config.head_dim * itemsize * L
    kept = int(backward and remat != "none")
    tokens = states * L * (mesh["expert"] - 1) if config.num_experts else 0.0
    return {
        "tensor": 2 * (1 - 1 / tensor) * reduced,
        "sequence": (1 - 1 / mesh["sequence"]) * keys * (1 + kept + backward),
        "expert": tokens * (2 + again + 2 * backward),
    }
