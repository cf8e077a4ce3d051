# SPDX-License-Identifier: Apache-2.0
"""Which meshes, microbatches and remat policies are worth compiling, the most promising first.

Compiling takes half a minute, so a rough model orders the candidates: operations over the chips'
peak, plus the bytes that FSDP and tensor parallelism must move, over the links; those whose weights
and activations cannot fit are left out.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

from align_jax.core.options import Config, MeshOptions
from align_jax.models.config import ModelConfig
from align_jax.parallel.chips import GIB
from align_jax.parallel.mesh import AXES
from align_jax.planner.abstract_run import AbstractRun
from align_jax.planner.cost_model import CostEstimate, estimate
from align_jax.planner.programs import train_program
from align_jax.planner.topology import Topology
from align_jax.training.flops import layer_weights

_log = logging.getLogger(__name__)


class RematCost(NamedTuple):
    """What a remat policy costs."""

    forwards: float  # of a DPO response, recomputation and the backward pass counted in
    saved: float  # [N, T, D] arrays a layer


REMAT_COSTS = {
    "full": RematCost(5.0, 1.0),
    "attention": RematCost(4.9, 2.0),
    "dots": RematCost(4.1, 14.0),
    "none": RematCost(4.0, 34.0),
}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to lay a run out."""

    data: int
    fsdp: int
    expert: int
    sequence: int
    tensor: int
    microbatches: int
    remat: str

    def override(self) -> str:
        """Return the flags to paste behind a command."""
        mesh = " ".join(f"--config.mesh.{axis}={getattr(self, axis)}" for axis in AXES)
        return f"{mesh} --config.microbatches={self.microbatches} --config.model.remat={self.remat}"

    def apply(self, config: Config) -> Config:
        """Return the config laid out so."""
        return dataclasses.replace(
            config,
            mesh=MeshOptions(**{axis: getattr(self, axis) for axis in AXES}),
            microbatches=self.microbatches,
            model=dataclasses.replace(config.model, remat=self.remat),
        )


def search(
    run: AbstractRun, count: int, make_run: Callable[[Config], AbstractRun]
) -> list[tuple[Candidate, CostEstimate]]:
    """Compile the train step of the most promising meshes, microbatches and remat policies.

    Args:
        run: the run as its config has it.
        count: how many to compile.
        make_run: makes the run of another config.

    Returns:
        Those that compiled and fit, the fastest first.
    """
    config, topology, found, compiled = run.config, run.topology, [], 0
    rows, length = run.batch().tokens.shape
    for candidate in candidates(
        run.spec.policy.config,
        topology,
        remat=config.model.remat,
        rows=rows,
        length=length,
        trained_bytes=4 if config.model.lora.rank else 16,
    ):
        if compiled == count:
            break
        try:
            other = make_run(candidate.apply(config))
        except ValueError as error:
            _log.info("%s: %s", candidate.override(), error)
            continue
        compiled += 1
        result = estimate(train_program(other), topology, other.mesh)
        _log.info(
            "%s: %s, %.2f GiB, %.3f s",
            candidate.override(),
            "fits" if result.fits else "does not fit",
            result.memory.used / GIB,
            result.exposed,
        )
        if result.fits:
            found.append((candidate, result))
    return sorted(found, key=lambda pair: pair[1].exposed)


def candidates(
    model: ModelConfig,
    topology: Topology,
    *,
    remat: str,
    rows: int,
    length: int,
    trained_bytes: int,
) -> Iterator[Candidate]:
    """Yield candidates, by the rough model's time.

    Args:
        model: the model.
        topology: the topology; the data axis spans its slices.
        remat: the config's policy, tried first among equals.
        rows: N of a step.
        length: T.
        trained_bytes: bytes a parameter of everything that lies on the devices (16: float32
            weights, Adam, a bfloat16 reference and gradients beside).
    """
    rated = []
    for data, fsdp, expert, sequence, tensor in _meshes(model, topology, length):
        shards = data * fsdp * expert
        for microbatches, policy in itertools.product((1, 2, 4, 8, 16), REMAT_COSTS):
            if rows % (shards * microbatches):
                continue
            one = Candidate(data, fsdp, expert, sequence, tensor, microbatches, policy)
            seconds, needed = _rate(one, model, topology, rows * length, trained_bytes)
            if needed < 1.3 * topology.chip.hbm:
                rated.append((seconds, policy != remat, microbatches, one.override(), one))
    for *_, one in sorted(rated):
        yield one


def _meshes(
    model: ModelConfig, topology: Topology, length: int
) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield the sizes of the axes, in the order of AXES, that the model and the rows allow."""
    devices, slices = len(topology.devices), topology.slices
    for tensor, sequence, expert in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8), (1, 2, 4, 8)):
        fsdp, left = divmod(devices, slices * tensor * sequence * expert)
        if left or model.num_heads % tensor:
            continue
        if expert > 1 and (not model.num_experts or model.num_experts % expert):
            continue
        # attention's blocks are 128 tokens; shorter stretches than 4096 are not worth splitting
        if length % (128 * sequence) or (sequence > 1 and length < 4096 * sequence):
            continue
        yield slices, fsdp, expert, sequence, tensor


def _rate(
    one: Candidate, model: ModelConfig, topology: Topology, tokens: int, trained_bytes: int
) -> tuple[float, float]:
    """Return rough seconds a step and bytes a device."""
    devices, chip, cost = len(topology.devices), topology.chip, REMAT_COSTS[one.remat]
    width, layers = model.hidden_size, model.num_layers
    weights: float = layer_weights(model) + 2 * width * model.vocab_rows
    if model.num_experts:
        weights *= model.num_experts / model.experts_per_token  # all of them lie somewhere
    compute = 2 * weights * tokens * cost.forwards / (devices * chip.flops)
    own = tokens / (devices / one.tensor)  # tokens of a step on one device
    split = one.fsdp * one.expert
    gathered = 4 * 2 * weights / one.tensor * (1 - 1 / split) * one.microbatches / one.expert
    reduced = 10 * 2 * layers * own * width * 2 * (1 - 1 / one.tensor)
    ring = 2 * chip.link
    seconds = compute + 0.5 * (gathered + reduced) / ring  # half of it hides behind computation
    activations = (
        own / one.microbatches * layers * width * 2 * (cost.saved / one.tensor + model.num_streams)
    )
    gathered_layer = 6 * weights / layers / one.tensor
    return seconds, weights * trained_bytes / (split * one.tensor) + activations + gathered_layer
