# SPDX-License-Identifier: Apache-2.0
"""Plan a run before renting: will it fit, what fills the memory, how fast can it be.

    python -m align_jax.plan --config=configs/dpo_7b.py --topology=v5e:8x8 --topology=v5p:2x2x2 [--search=6]
        [--json=FILE] [--plot=FILE.svg] [--config.any.key=value ...]

Compiles the very train step of the run with the TPU compiler, for chips that need not be there (libtpu is all it
takes), from shapes alone: no weights, no data.  A checkpoint on the hub is asked for its config.json; give
``model.config`` beside ``model.path`` to plan without a network.
"""
from __future__ import annotations

from collections.abc import Sequence
import json
import os
import pathlib
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported: planning must not take a machine's own chips

from absl import app, flags, logging  # noqa: E402
from jax.sharding import Mesh  # noqa: E402
from ml_collections import ConfigDict, config_flags  # noqa: E402
import numpy as np  # noqa: E402

from align_jax import run  # noqa: E402
from align_jax.core.schema import Batch  # noqa: E402
from align_jax.data import planning  # noqa: E402
from align_jax.online import writing  # noqa: E402
from align_jax.parallel.chips import GIB, Topology, describe_topology  # noqa: E402
from align_jax.parallel.mesh import make_mesh, row_shards  # noqa: E402
from align_jax.training import placement  # noqa: E402
from align_jax.training.flops import StepFlops, step_flops  # noqa: E402
from align_jax.training.forecast import Forecast, advice, forecast  # noqa: E402
from align_jax.training.search import Candidate, candidates  # noqa: E402

RESPONSES = {"completions": 1, "unpaired": 1, "pairs": 2, "ranked": 4}  # of a ranking the data says how many


class Step(NamedTuple):
    """A step ready to be lowered: everything is shapes."""

    config: ConfigDict
    recipe: Any
    plan: Any
    batch: Batch
    mesh: Mesh
    flops: StepFlops


def for_planning(config: ConfigDict) -> ConfigDict:
    """Return the config with what only a run on the spot needs replaced: TPU attention, no tokenizer from the hub."""
    with config.unlocked():
        config = config.copy_and_resolve_references()
    with config.unlocked():
        if config.model.attention == "auto":
            config.model.attention = "splash"
        if config.model.config and config.model.path:
            config.model.path, config.tokenizer = "", "byte"
    return config


def abstract_batch(config: ConfigDict, setting: run.Setting, mesh: Mesh, loss_positions: int = 0) -> Batch:
    """Return the shapes of a step's global batch, as the data layer or the rollouts would make it.

    Args:
        config: the config.
        setting: what it means.
        mesh: the mesh.
        loss_positions: P; 0 = what ``data.max_prompt_length`` leaves of a row, else the whole row.
    """
    if setting.rollouts is not None:
        return placement.abstract_batch(mesh, _rollout_batch(config, setting.rollouts))
    d, layout, kind = config.data, config.data.layout, setting.kind
    if not loss_positions and layout == "plain" and d.max_prompt_length:
        loss_positions = config.max_length - d.max_prompt_length
    shape = planning.plan_shape(
        responses=RESPONSES[kind], batch_size=config.batch_size, layout=layout, max_length=config.max_length,
        row_length=config.row_length or None, groups_per_row=d.groups_per_row or None,
        loss_positions=loss_positions or None, row_multiple=row_shards(mesh) * config.microbatches)
    mismatched = None
    if any(term.objective.mismatched for term in setting.terms):
        mismatched = planning.mismatched_shape(shape, config.max_length, shape.positions)
    batch = planning.batch_shapes(shape, kind=kind, layout=layout, mismatched=mismatched)
    if config.reference.mode == "cached":
        batch = batch._replace(reference_token_logps=np.broadcast_to(np.zeros((), np.float32), batch.tokens.shape))
    return placement.abstract_batch(mesh, batch)


