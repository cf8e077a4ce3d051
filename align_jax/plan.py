# SPDX-License-Identifier: Apache-2.0
"""StateSpecs a run before renting: will it fit, what fills the memory, how fast can it be.

    python -m align_jax.plan --config=configs/dpo_7b.py --topology=v5e:8x8 --topology=v5p:2x2x2
    [--search=6]
        [--programs=train] [--json=FILE] [--plot=FILE.svg] [--config.any.key=value ...]

Compiles the very programs of the run with the TPU compiler, for chips that need not be there
(libtpu is all it takes), from shapes alone: no weights, no data.

    train                  every run's step
    eval                   offline, where something is held out
    reference              where the reference's log-probabilities are cached
    prefill, decode        online: sampling, of held-out prompts too
    reward NAME            online: each reward model
    rescore, rescore reference    online: old and reference log-probabilities, values

Each must fit beside all that the run holds meanwhile.  A checkpoint on the hub is asked for its
config.json; give ``model.config`` beside ``model.path`` to plan without a network.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

# before jax is imported: planning must not take a machine's own chips
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from align_jax.core import config as configs
from align_jax.core.options import Config
from align_jax.core.schema import Batch
from align_jax.data import planning
from align_jax.online import batches
from align_jax.parallel.chips import GIB, Topology, describe_topology
from align_jax.parallel.lowering import lower
from align_jax.parallel.mesh import make_mesh, row_shards
from align_jax.planner import rollout_programs
from align_jax.planner.charts import bars, rollout_line, summary, table
from align_jax.planner.communication import least, passes
from align_jax.planner.cost_model import Forecast, Program, advice, forecast
from align_jax.planner.search import Candidate, candidates
from align_jax.runs import setup
from align_jax.training import partitioning
from align_jax.training.flops import step_flops

# of a ranking the data says how many
RESPONSES = {"completions": 1, "unpaired": 1, "pairs": 2, "ranked": 4}


class Step(NamedTuple):
    """A run on a topology: everything is shapes."""

    config: Config
    resolved: setup.ResolvedConfig
    step_spec: Any
    state_specs: Any
    batch: Batch
    mesh: Mesh
    rewards: dict[str, rollout_programs.RewardProgram]
    loss_positions: int

    @property
    def held(self) -> dict[str, Any]:
        """What lies on the devices all the time, by kind."""
        state, frozen = dict(self.state_specs.state), self.state_specs.frozen
        params, moving = state.pop("params"), state.pop("reference", {})
        kept = {"parameters": params, "optimizer": state, "reference": (frozen, moving)}
        return kept | (
            {"rewards": [one.params for one in self.rewards.values()]} if self.rewards else {}
        )

    @property
    def segment(self) -> int | None:
        """Tokens that attend to each other, where rows are packed."""
        return self.config.max_length if self.config.data.layout != "plain" else None


def for_planning(config: ConfigDict | Config) -> Config:
    """Return the config with what only a run on the spot needs replaced: TPU attention, no
    tokenizer from the hub."""
    config = configs.read(config) if isinstance(config, ConfigDict) else config
    model, tokenizer = config.model, config.tokenizer
    if model.attention == "auto":
        model = dataclasses.replace(model, attention="splash")
    if model.config and model.path:
        model, tokenizer = dataclasses.replace(model, path=""), "byte"
    return dataclasses.replace(config, model=model, tokenizer=tokenizer)


def abstract_batch(
    config: Config,
    resolved: setup.ResolvedConfig,
    mesh: Mesh,
    loss_positions: int = 0,
    *,
    train: bool = True,
) -> Batch:
    """Return the shapes of a global batch, as the data layer or the rollouts would make it.

    Args:
        config: the config.
        resolved: what it means.
        mesh: the mesh.
        loss_positions: P; 0 = what ``data.max_prompt_length`` leaves of a row, else the whole row.
        train: false: a batch to evaluate.
    """
    if resolved.rollouts is not None:
        return partitioning.abstract_batch(mesh, _rollout_batch(config, resolved.rollouts))
    d, layout, kind = config.data, config.data.layout, resolved.kind
    if not loss_positions and layout == "plain" and d.max_prompt_length:
        loss_positions = config.max_length - d.max_prompt_length
    shape = planning.plan_shape(
        responses=RESPONSES[kind],
        batch_size=(not train and config.eval.batch_size) or config.batch_size,
        layout=layout,
        max_length=config.max_length,
        row_length=config.row_length or None,
        groups_per_row=d.groups_per_row or None,
        loss_positions=loss_positions or None,
        row_multiple=row_shards(mesh) * (config.microbatches if train else 1),
    )
    mismatched = None
    if any(term.objective.mismatched for term in resolved.terms):
        mismatched = planning.mismatched_shape(shape, config.max_length, shape.positions)
    batch = planning.batch_shapes(shape, kind=kind, layout=layout, mismatched=mismatched)
    if config.reference.mode == "cached":
        batch = batch._replace(
            reference_token_logps=np.broadcast_to(np.zeros((), np.float32), batch.tokens.shape)
        )
    return partitioning.abstract_batch(mesh, batch)


def _rollout_batch(config: Config, rollouts: Any) -> Batch:
    """Return the shapes of a step on rollouts whose longest prompt fills what the completions
    leave."""
    shape = batches.plan_shape(
        groups=rollouts.batch_size,
        responses=rollouts.groups[1],
        prompt=config.max_length - rollouts.options.max_new_tokens,
        response=rollouts.options.max_new_tokens,
        layout=rollouts.layout,
    )
    return batches.batch_shapes(shape, rollouts)


def make_step(config: Config, topology: Topology, loss_positions: int = 0) -> Step:
    """Put together a run on a topology.

    Raises:
        ValueError: what the run itself would refuse: sizes that do not divide, a mesh that is not
            the topology's.
    """
    resolved = setup.resolve_config(config, len(topology.devices))
    mesh = make_mesh(dataclasses.asdict(config.mesh), topology.devices)
    step_spec = setup.make_step_spec(config, resolved, total_steps=1000)
    specs = setup.make_state_specs(config, resolved, step_spec, mesh)
    batch = abstract_batch(config, resolved, mesh, loss_positions)
    rewards = (
        {}
        if resolved.rollouts is None
        else rollout_programs.reward_programs(
            config.rewards, resolved.model_config, mesh, config.model.attention
        )
    )
    return Step(config, resolved, step_spec, specs, batch, mesh, rewards, loss_positions)


def train_program(step: Step) -> Program:
    """Return the run's train step."""
    step_spec, specs, mesh, rollouts = (
        step.step_spec,
        step.state_specs,
        step.mesh,
        step.resolved.rollouts,
    )
    lowered = partitioning.lower_train_step(
        step_spec, specs.state, specs.frozen, step.batch, mesh, "tpu"
    )
    bound = least(
        passes(step_spec, specs, step.batch), mesh.shape, specs.trained, step_spec.microbatches
    )
    return Program(
        "train",
        lowered,
        (specs.state, specs.frozen, step.batch),
        {**step.held, "batch": step.batch},
        step_flops(step_spec, step.batch, segment_length=step.segment),
        bound,
        runs=1 if rollouts is None else rollouts.steps,
    )


