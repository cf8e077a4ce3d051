# SPDX-License-Identifier: Apache-2.0
"""Which meshes, microbatches and remat policies are worth compiling, the most promising first.

Compiling takes half a minute, so a rough model orders the candidates: operations over the chips'
peak, plus the bytes that FSDP and tensor parallelism must move, over the links; those whose weights
and activations cannot fit are left out.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from align_jax.core.options import Config, MeshOptions
from align_jax.models.config import ModelConfig
from align_jax.parallel.chips import Topology
from align_jax.training.flops import layer_weights

PASSES = {"full": (5.0, 1.0), "attention": (4.9, 2.0), "dots": (4.1, 14.0), "none": (4.0, 34.0)}
# remat -> (forward units of a DPO response with its recomputation, saved [N, T, D] arrays a layer)


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
        mesh = " ".join(
            f"--config.mesh.{axis}={getattr(self, axis)}"
            for axis in ("data", "fsdp", "expert", "sequence", "tensor")
        )
        return f"{mesh} --config.microbatches={self.microbatches} --config.model.remat={self.remat}"

    def apply(self, config: Config) -> Config:
        """Return the config laid out so."""
        return dataclasses.replace(
            config,
            mesh=MeshOptions(self.data, self.fsdp, self.expert, self.sequence, self.tensor),
            microbatches=self.microbatches,
            model=dataclasses.replace(config.model, remat=self.remat),
        )


def candidates(
    model: ModelConfig,
    topology: Topology,
    *,
    slices: int,
    remat: str,
    rows: int,
    length: int,
    trained_bytes: int,
) -> Iterator[Candidate]:
    """Yield candidates, by the rough model's time.

    Args:
        model: the model.
        topology: the topology.
        slices: slices that the data axis must span.
        remat: the config's policy, tried first among equals.
        rows: N of a step.
        length: T.
        trained_bytes: bytes a parameter of everything that lies on the devices (16: float32
            weights, Adam, a bfloat16 reference and gradients beside).
    """
    devices = len(topology.devices)
    rated = []
    for tensor, sequence, expert in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8), (1, 2, 4, 8)):
        rest, left = divmod(devices, slices * tensor * sequence * expert)
        if (
            left
            or model.num_heads % tensor
            or (expert > 1 and (not model.num_experts or model.num_experts % expert))
        ):
            continue
        if (sequence > 1 and length < 4096 * sequence) or length % (128 * sequence):
            continue
        shards = slices * rest * expert
        for microbatches, policy in itertools.product((1, 2, 4, 8, 16), PASSES):
            if rows % (shards * microbatches):
                continue
            one = Candidate(slices, rest, expert, sequence, tensor, microbatches, policy)
            seconds, needed = _rate(one, model, topology, rows * length, trained_bytes)
            if needed < 1.3 * topology.chip.hbm:
                rated.append((seconds, policy != remat, one.microbatches, one.override(), one))
    for *_, one in sorted(rated):
        yield one


def _rate(
    one: Candidate, model: ModelConfig, topology: Topology, tokens: int, trained_bytes: int
) -> tuple[float, float]:
    """Return rough seconds a step and bytes a device."""
    devices, chip = len(topology.devices), topology.chip
    weights = layer_weights(model) + 2 * model.hidden_size * model.vocab_rows
    if model.num_experts:
        weights *= model.num_experts / model.experts_per_token  # all of them lie somewhere
    units, saved = PASSES[one.remat]
    compute = 2 * weights * tokens * units / (devices * chip.flops)
    own = tokens / (devices / one.tensor)  # tokens of a step on one device
    split = one.fsdp * one.expert
    gathered = 4 * 2 * weights / one.tensor * (1 - 1 / split) * one.microbatches / one.expert
    reduced = 10 * 2 * model.num_layers * own * model.hidden_size * 2 * (1 - 1 / one.tensor)
    ring = 2 * chip.link
    seconds = compute + 0.5 * (gathered + reduced) / ring
    activations = (
        own / one.microbatches * model.num_layers * model.hidden_size * 2 * (saved / one.tensor + 1)
    )
    layer = 6 * weights / model.num_layers / one.tensor
    return seconds, weights * trained_bytes / (split * one.tensor) + activations + layer
