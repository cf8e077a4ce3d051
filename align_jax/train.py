# SPDX-License-Identifier: Apache-2.0
"""Train a model on preferences.

    python -m align_jax.train --config=configs/dpo_7b.py --workdir=gs://bucket/run [--config.any.key=value ...]

    config ─ data ─ models ─ plan ─ weights ─┬─ batch ─ step ─ metrics ─┬─ checkpoint, evaluation
                                             └──────────◄───────────────┘
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
import functools
from typing import Any, NamedTuple

from absl import app, flags, logging
from etils import epath
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags
import tqdm

from align_jax import losses
from align_jax.core import config as configs
from align_jax.core import metrics
from align_jax.core.progress import Progress
from align_jax.data import datasets, pipeline
from align_jax.data.datasets import Examples
from align_jax.data.pipeline import Pipeline
from align_jax.data.tokenizer import fingerprint, load_tokenizer
from align_jax.losses.objective import Term, data_kind
from align_jax.models import hf
from align_jax.models.config import ModelConfig
from align_jax.models.lora import LoraConfig
from align_jax.parallel import distributed
from align_jax.parallel.mesh import AXES, make_mesh, mesh_shape, row_shards
from align_jax.parallel.sharding import put_batch
from align_jax.training import assembly, optim, placement, reference
from align_jax.training import workdir as record
from align_jax.training.checkpoint import Checkpoints
from align_jax.training.steps import Recipe, reference_step


class Setting(NamedTuple):
    """What a config means before any weight or example is read."""

    terms: tuple[Term, ...]
    tokenizer: Any
    model_config: ModelConfig
    models: assembly.Models
    kind: str


def objective_terms(config: ConfigDict) -> tuple[Term, ...]:
    """Resolve the objective and its options."""
    options = {key: value for key, value in config.objective.items() if key not in ("name", "weights")}
    return losses.resolve(config.objective.name, options, config.objective.weights or None)


def settle(config: ConfigDict, devices: int) -> Setting:
    """Turn a config into terms, tokenizer and models; every mistake that needs no data is found here.

    Args:
        config: the config.
        devices: how many there are (the vocabulary is padded to what the mesh's tensor axis divides).

    Raises:
        ValueError, KeyError, FileNotFoundError: what was expected, what was got, the nearest fix.
    """
    configs.validate(config)
    terms = objective_terms(config)
    tokenizer = load_tokenizer(config.tokenizer or config.model.path or "byte",
                               chat_template=config.data.chat_template or None)
    if config.model.path:
        model_config = hf.load_config(config.model.path)
    else:
        fields = {"vocab_size": len(tokenizer), **config.model.config.to_dict()}
        model_config = hf.config_from({"model_type": config.model.family, **fields})
    model_config = model_config.padded(mesh_shape(config.mesh.to_dict(), devices)[AXES.index("tensor")])
    if len(tokenizer) > model_config.vocab_size:
        raise ValueError(f"the tokenizer {config.tokenizer or config.model.path!r} has {len(tokenizer)} tokens, the "
                         f"model's vocabulary only {model_config.vocab_size}; use the model's own tokenizer")
    if config.max_length > model_config.max_positions:
        raise ValueError(f"config.max_length = {config.max_length} exceeds the {model_config.max_positions} positions "
                         "of the model (max_position_embeddings)")
    if config.reference.mode == "cached" and any("kl" in term.needs for term in terms):
        raise ValueError("config.reference.mode = 'cached' keeps token log-probabilities; the objective "
                         f"{config.objective.name!r} needs whole distributions of the reference; use in_graph")
    if config.reference.mode == "cached" and any(term.objective.mismatched for term in terms):
        raise ValueError(f"config.reference.mode = 'cached' does not hold the mismatched pairs of the objective "
                         f"{config.objective.name!r}; use in_graph, or kto_zero")
    rank, options = config.model.lora.rank, config.model.lora
    lora = LoraConfig(rank, alpha=options.alpha, dropout=options.dropout, targets=options.targets,
                      rank_stabilised=options.rslora, dora=options.dora) if rank else None
    models = assembly.make_models(
        model_config, terms, compute_dtype=config.model.compute_dtype, remat=config.model.remat,
        attention=config.model.attention, lora=lora, value_head=config.model.value_head)
    return Setting(terms, tokenizer, model_config, models, data_kind(terms))


def make_recipe(config: ConfigDict, setting: Setting, total_steps: int) -> Recipe:
    """Put together what the steps are compiled from."""
    o = config.optimizer
    schedule = optim.make_schedule(learning_rate=o.learning_rate, schedule=o.schedule, total_steps=total_steps,
                                   warmup_steps=o.warmup_steps, warmup_fraction=o.warmup_fraction,
                                   final_fraction=o.final_fraction)
    optimizer = optim.make_optimizer(schedule, name=o.name, weight_decay=o.weight_decay, clip_norm=o.clip_norm,
                                     b1=o.b1, b2=o.b2, eps=o.eps, moment_dtype=o.moment_dtype)
    return Recipe(setting.models.policy, setting.models.base, setting.terms, optimizer, schedule,
                  microbatches=config.microbatches, seed=config.seed, value_head=config.model.value_head,
                  load_balancing=config.model.load_balancing,
                  sync_every_steps=config.reference.sync_every_steps, mix=config.reference.mix)


def make_plan(config: ConfigDict, recipe: Recipe, mesh: Mesh) -> assembly.Plan:
    """Say what lies where on the mesh."""
    frozen_dtype = config.reference.dtype
    return assembly.make_plan(
        recipe, mesh, param_dtype=config.model.param_dtype, frozen_dtype=frozen_dtype, freeze=config.model.freeze,
        other_reference=bool(config.reference.path), reference_in_graph=config.reference.mode == "in_graph")


class Run(NamedTuple):
    """A run ready to step: everything the loop touches."""

    config: ConfigDict
    workdir: str
    mesh: Mesh
    setting: Setting
    recipe: Recipe
    plan: assembly.Plan
    train: Pipeline
    eval: Pipeline | None
    examples: Examples
    held_out: Examples | None
    total_steps: int


def read_data(config: ConfigDict, setting: Setting) -> tuple[Examples, Examples | None]:
    """Read the training and the held-out examples; every malformed row is found here."""
    d = config.data
    load = functools.partial(
        datasets.load, kind=setting.kind, chat=bool(setting.tokenizer.chat_template), seed=config.seed,
        format=None if d.format == "auto" else d.format, columns=d.columns.to_dict(), **d.options.to_dict())
    examples = load(d.train.split(","), weights=tuple(d.weights) or None)
    if d.eval:
        return examples, load(d.eval.split(","), limit=config.eval.max_examples or None)
    return datasets.hold_out(examples, d.eval_fraction, most=config.eval.max_examples, seed=config.seed)


def make_pipeline(config: ConfigDict, setting: Setting, mesh: Mesh, examples: Examples, *, once: bool) -> Pipeline:
    """Tokenize and pack examples: for training (shuffled, endless), or once in fixed order (evaluation)."""
    d, shards = config.data, row_shards(mesh)
    return pipeline.make_pipeline(
        examples, setting.tokenizer, layout=d.layout, max_length=config.max_length,
        row_length=config.row_length or None, groups_per_row=d.groups_per_row or None,
        truncation=d.truncation, max_prompt_length=d.max_prompt_length or None, trim=d.trim, seed=config.seed,
        prefetch=d.prefetch, control=tuple(d.control_tokens) or None, cache_dir=d.cache or None,
        mismatched=any(term.objective.mismatched for term in setting.terms),
        process_index=jax.process_index(), process_count=jax.process_count(), shuffle=d.shuffle and not once,
        repeat=not once, batch_size=(once and config.eval.batch_size) or config.batch_size,
        row_multiple=shards * (1 if once else config.microbatches))


def prepare(config: ConfigDict, workdir: str) -> Run:
    """Check the config, index the data, plan the parameters; nothing is compiled and no weight is read.

    Raises:
        ValueError, KeyError, FileNotFoundError: a mistake in the config, the data or the workdir.
    """
    setting = settle(config, jax.device_count())
    record.check(workdir, config.to_dict())
    mesh = make_mesh(config.mesh.to_dict())
    examples, held_out = read_data(config, setting)
    train = make_pipeline(config, setting, mesh, examples, once=False)
    held = None if held_out is None else make_pipeline(config, setting, mesh, held_out, once=True)
    total = configs.resolve_steps(config, train.steps_per_epoch)
    recipe = make_recipe(config, setting, total)
    plan = make_plan(config, recipe, mesh)
    return Run(config, workdir, mesh, setting, recipe, plan, train, held, examples, held_out, total)


def start(run: Run, checkpoints: Checkpoints) -> tuple[int, Any, Any, dict[str, Any]]:
    """Load the weights, or restore the state of a run that is to go on.

    Returns:
        (finished steps, state, frozen, what was saved beside the state).
    """
    config, which = run.config, str(run.config.checkpoint.restore)
    frozen = assembly.load_frozen(run.recipe, run.plan, path=config.model.path, seed=config.seed,
                                  reference_path=config.reference.path)
    restored = checkpoints.restore(run.plan.state, which, rewind=True)
    if restored is None:
        trained = assembly.load_trained(run.recipe, run.plan, frozen, path=config.model.path, seed=config.seed)
        return 0, assembly.first_state(run.recipe, run.plan, trained), frozen, {}
    own = checkpoints.last_good() == restored.step
    return (restored.step if own else 0), restored.state, frozen, restored.extra


def cached_reference(run: Run, examples: Examples) -> reference.Cache:
    """Read the reference's token log-probabilities of a data set from disk, or compute and keep them."""
    config, r = run.config, run.config.reference
    path = r.path or config.model.path
    identity = {
        "examples": examples.identity, "tokenizer": fingerprint(run.setting.tokenizer), "max_length": config.max_length,
        "truncation": [config.data.truncation, config.data.max_prompt_length, list(config.data.control_tokens)],
        "weights": reference.weights_identity(hf.locate(path) if path else None, config.seed),
        "model": repr(run.setting.model_config), "types": [r.dtype, config.model.compute_dtype]}
    file = epath.Path(r.cache or epath.Path(run.workdir) / "reference") / f"{reference.name_of(identity)}.npz"
    if (found := reference.load(file, identity)) is not None:
        return found
    with config.unlocked():
        in_graph = config.copy_and_resolve_references()
    in_graph.reference.mode = "in_graph"
    plan = make_plan(in_graph, run.recipe, run.mesh)
    frozen = assembly.load_frozen(run.recipe, plan, path=config.model.path, seed=config.seed, reference_path=r.path)
    step = jax.jit(functools.partial(reference_step, run.recipe))
    batches = make_pipeline(config, run.setting, run.mesh, examples, once=True).iterator()
    cache = reference.compute(tqdm.tqdm(batches, desc="reference", disable=None),
                              lambda batch: step(frozen, put_batch(run.mesh, batch)), len(examples))
    if distributed.is_main():
        reference.save(file, cache, identity)
    return cache


def batches_of(run: Run, source: Pipeline, examples: Examples) -> Callable[[int], Iterator[Any]]:
    """Return a function from a step to this process's batches from there on, the cached reference filled in."""
    if run.config.reference.mode != "cached" or not run.recipe.wants_reference:
        return source.iterator
    cache = cached_reference(run, examples)
    return lambda step: map(cache.fill, source.iterator(step))


def evaluate(run: Run, batches: Iterable[Any], step: Any, state: Any, frozen: Any) -> dict[str, float]:
    """Run the eval step over the held-out set and return its means, named ``eval/...``."""
    sums = None
    for batch in batches:
        sums = metrics.add_sums(sums, step(state, frozen, put_batch(run.mesh, batch)))
    return {f"eval/{name}": value for name, value in metrics.means(sums).items()}


def rows_of(run: Run, step: int) -> str:
    """Name the rows of a step's batch, for an error's reader."""
    places = [run.examples[i].source for i in run.train.examples_of(step - 1)]
    return ", ".join(places[:8]) + (f" and {len(places) - 8} more" if len(places) > 8 else "")


def train(config: ConfigDict, workdir: str) -> dict[str, float]:
    """Train; resume if the workdir holds a run of the same config.

    Args:
        config: see ``core.config.defaults``.
        workdir: local path or gs://...

    Returns:
        The last evaluation's metrics, {} without one.
    """
    distributed.start()
    run = prepare(config, workdir)
    main_process, c = jax.process_index() == 0, config.checkpoint
    if main_process:
        record.write_record(workdir, config.to_dict())
    checkpoints = Checkpoints(workdir, every_steps=c.every_steps, keep=c.keep, best_metric=c.best_metric.lstrip("-"),
                              best_mode="min" if c.best_metric.startswith("-") else "max")
    with jax.set_mesh(run.mesh), checkpoints, distributed.stop_signal() as stop:
        first, state, frozen, extra = start(run, checkpoints)
        writers = metrics.open_writers(workdir, start_step=first, tensorboard=config.log.tensorboard,
                                       wandb=config.log.wandb, config=config.to_dict()) if main_process else []
        bar = Progress(run.total_steps, start_step=first, every_steps=config.log.every_steps, shown=main_process)
        recorder = metrics.Recorder(writers, bar, every_steps=config.log.every_steps, start_step=first,
                                    start_tokens=extra.get("num_tokens", 0))
        for line in describe(run):
            recorder.note(line)
        try:
            return loop(run, checkpoints, recorder, stop, first, state, frozen)
        finally:
            recorder.close()


def loop(run: Run, checkpoints: Checkpoints, recorder: metrics.Recorder, stop: Any, first: int, state: Any,
         frozen: Any) -> dict[str, float]:
    """Step until the end or a stop signal; log, evaluate and save on schedule."""
    config, last_eval = run.config, {}
    training = batches_of(run, run.train, run.examples)
    evaluation = None if run.eval is None else batches_of(run, run.eval, run.held_out)
    train_step = placement.jit_train_step(run.recipe, run.plan.state, run.mesh)
    eval_step = placement.jit_eval_step(run.recipe, run.mesh)

    def check(arrived: tuple[int, dict[str, float]] | None) -> None:
        if arrived is not None:
            step, values = arrived
            metrics.check_finite(values, step=step, saved=checkpoints.last_good(), position=rows_of(run, step))

    if evaluation is not None and first == 0:
        last_eval = evaluate(run, evaluation(0), eval_step, state, frozen)
        recorder.write(0, last_eval)
        recorder.note(summary(0, last_eval))
    batches = training(first)
    for step in range(first + 1, run.total_steps + 1):
        batch = put_batch(run.mesh, next(batches))
        with jax.transfer_guard("disallow"):
            state, values = train_step(state, frozen, batch)
        check(recorder.push(step, values))
        done, stopping = step == run.total_steps, stop(step)
        evaluating = evaluation is not None and (
            done or config.eval.every_steps and step % config.eval.every_steps == 0)
        saving = done or stopping or checkpoints.due(step)
        if evaluating or saving:
            check(recorder.flush())
            with recorder.paused():
                if evaluating:
                    last_eval = evaluate(run, evaluation(0), eval_step, state, frozen)
                    recorder.write(step, last_eval)
                    recorder.note(summary(step, last_eval))
                if saving:
                    checkpoints.save(step, state, {"num_tokens": recorder.num_tokens},
                                     last_eval if evaluating else None, wait=done or stopping)
        if stopping and not done:
            recorder.note(f"stopped by a signal after step {step}, which is saved; the same command resumes")
            break
    return last_eval


def describe(run: Run) -> list[str]:
    """Say in a few lines what is about to run."""
    shape, mesh = run.train.shape, {axis: size for axis, size in run.mesh.shape.items() if size > 1}
    trained, frozen = assembly.count(run.plan.trained), assembly.count(run.plan.frozen)
    return [
        f"{run.config.objective.name}: {run.train.num_examples} examples, {run.total_steps} steps of "
        f"{shape.groups} groups in {shape.rows} rows of {shape.length} tokens",
        f"parameters: {trained:,} trained, {frozen:,} frozen; devices: {jax.device_count()} "
        f"{jax.devices()[0].device_kind} {mesh or ''}",
        "data: " + ", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                             for name, value in {**run.examples.report, **run.train.report}.items()),
    ]


def summary(step: int, values: dict[str, float]) -> str:
    """Write an evaluation on one line."""
    shown = ("loss", "rewards/accuracies", "rewards/margins", "accuracy", "margin", "nll", "kl")
    found = [f"{name} {values[f'eval/{name}']:.4g}" for name in shown if f"eval/{name}" in values]
    return f"eval at step {step}: " + ", ".join(found)


def main(argv: Sequence[str]) -> None:
    """Run from the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; flags are --config, --config.KEY=VALUE and --workdir")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells much of little
    train(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Config file, its argument after a colon.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Folder of the run: a local path or gs://...; restarting resumes it.")
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