def other_programs(step: Step) -> list[Program]:
    """Return what the run compiles beside its train step."""
    config, step_spec, specs, mesh = step.config, step.step_spec, step.state_specs, step.mesh
    if step.resolved.rollouts is not None:
        return rollout_programs.programs(
            step.resolved.rollouts,
            step.resolved.models,
            specs,
            step.resolved.tokenizer,
            _rollout_batch(config, step.resolved.rollouts),
            mesh,
            held=step.held,
            rewards=step.rewards,
            max_length=config.max_length,
            platform="tpu",
        )
    found = []
    batch = abstract_batch(config, step.resolved, mesh, step.loss_positions, train=False)
    if config.data.eval or config.data.eval_fraction:
        flops = step_flops(step_spec, batch, segment_length=step.segment, train=False)
        arguments = (specs.state, specs.frozen, batch)
        lowered = lower(
            partitioning.jit_eval_step(step_spec, mesh), mesh, *arguments, platform="tpu"
        )
        found.append(
            Program(
                "eval",
                lowered,
                arguments,
                {**step.held, "batch": batch},
                flops,
                least(passes(step_spec, specs, batch, train=False), mesh.shape),
            )
        )
    if config.reference.mode == "cached" and step_spec.wants_reference:
        found.append(_reference_program(step, batch._replace(reference_token_logps=None)))
    return found


