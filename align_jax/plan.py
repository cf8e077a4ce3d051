# SPDX-License-Identifier: Apache-2.0
"""Plan a run before renting: will it fit, what fills the memory, how fast can it be.

    python -m align_jax.plan --config=configs/dpo_7b.py --topology=v5e:8x8 --topology=v5p:2x2x2
        [--search=6] [--programs=train] [--json=FILE] [--plot=FILE.svg] [--config.any.key=value ...]

Compiles the very programs of the run with the TPU compiler, for chips that need not be there
(libtpu is all it takes), from shapes alone: no weights, no data.

    train                  every run's step
    eval                   offline, where something is held out
    reference              where the reference's log-probabilities are cached
    prefill, decode        online: sampling, of held-out prompts too; "opponent": what the samples
                           meet (the reference, or its mixture with the policy); "greedy": of ReMax
    reward NAME            online: each reward model
    rescore, rescore reference    online: old and reference log-probabilities, values

Each must fit beside all that the run holds meanwhile.  A checkpoint on the hub is asked for its
config.json; give ``model.config`` beside ``model.path`` to plan without a network.
"""

from __future__ import annotations

import os

from absl import flags
from ml_collections import config_flags

from align_jax.runs import command

# before anything imports jax, as a config may: planning must not take a machine's own chips
os.environ.setdefault("JAX_PLATFORMS", "cpu")

if __name__ == "__main__":  # here, because what is imported next takes seconds
    config_flags.DEFINE_config_file(
        "config", None, "Recipe, objective or file; its argument after a colon.", lock_config=True
    )
    flags.DEFINE_multi_string("topology", None, "CHIP:AxB or CHIP:AxBxC; 2*v5e:8x8 is two slices.")
    flags.DEFINE_list("programs", [], "Only these, such as train,eval; none = all.")
    flags.DEFINE_integer(
        "search", 0, "Try other meshes, microbatches and remat policies: compile so many.", 0
    )
    flags.DEFINE_integer(
        "loss_positions",
        0,
        "Loss tokens of a row at most; 0 = what data.max_prompt_length leaves.",
        0,
    )
    flags.DEFINE_string("json", None, "Write the estimates to this file.")
    flags.DEFINE_string("plot", None, "Draw the HBM by kind as an SVG file.")
    flags.mark_flags_as_required(["config", "topology"])

    def check_flags() -> None:
        """Refuse topologies that there are not."""
        from align_jax.planner import topology

        for name in flags.FLAGS.topology:
            topology.describe_topology(name)

    arguments = command.read(check=check_flags)

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from align_jax.core import config as configs
from align_jax.core.files import write_text
from align_jax.core.options import Config
from align_jax.data.layout import usual
from align_jax.interop import hf
from align_jax.losses.objective import data_kind
from align_jax.online.config import is_online
from align_jax.parallel.chips import GIB
from align_jax.parallel.mesh import make_mesh
from align_jax.planner.abstract_run import RESPONSES, AbstractRun, reward_models
from align_jax.planner.advice import advise
from align_jax.planner.charts import bars, rollout_line, summary, table
from align_jax.planner.cost_model import CostEstimate, estimate
from align_jax.planner.programs import lowered_programs
from align_jax.planner.search import search
from align_jax.planner.topology import Topology, describe_topology
from align_jax.runs import setup


def for_planning(config: ConfigDict | Config) -> Config:
    """Return the config with what only a run on the spot needs replaced: TPU attention and types,
    no tokenizer from the hub, and plain rows where the data would choose (they hold the most)."""
    config = configs.read(config)
    model, tokenizer = config.model, config.tokenizer
    if model.compute_dtype == "auto":
        model = dataclasses.replace(model, compute_dtype="bfloat16")
    if model.attention == "auto":
        model = dataclasses.replace(model, attention="splash")
    if model.config and model.path:
        model, tokenizer = dataclasses.replace(model, path=""), "byte"
    reference = config.reference
    if reference.dtype == "auto":
        reference = dataclasses.replace(reference, dtype="bfloat16")
    if reference.config:
        reference = dataclasses.replace(reference, path="")
    data = config.data
    if data.layout == "auto":
        data = dataclasses.replace(data, layout=_layout(config))
    return dataclasses.replace(
        config, model=model, reference=reference, tokenizer=tokenizer, data=data
    )


