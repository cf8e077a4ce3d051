# SPDX-License-Identifier: Apache-2.0
"""A run of which all is shapes: what the cost model takes in place of weights and data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from align_jax.core.options import Config
from align_jax.core.schema import Batch
from align_jax.data import layout
from align_jax.data.layout import BatchSizes
from align_jax.models.config import ModelConfig
from align_jax.models.model import Model, build
from align_jax.online import batches, rewards
from align_jax.online.config import RolloutConfig
from align_jax.parallel.mesh import row_shards
from align_jax.planner.topology import Topology
from align_jax.training.initialize import StateSpecs
from align_jax.training.partitioning import abstract_batch, abstract_params
from align_jax.training.steps import StepSpec

# of a ranking the data says how many
RESPONSES = {"completions": 1, "unpaired": 1, "scored": 1, "stepwise": 1, "pairs": 2, "ranked": 4}


class RewardModel(NamedTuple):
    """A reward model as an online run has it.

    Attributes:
        model: the model.
        params: its parameters, shapes with shardings.
        rows, length: of the texts that it scores at once.
        note: "" where the checkpoint's own config was read; else what was assumed.
    """

    model: Model
    params: Any
    rows: int
    length: int
    note: str


def reward_models(
    config: Config, policy: ModelConfig, mesh: Mesh, load_config: Callable[[str], ModelConfig]
) -> dict[str, RewardModel]:
    """Return the reward models that a config's ``rewards`` names, by name.

    Args:
        config: the config.
        policy: the policy's config: a reward model's too where its own cannot be read here.
        mesh: the mesh.
        load_config: reads a checkpoint's config; raises OSError where it cannot.
    """
    found = {}
    for term in rewards.read(config.rewards) if config.rewards else ():
        if term.kind in ("model", "process"):
            options, path, note = term.options, term.options["path"], ""
            try:
                own = load_config(path).padded(mesh.shape["tensor"])
                length = options.get("max_length") or own.longest
                own = dataclasses.replace(own, run_length=length)
            except OSError:
                own, note = policy, f"the reward model {path} cannot be read here: taken to be of "
                note += "the policy's shape"
            dtype = options.get("compute_dtype", "float32")
            model = build(
                own,
                compute_dtype=dtype,
                remat="none",
                attention=config.model.attention,
                heads=("score",),
            )
            params = abstract_params(mesh, model.shapes(jnp.dtype(dtype)), model.axes())
            length = options.get("max_length") or own.longest
            found[term.name] = RewardModel(model, params, options.get("rows", 16), length, note)
    return found


@dataclasses.dataclass(frozen=True)
class AbstractRun:
    """A run on a topology.

    Attributes:
        config: the config.
        topology: the topology.
        mesh: over its devices.
        kind: of data that the objective trains on.
        tokenizer: the policy's.
        spec: what the steps are compiled from.
        specs: what lies where, while the run trains.
        reference_specs: what lies where while a cache of the reference's log-probabilities is
            filled.
        rollouts: how rollouts are made; None of an offline run.
        rewards: the reward models by name.
        loss_positions: P; 0: see ``data.layout.batch_shape``.
    """

    config: Config
    topology: Topology
    mesh: Mesh
    kind: str
    tokenizer: PreTrainedTokenizerBase
    spec: StepSpec
    specs: StateSpecs
    reference_specs: StateSpecs
    rollouts: RolloutConfig | None = None
    rewards: Mapping[str, RewardModel] = dataclasses.field(default_factory=dict)
    loss_positions: int = 0

    @property
    def resident(self) -> dict[str, Any]:
        """What lies on the devices all the time, by kind."""
        state, frozen = dict(self.specs.state), self.specs.frozen
        params, moving = state.pop("params"), state.pop("reference", {})
        kinds = {"parameters": params, "optimizer": state, "reference": (frozen, moving)}
        if self.rewards:
            kinds["rewards"] = [one.params for one in self.rewards.values()]
        return kinds

    @property
    def segment_length(self) -> int | None:
        """Tokens that attend to each other, where rows are packed."""
        return self.config.max_length if self.config.data.layout != "plain" else None

    @property
    def rows_a_device(self) -> float:
        """Rows of a microbatch on one device."""
        rows = self.batch().tokens.shape[0]
        return rows / row_shards(self.mesh) / self.config.microbatches

    def batch(self, *, train: bool = True) -> Batch:
        """Return the shapes of a step's global batch; ``train`` false: of one to evaluate."""
        mismatched = any(term.objective.mismatched for term in self.spec.terms)
        guided = any(term.loss.wants_guide for term in self.spec.terms)
        host = (
            offline_batch(
                self.config,
                self.kind,
                self.mesh,
                mismatched=mismatched,
                guided=guided,
                loss_positions=self.loss_positions,
                train=train,
            )
            if self.rollouts is None
            else rollout_batch(self.config, self.rollouts, self.mesh)
        )
        return abstract_batch(self.mesh, host)


def offline_batch(
    config: Config,
    kind: str,
    mesh: Mesh,
    *,
    mismatched: bool = False,
    guided: bool = False,
    loss_positions: int = 0,
    train: bool = True,
) -> Batch:
    """Return a global batch as the data layer would make it, of arrays that take no memory.

    Args:
        config: the config.
        kind: of data.
        mesh: the mesh.
        mismatched: the objective needs mismatched pairs.
        guided: it reads a guide's log-probabilities.
        loss_positions: as ``AbstractRun`` has it.
        train: false: a batch to evaluate.
    """
    sizes = BatchSizes.of(config, row_shards(mesh), once=not train)
    shape = layout.batch_shape(config.data, sizes, RESPONSES[kind], loss_positions=loss_positions)
    other = None
    if mismatched:
        other = layout.mismatched_shape(shape, shape.length, shape.loss_positions)
    fields = ["reference_token_logps"] if config.reference.mode == "cached" else []
    return layout.abstract_batch(
        shape,
        config.data.layout,
        kind,
        mismatched=other,
        token_fields=fields + ["guide_token_logps"] * guided,
    )


def rollout_batch(config: Config, rollouts: RolloutConfig, mesh: Mesh) -> Batch:
    """Return a step's batch on rollouts, of arrays that take no memory.

    Its longest prompt fills what the completions leave; a text beside it fills its rows.
    """
    longest = config.max_length - rollouts.options.max_new_tokens
    batch = batches.abstract_batch(rollouts, batches.rollout_shape(rollouts, longest))
    if not config.data.text:
        return batch
    count = round(config.data.text_share * config.batch_size)
    plain = dataclasses.replace(config, batch_size=count, row_length=0)
    plain = dataclasses.replace(plain, data=dataclasses.replace(config.data, layout="plain"))
    return batch._replace(text=offline_batch(plain, "completions", mesh))