def _reference_program(step: Step, batch: Batch) -> Program:
    """Return the program that fills the cache of the reference's log-probabilities, its weights
    beside the run's."""
    step_spec, mesh = step.step_spec, step.mesh
    frozen = setup.make_reference_specs(step.config, step.resolved, step_spec, mesh).frozen
    lowered = lower(partitioning.jit_reference_step(step_spec), mesh, frozen, batch, platform="tpu")
    flops = step_flops(step_spec, batch, segment_length=step.segment, train=False)
    only = next(
        one
        for one in passes(step_spec, step.state_specs, batch, train=False)
        if one.model is step_spec.base
    )
    weights = frozen.get("reference", frozen["base"])
    return Program(
        "reference",
        lowered,
        (frozen, batch),
        {**step.held, "reference": frozen, "batch": batch},
        dataclasses.replace(flops, policy=0.0, statistics=0.0),
        least([only._replace(params=weights)], mesh.shape),
    )


def compile_train(step: Step, topology: Topology) -> Forecast:
    """Forecast a step's training."""
    return forecast(train_program(step), topology, step.mesh)


def advise(step: Step, found: Forecast) -> list[str]:
    """Say what to change so that a program fits, or does not gather for every token; nothing where
    all is well."""
    if found.fits and found.name == "decode" and found.mesh["fsdp"] > 1:
        return [
            "gathers all weights for every token; config.rollout.tensor=4: four devices of a "
            "host hold a copy"
        ]
    if found.fits:
        return []
    config = step.config
    rows = step.batch.tokens.shape[0] / row_shards(step.mesh) / config.microbatches
    return advice(
        found,
        microbatches=config.microbatches,
        remat=config.model.remat,
        rows_a_device=rows,
        adapter=bool(config.model.lora.rank),
        eval_batch_size=config.eval.batch_size or config.batch_size,
    )


def search(
    config: Config, topology: Topology, count: int, loss_positions: int = 0
) -> list[tuple[Candidate, Forecast]]:
    """Compile the most promising meshes, microbatches and remat policies.

    Args:
        config: from ``for_planning``.
        topology: the topology.
        count: how many to compile.
        loss_positions: as ``abstract_batch`` takes it.

    Returns:
        Those that compiled and fit, the fastest first.
    """
    resolved = setup.resolve_config(config, len(topology.devices))
    found: list[tuple[Candidate, Forecast]] = []
    tried = 0
    shape = abstract_batch(
        config, resolved, make_mesh(dataclasses.asdict(config.mesh), topology.devices)
    ).tokens.shape
    for candidate in candidates(
        resolved.model_config,
        topology,
        slices=topology.slices,
        remat=config.model.remat,
        rows=shape[0],
        length=shape[1],
        trained_bytes=4 if config.model.lora.rank else 16,
    ):
        if tried == count:
            break
        other = candidate.apply(config)
        try:
            step = make_step(other, topology, loss_positions)
        except ValueError as error:
            logging.info("%s: %s", candidate.override(), error)
            continue
        tried += 1
        result = compile_train(step, topology)
        logging.info(
            "%s: %s, %.2f GiB, %.3f s",
            candidate.override(),
            "fits" if result.fits else "does not fit",
            result.memory.used / GIB,
            result.exposed,
        )
        if result.fits:
            found.append((candidate, result))
    return sorted(found, key=lambda pair: pair[1].exposed)