def _layout(config: Config) -> str:
    """Return a layout where the data would choose: packed rows if their length is given."""
    terms, given = setup.objective_terms(config), config.row_length or config.data.groups_per_row
    if not given or is_online(terms, config):
        return "plain"
    return usual("auto", RESPONSES[data_kind(terms)])


def make_run(config: Config, topology: Topology, loss_positions: int = 0) -> AbstractRun:
    """Put together a run on a topology.

    Args:
        config: from ``for_planning``.
        topology: the topology.
        loss_positions: as ``AbstractRun`` has it.

    Raises:
        ValueError: what the run itself would refuse: sizes that do not divide, a mesh that is not
            the topology's.
    """
    resolved = setup.resolve_config(config, len(topology.devices))
    mesh = make_mesh(dataclasses.asdict(config.mesh), topology.devices)
    spec = setup.make_step_spec(config, resolved, total_steps=1000)
    rewards = (
        reward_models(config, resolved.model_config, mesh, hf.load_config)
        if resolved.rollouts is not None
        else {}
    )
    return AbstractRun(
        config,
        topology,
        mesh,
        resolved.kind,
        resolved.tokenizer,
        spec,
        setup.make_state_specs(config, resolved, spec, mesh),
        setup.make_reference_specs(config, resolved, spec, mesh),
        resolved.rollouts,
        rewards,
        loss_positions,
    )


def examine(
    run: AbstractRun, wanted: Sequence[str] = ()
) -> tuple[list[CostEstimate], dict[str, Any]]:
    """Compile a run's programs and print what they need.

    Args:
        run: the run.
        wanted: programs to compile; none: all.

    Returns:
        The estimates, and all of it as plain numbers, for JSON.

    Raises:
        ValueError: a program that the run has not.
    """
    found, rows = [], []
    for program in lowered_programs(run, wanted):
        one = estimate(program, run.topology, run.mesh)
        advice = advise(one, run.config, run.rows_a_device)
        print((table if one.name == "train" else summary)(one, advice), flush=True)
        found.append(one)
        rows.append({**one.to_dict(), "advice": advice})
    for reward in run.rewards.values():
        if reward.note:
            print(f"  {reward.note}")
    fits = all(one.fits for one in found)
    if run.rollouts is not None and not wanted and fits:
        print(rollout_line(found, run.rollouts.samples))
    topology = run.topology
    return found, {
        "topology": topology.name,
        "chips": topology.chips,
        "fits": fits,
        "programs": rows,
    }


def print_search(run: AbstractRun, count: int) -> list[dict[str, Any]]:
    """Try other layouts of a run; print those that fit, and return them for JSON."""

    def remake(config: Config) -> AbstractRun:
        return make_run(config, run.topology, run.loss_positions)

    better = search(run, count, remake)
    for candidate, result in better:
        used = result.memory.used / GIB
        print(f"  {result.exposed:8.3f} s exposed, {used:6.2f} GiB  {candidate.override()}")
    if better:
        print(f"  fastest that fits: {better[0][0].override()}")
    else:
        print("  nothing that was tried fits")
    return [{"override": one.override(), **result.to_dict()} for one, result in better]


def main(argv: Sequence[str]) -> None:
    """Run from the command line."""
    options = flags.FLAGS
    written, plot = command.output_path("json"), command.output_path("plot")
    config = for_planning(options.config)
    found, rows = [], []
    for topology in [describe_topology(name) for name in options.topology]:
        run = make_run(config, topology, options.loss_positions)
        estimates, row = examine(run, options.programs)
        if options.search:
            row["search"] = print_search(run, options.search)
        found += estimates
        rows.append(row)
    if written is not None:
        write_text(written, json.dumps(rows, indent=2))
    if plot is not None:
        write_text(plot, bars(found))


if __name__ == "__main__":
    command.run(main, arguments)
