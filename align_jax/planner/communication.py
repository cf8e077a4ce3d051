# SPDX-License-Identifier: Apache-2.0
"""The communication lower bound: bytes that each device must receive in a step, whatever the
compiler does, counted from shapes alone.

    fsdp       gathers each weight for each forward and each backward pass, and scatters its
               gradient
    data       (and expert, sequence, for weights that they do not split) reduces what is left of
               the gradients
    tensor     sums the partial results of attention and of the feed-forward part, and their
               gradients
    sequence   gathers keys and values, and scatters their gradients
    expert     gathers the tokens of its rows, and scatters what the experts add to them

Everything travels in the compute type (codes of a quantized base: as they are) by bandwidth-optimal
rings.  Left out is what counts tokens and not their features: the statistics of logits that are
split over the vocabulary, routing.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Iterator, Mapping
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


class ModelCall(NamedTuple):
    """One model applied to rows: a forward pass, perhaps a backward pass too.

    Attributes:
        model: the model.
        params: its parameters, shapes with shardings.
        rows, length: N and T, of the whole mesh.
        positions: P, loss positions of a row; their gradient flows into the hidden states.
        backward: gradients are taken.
        microbatches: each sees all weights once.
    """

    model: Model
    params: Tree
    rows: int
    length: int
    positions: int
    backward: bool = False
    microbatches: int = 1

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the compute type."""
        return np.dtype(self.model.options.dtype).itemsize


def model_calls(
    spec: StepSpec, specs: StateSpecs, batch: Batch, *, train: bool = True
) -> Iterator[ModelCall]:
    """Yield the model calls of a step.

    Args:
        spec: what the step is compiled from.
        specs: what lies where.
        batch: the global batch, or its shapes.
        train: false: the eval step, which has no gradients and no microbatches.
    """
    microbatches = spec.microbatches if train else 1
    policy = merge(specs.base, specs.trained)
    reference = specs.base if specs.reference is None else specs.reference
    if spec.sync_every_steps:
        reference = policy

    def call(model: Model, params: Tree, part: Batch, backward: bool = False) -> ModelCall:
        rows, length = part.tokens.shape
        positions = part.loss_index.shape[1]
        return ModelCall(model, params, rows, length, positions, backward, microbatches)

    yield call(spec.policy, policy, batch, train)
    if spec.wants_reference and batch.reference_token_logps is None:
        yield call(spec.reference, reference, batch)
    if spec.wants_statistics and microbatches > 1:
        yield call(spec.policy, policy, batch)
    if spec.wants_statistics and batch.mismatched is not None:
        yield call(spec.policy, policy, batch.mismatched)
        if spec.wants_reference:
            yield call(spec.reference, reference, batch.mismatched)


def lower_bound(
    calls: Iterable[ModelCall], mesh: Mapping[str, int], trained: Tree = (), microbatches: int = 1
) -> dict[str, float]:
    """Return the least bytes that a device receives, by mesh axes as ``collectives.summarize``
    names them.

    Args:
        calls: over which rows each model runs.
        mesh: axis -> size.
        trained: the parameters that get gradients, shapes with shardings.
        microbatches: each scatters the gradients.
    """
    calls = list(calls)
    total: dict[str, float] = collections.defaultdict(float)
    for call in calls:
        for axis, size in _activations(call, mesh).items():
            total[axis] += size
        # without rematerialization the backward pass has kept what the forward pass gathered
        again = call.backward and call.model.options.remat != "none"
        total["fsdp"] += call.microbatches * (2 if again else 1) * _gathered_weights(call, mesh)
    if calls:
        for axes, size in _gradients(trained, mesh, calls[0].itemsize, microbatches).items():
            total[axes] += size
    return {axes: size for axes, size in total.items() if size}


def _split_axes(leaf: Any) -> set[str]:
    """Return the mesh axes that split an array."""
    axes: set[str] = set()
    for entry in leaf.sharding.spec:
        if entry is not None:
            axes |= {entry} if isinstance(entry, str) else set(entry)
    return axes


def _local_size(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape))


def _gathered_weights(call: ModelCall, mesh: Mapping[str, int]) -> int:
    """Bytes of weights that a device lacks, once."""
    return (mesh["fsdp"] - 1) * sum(
        _local_size(leaf) * min(call.itemsize, np.dtype(leaf.dtype).itemsize)
        for leaf in jax.tree.leaves(call.params)
        if "fsdp" in _split_axes(leaf)
    )


def _gradients(
    trained: Tree, mesh: Mapping[str, int], itemsize: int, microbatches: int
) -> dict[str, float]:
    """Scatter over fsdp in each microbatch; reduce once over the other axes that split tokens."""
    total: dict[str, float] = collections.defaultdict(float)
    for leaf in jax.tree.leaves(trained):
        split, size = _split_axes(leaf), _local_size(leaf) * itemsize
        if "fsdp" in split:
            total["fsdp"] += microbatches * (mesh["fsdp"] - 1) * size
        others = [axis for axis in (*ROWS, "sequence") if axis not in split and mesh[axis] > 1]
        replicas = math.prod(mesh[axis] for axis in others)
        # an all-reduce's ring passes everything twice, less the device's own share
        axes = "+".join(axis for axis in mesh if axis in others)
        total[axes] += 2 * (1 - 1 / replicas) * size
    return total


def _activations(call: ModelCall, mesh: Mapping[str, int]) -> dict[str, float]:
    """Count what moves with the tokens: over tensor, sequence and expert."""
    config, remat, backward = call.model.config, call.model.options.remat, call.backward
    length, rows = call.length / mesh["sequence"], call.rows / math.prod(mesh[a] for a in ROWS)
    layers, tensor, sequence = config.num_layers, mesh["tensor"], mesh["sequence"]
    states = rows * length * config.hidden_size * call.itemsize  # of a layer, on one device

    # Each layer's forward pass sums partial results behind attention and behind the feed-forward
    # part (one sum where they are parallel); its backward pass sums as many gradients.  Under remat
    # it first computes the former sum anew, to have the feed-forward part's input.
    recomputed = int(backward and remat in ("full", "attention"))
    sums = 1 if config.parallel_residual else 2
    reduced = states * (layers * (sums + (sums - 1) * recomputed + sums * backward) + 1)
    at_loss = rows * call.positions / sequence * config.hidden_size * call.itemsize
    reduced += at_loss * backward

    kinds = [config.of_kind(kind) for kind in config.kinds]
    widths = sum(max(1.0, of.num_kv_heads / tensor) * (of.head_dim + of.value_dim) for of in kinds)
    keys_and_values = rows * call.length * widths * call.itemsize
    gathers = 1 + int(backward and remat != "none") + backward

    tokens = states * layers * (mesh["expert"] - 1) if config.num_experts else 0.0
    return {
        "tensor": 2 * (1 - 1 / tensor) * reduced,
        "sequence": (1 - 1 / sequence) * keys_and_values * gathers,
        "expert": tokens * (2 + recomputed + 2 * backward),
    }