def _rollout_batch(config: ConfigDict, rollouts: Any) -> Batch:
    """Return the shapes of a step on rollouts whose longest prompt fills what the completions leave."""
    shape = writing.plan_shape(
        groups=rollouts.batch_size, responses=rollouts.groups[1], prompt=config.max_length - rollouts.max_new_tokens,
        response=rollouts.max_new_tokens, layout=rollouts.layout)
    batch = planning.batch_shapes(shape, kind=rollouts.kind, layout=rollouts.layout,
                                  mismatched=shape if rollouts.mismatched else None)
    by_token = np.broadcast_to(np.zeros((), np.float32), batch.tokens.shape)
    if rollouts.targets is not None:
        batch = batch._replace(old_token_logps=by_token, advantages=by_token)
    return batch._replace(returns=by_token, old_values=by_token) if rollouts.value_head else batch


def make_step(config: ConfigDict, topology: Topology, loss_positions: int = 0) -> Step:
    """Put together the train step of a config on a topology.

    Raises:
        ValueError: what the run itself would refuse: sizes that do not divide, a mesh that is not the topology's.
    """
    setting = run.settle(config, len(topology.devices))
    mesh = make_mesh(config.mesh.to_dict(), topology.devices)
    recipe = run.make_recipe(config, setting, total_steps=1000)
    plan = run.make_plan(config, setting, recipe, mesh)
    batch = abstract_batch(config, setting, mesh, loss_positions)
    segment = config.max_length if config.data.layout != "plain" else None
    return Step(config, recipe, plan, batch, mesh, step_flops(recipe, batch, segment_length=segment))


def compile_train(step: Step, topology: Topology) -> Forecast:
    """Forecast a step's training."""
    lowered = placement.lower_train_step(step.recipe, step.plan.state, step.plan.frozen, step.batch, step.mesh, "tpu")
    return forecast(lowered, state=step.plan.state, frozen=step.plan.frozen, batch=step.batch, flops=step.flops,
                    topology=topology, mesh=step.mesh)


def advise(step: Step, found: Forecast) -> list[str]:
    """Say what to change so that the step fits; nothing where it does."""
    if found.fits:
        return []
    rows = step.batch.tokens.shape[0] / row_shards(step.mesh) / step.config.microbatches
    return advice(found, microbatches=step.config.microbatches, remat=step.config.model.remat, rows_a_device=rows,
                  adapter=bool(step.config.model.lora.rank))


def _count(number: float | int) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f} "


def _bytes(size: float | int) -> str:
    return f"{size / GIB:8.2f} GiB" if abs(size) >= GIB / 10 else f"{size / 2**20:8.2f} MiB"


def table(found: Forecast, lines: Sequence[str] = ()) -> str:
    """Write a forecast as text."""
    memory, flops, seconds = found.memory, found.flops, found.seconds
    mesh = " ".join(f"{axis}={size}" for axis, size in found.mesh.items() if size > 1) or "one device"
    state = "fits" if found.fits else "DOES NOT FIT"
    out = [f"{found.topology.name}: {found.topology.chips} chips, mesh {mesh}: {state} "
           f"(compiled in {found.compile_seconds:.0f} s)",
           f"  HBM a device   {_bytes(memory.used)} of {memory.capacity / GIB:.2f}, {memory.free / GIB:.2f} free"]
    out += [f"    {kind:<13}{_bytes(size)}" for kind, size in memory.kinds.items() if memory.complete or size]
    out += [f"  FLOPs a step   {_count(flops.model):>9}  ({_count(flops.model / flops.tokens)}a token; policy "
            f"{_count(flops.policy)}, reference {_count(flops.reference)}, statistics {_count(flops.statistics)}); "
            f"recomputed besides {_count(flops.recomputed)}"]
    if found.fits:
        out += ["  collectives a step, bytes that a chip receives"]
        out += [f"    {row['kind']:<19}{row['axes']:<12}{row['count']:>7} times {_count(row['bytes']):>9}B  "
                f"{', '.join(row['dtypes'])}" for row in found.collectives] or ["    none"]
        out += ["  seconds a step at the peaks: " + ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())]
        for name, value in (("overlapped", found.overlapped), ("exposed", found.exposed)):
            out += [f"    {name:<11}{value:8.3f} s {flops.tokens / value:12,.0f} tokens/s   MFU {found.mfu(value):.1%}"]
    out += [f"  {'!' if i == 0 else '>'} {line}" for i, line in enumerate(lines)]
    return "\n".join(out)