def examine(
    config: Config, name: str, *, wanted: Sequence[str] = (), loss_positions: int = 0
) -> tuple[list[Forecast], dict[str, Any]]:
    """Compile a run's programs for a topology and print what they need.

    Args:
        config: from ``for_planning``.
        name: the topology's.
        wanted: programs to compile; none: all.
        loss_positions: as ``abstract_batch`` takes it.

    Returns:
        The forecasts, and all of it as plain numbers, for JSON.

    Raises:
        ValueError: a program that the run has not.
    """
    topology = describe_topology(name)
    step = make_step(config, topology, loss_positions)
    programs = [train_program(step)] if not wanted or "train" in wanted else []
    programs += other_programs(step) if list(wanted) != ["train"] else []
    if unknown := sorted(set(wanted) - {program.name for program in programs}):
        raise ValueError(
            f"--programs: this run has no {unknown}; it has train, "
            f"{', '.join(program.name for program in programs if program.name != 'train')}"
        )
    found, rows = [], []
    for program in programs:
        if not wanted or program.name in wanted:
            one = forecast(program, topology, step.mesh)
            lines = advise(step, one)
            print((table if one.name == "train" else summary)(one, lines), flush=True)
            found.append(one)
            rows.append({**one.to_dict(), "advice": lines})
    for one in step.rewards.values():
        if one.note:
            print(f"  {one.note}")
    rollouts = step.resolved.rollouts
    if rollouts is not None and not wanted and all(one.fits for one in found):
        print(rollout_line(found, rollouts.samples))
    return found, {
        "topology": name,
        "chips": topology.chips,
        "fits": all(one.fits for one in found),
        "programs": rows,
    }


def main(argv: Sequence[str]) -> None:
    """Run from the command line."""
    if len(argv) > 1:
        raise app.UsageError(
            f"unknown arguments {argv[1:]}; flags are --config, --topology, "
            "--programs, --search, "
            "--json, --plot"
        )
    options = flags.FLAGS
    config = for_planning(options.config)
    found, rows = [], []
    for name in options.topology:
        more, row = examine(
            config, name, wanted=options.programs, loss_positions=options.loss_positions
        )
        if options.search:
            better = search(config, describe_topology(name), options.search, options.loss_positions)
            for candidate, result in better:
                print(
                    f"  {result.exposed:8.3f} s exposed, {result.memory.used / GIB:6.2f} GiB  "
                    f"{candidate.override()}"
                )
            print(
                f"  fastest that fits: {better[0][0].override()}"
                if better
                else "  nothing that was tried fits"
            )
            row["search"] = [
                {"override": candidate.override(), **result.to_dict()}
                for candidate, result in better
            ]
        found += more
        rows.append(row)
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(rows, indent=2))
    if options.plot:
        pathlib.Path(options.plot).write_text(bars(found))


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", None, "Config file, its argument after a colon.", lock_config=True
    )
    flags.DEFINE_multi_string("topology", None, "CHIP:AxB or CHIP:AxBxC; 2*v5e:8x8 is two slices.")
    flags.DEFINE_list("programs", [], "Only these, such as train,eval; none = all.")
    flags.DEFINE_integer(
        "search", 0, "Try other meshes, microbatches and remat policies: compile so many."
    )
    flags.DEFINE_integer(
        "loss_positions", 0, "Loss tokens of a row at most; 0 = what data.max_prompt_length leaves."
    )
    flags.DEFINE_string("json", None, "Write the forecasts to this file.")
    flags.DEFINE_string("plot", None, "Draw the HBM by kind as an SVG file.")
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main)