def search(config: ConfigDict, topology: Topology, count: int, loss_positions: int = 0
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
    setting = run.settle(config, len(topology.devices))
    found: list[tuple[Candidate, Forecast]] = []
    tried = 0
    shape = abstract_batch(config, setting, make_mesh(config.mesh.to_dict(), topology.devices)).tokens.shape
    for candidate in candidates(setting.model_config, topology, slices=topology.slices, remat=config.model.remat,
                                rows=shape[0], length=shape[1], trained_bytes=4 if config.model.lora.rank else 16):
        if tried == count:
            break
        with config.unlocked():
            other = config.copy_and_resolve_references()
        candidate.write(other)
        try:
            step = make_step(other, topology, loss_positions)
        except ValueError as error:
            logging.info("%s: %s", candidate.override(), error)
            continue
        tried += 1
        result = compile_train(step, topology)
        logging.info("%s: %s, %.2f GiB, %.3f s", candidate.override(), "fits" if result.fits else "does not fit",
                     result.memory.used / GIB, result.exposed)
        if result.fits:
            found.append((candidate, result))
    return sorted(found, key=lambda pair: pair[1].exposed)


COLOURS = {"parameters": "#4269d0", "optimizer": "#efb118", "reference": "#6cc5b0", "batch": "#9c6b4e",
           "temporaries": "#ff725c", "program": "#9498a0"}


def draw(found: Sequence[Forecast]) -> str:
    """Draw HBM by kind, a bar a topology, as SVG."""
    width, left, height = 560, 150, 26
    parts = []
    for row, one in enumerate(found):
        y, x = 40 + row * (height + 14), float(left)
        scale = width / max(one.memory.capacity, one.memory.used)
        parts.append(f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">{one.topology.name}</text>')
        for kind, size in one.memory.kinds.items():
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{size * scale:.1f}" height="{height}" '
                         f'fill="{COLOURS[kind]}"><title>{kind}: {size / GIB:.2f} GiB</title></rect>')
            x += size * scale
        end = left + one.memory.capacity * scale
        parts.append(f'<path d="M{end:.1f} {y - 3}v{height + 6}" stroke="#222" stroke-width="2"/>')
        parts.append(f'<text x="{left + width + 10}" y="{y + 17}">{one.memory.used / GIB:.1f} of '
                     f'{one.memory.capacity / GIB:.1f} GiB</text>')
    for place, (kind, colour) in enumerate(COLOURS.items()):
        parts.append(f'<rect x="{left + place * 95}" y="10" width="12" height="12" fill="{colour}"/>'
                     f'<text x="{left + 16 + place * 95}" y="20">{kind}</text>')
    total = 40 + len(found) * (height + 14) + 10
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 140}" height="{total}" '
            f'font-family="sans-serif" font-size="12">\n' + "\n".join(parts) + "\n</svg>\n")


def main(argv: Sequence[str]) -> None:
    """Run from the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; flags are --config, --topology, --search, --json, --plot")
    options = flags.FLAGS
    config = for_planning(options.config)
    found, rows = [], []
    for name in options.topology:
        topology = describe_topology(name)
        step = make_step(config, topology, options.loss_positions)
        one = compile_train(step, topology)
        lines = advise(step, one)
        print(table(one, lines), flush=True)
        row = {**one.to_dict(), "advice": lines}
        if options.search:
            better = search(config, topology, options.search, options.loss_positions)
            for candidate, result in better:
                print(f"  {result.exposed:8.3f} s exposed, {result.memory.used / GIB:6.2f} GiB  {candidate.override()}")
            print(f"  fastest that fits: {better[0][0].override()}" if better else "  nothing that was tried fits")
            row["search"] = [{"override": candidate.override(), **result.to_dict()} for candidate, result in better]
        found.append(one)
        rows.append(row)
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(rows, indent=2))
    if options.plot:
        pathlib.Path(options.plot).write_text(draw(found))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Config file, its argument after a colon.", lock_config=True)
    flags.DEFINE_multi_string("topology", None, "CHIP:AxB or CHIP:AxBxC; 2*v5e:8x8 is two slices.")
    flags.DEFINE_integer("search", 0, "Try other meshes, microbatches and remat policies: compile so many.")
    flags.DEFINE_integer("loss_positions", 0, "Loss tokens of a row at most; 0 = what data.max_prompt_length leaves.")
    flags.DEFINE_string("json", None, "Write the forecasts to this file.")
    flags.DEFINE_string("plot", None, "Draw the HBM by kind as an SVG file.")
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main)
