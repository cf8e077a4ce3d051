# SPDX-License-Identifier: Apache-2.0
"""A run from its first step to its last: what ``align_jax.train`` and the program do.

config ─ data ─ models ─ plan ─ weights ─┬─ batch ─ step ─ metrics ─┬─ checkpoint, evaluation
                                         └──────────◄───────────────┘
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from align_jax import losses
from align_jax.core import config as configs
from align_jax.core import metrics
from align_jax.core.options import LENGTHS, Config
from align_jax.core.progress import Progress
from align_jax.data.pipeline import Pipeline
from align_jax.data.sources import Source
from align_jax.interop import hf
from align_jax.models.lora import merge
from align_jax.online.rollout import Rollouts, Weights
from align_jax.parallel import compile_cache, distributed
from align_jax.parallel.chips import peak_flops
from align_jax.parallel.sharding import put_batch
from align_jax.runs import weights
from align_jax.runs.setup import Run, lower, prepare
from align_jax.runs.source import Offline, batches_of, check_source, make_source
from align_jax.runs.trained import open_checkpoints
from align_jax.storage import lock
from align_jax.storage import workdir as record
from align_jax.storage.checkpoint import Checkpoints
from align_jax.training import debug, evaluation, initialize, partitioning
from align_jax.training.flops import step_flops


def start(run: Run, checkpoints: Checkpoints) -> tuple[int, Any, Any, dict[str, Any]]:
    """Load the weights, or restore the state of a run that is to go on.

    Returns:
        (finished steps, state, frozen, what was saved beside the state).
    """
    config, which = run.config, str(run.config.checkpoint.restore)
    restored = checkpoints.restore(
        run.state_specs.state,
        which,
        rewind=True,
        usable=functools.partial(check_source, run.train, run.workdir),
    )
    if restored is None:
        frozen, trained = weights.load_start(run.step_spec, run.state_specs, config)
        moving = weights.load_moving_reference(run.step_spec, run.state_specs, config)
        state = initialize.first_state(run.step_spec, run.state_specs, trained, moving)
        return 0, state, frozen, {}
    frozen = weights.load_frozen(run.step_spec, run.state_specs, config)
    if not restored.own:  # where another run stood in its data is not where this one begins
        return 0, restored.state, frozen, {}
    return restored.step, restored.state, frozen, restored.extra


def weights_of(state: Any, frozen: Any) -> Weights:
    """Return what an online source generates with, and its reference."""
    reference = frozen.get("reference", frozen["base"])
    if "reference" in state:  # it moves with the policy
        reference = merge(frozen["base"], state["reference"])
    return Weights(merge(frozen["base"], state["params"]), reference)


def make_evaluation(
    run: Run, source: Offline | Rollouts
) -> Callable[[Any, Any], dict[str, float]] | None:
    """Return a function from (state, frozen) to the held-out set's means; None where nothing is
    held out.

    Of examples the means are those of the eval step; of prompts, those of the policy's samples, and
    ``ptx_nll`` of held-out text.
    """
    if run.held_out is None:
        return None
    if run.eval is None:
        of_samples = _of_samples(run, source)
        return of_samples if run.eval_text is None else _with_text(run, run.eval_text, of_samples)
    held_out = batches_of(run, run.eval, run.held_out)

    def batches() -> Iterator[Any]:
        return (put_batch(run.mesh, batch) for batch in held_out(0))

    return evaluation.make_evaluation(run.step_spec, run.mesh, batches)


def _with_text(
    run: Run, text: Pipeline, of_samples: Callable[[Any, Any], dict[str, float]]
) -> Callable[[Any, Any], dict[str, float]]:
    """Add what the policy says of held-out text, at temperature 1 as where it is learned."""
    spec = run.step_spec._replace(terms=losses.resolve("sft"), temperature=1.0)

    def batches() -> Iterator[Any]:
        return (put_batch(run.mesh, batch) for batch in text.iterator(0))

    of_text = evaluation.make_evaluation(spec, run.mesh, batches)

    def evaluate(state: Any, frozen: Any) -> dict[str, float]:
        return of_samples(state, frozen) | {"ptx_nll": of_text(state, frozen)["nll"]}

    return evaluate


TO_TEACHER = ("divergence", "reverse_kl")  # metrics of samples alone, whatever they are worth


def _of_samples(run: Run, source: Offline | Rollouts) -> Callable[[Any, Any], dict[str, float]]:
    """Return a function from (state, frozen) to what is said of the held-out prompts' samples; of
    distillation, how far the student is from its teacher on them."""
    terms = run.step_spec.terms
    taught = tuple(one for one in terms if one.loss.own_share or one.loss.teacher_answers)
    step = partitioning.jit_eval_step(run.step_spec._replace(terms=taught), run.mesh)

    def evaluate(state: Any, frozen: Any) -> dict[str, float]:
        values, samples = source.evaluate(weights_of(state, frozen))
        sums: metrics.Sums | None = None
        for batch in samples if taught else ():
            sums = metrics.add_sums(sums, step(state, frozen, put_batch(run.mesh, batch)))
        found = metrics.means(sums or {})
        return values | {name: found[name] for name in TO_TEACHER if name in found}

    return evaluate


def rows_of(run: Run, batch: Any) -> str:
    """Name the rows of a batch (this process's), for an error's reader."""
    rows = [run.examples[i].source for i in batch.example_index.tolist() if i >= 0]
    return ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")


def train(
    config: configs.ConfigDict | Config,
    workdir: str,
    *,
    given: Mapping[str, Source] | None = None,
    writers: Sequence[metrics.Writer] = (),
) -> dict[str, float]:
    """Train; resume if the workdir holds a run of the same config.

    Args:
        config: see ``core.options``.
        workdir: local path or gs://...
        given: name in ``config.data`` -> the rows from Python that it stands for.
        writers: are handed each row of metrics, too; on the first process.

    Returns:
        The last evaluation's metrics, {} without one.
    """
    config = configs.read(config)
    distributed.start()
    compile_cache.keep(config.debug.compile_cache)
    run = prepare(config, workdir, given=given)
    config = run.config  # with what the run's first start has fixed
    main_process = distributed.is_main()
    with (
        lock.hold(workdir) if main_process else contextlib.nullcontext(),
        jax.set_mesh(run.mesh),
        open_checkpoints(config, workdir) as checkpoints,
        distributed.stop_signal() as stop,
    ):
        if main_process:
            record.write_record(workdir, configs.to_dict(config), run.total_steps)
        first, state, frozen, extra = start(run, checkpoints)
        opened = (
            metrics.open_writers(
                workdir,
                start_step=first,
                tensorboard=config.log.tensorboard,
                wandb=config.log.wandb,
                trackio=config.log.trackio,
                config=configs.to_dict(config),
            )
            if main_process
            else []
        )
        if main_process:
            opened += writers
        bar = Progress(
            run.total_steps,
            start_step=first,
            every_steps=config.log.every_steps,
            shown=main_process,
        )
        recorder = metrics.Recorder(
            opened,
            bar,
            every_steps=config.log.every_steps,
            start_step=first,
            start_tokens=extra.get("num_tokens", 0),
            flops_per_step=model_flops(run),
            peak_flops=peak_flops(run.mesh.devices.flatten().tolist()),
        )
        for line in describe(run, first):
            recorder.note(line)
        batches = make_source(run, first, extra.get("source", {}))
        try:
            stopping = evaluation.Stopping(*extra.get("stopping", ()))
            return loop(run, checkpoints, recorder, stop, first, state, frozen, batches, stopping)
        finally:
            batches.close()
            recorder.close()


def loop(
    run: Run,
    checkpoints: Checkpoints,
    recorder: metrics.Recorder,
    stop: Callable[[int], bool],
    first: int,
    state: Any,
    frozen: Any,
    batches: Offline | Rollouts,
    early: evaluation.Stopping,
) -> dict[str, float]:
    """Step until the end, a stop signal or the last evaluation that early stopping waits for; log,
    evaluate and save on schedule."""
    config, folder, last_eval = run.config, epath.Path(run.workdir), {}
    evaluate = make_evaluation(run, batches)
    train_step = partitioning.jit_train_step(run.step_spec, run.state_specs.state, run.mesh)
    recent: dict[int, Any] = {}  # the last two steps' batches, on the host

    def check(arrived: tuple[int, dict[str, float]] | None) -> None:
        if arrived is None:
            return
        step, values = arrived
        try:
            metrics.check_finite(
                values,
                step=step,
                saved=checkpoints.last_good(),
                position=functools.partial(rows_of, run, recent[step]),
            )
        except FloatingPointError:
            if config.debug.nan_check:
                recorder.note(
                    debug.find_nan(run.step_spec, state, frozen, put_batch(run.mesh, recent[step]))
                )
            raise

    def newest_weights() -> Weights:
        return weights_of(state, frozen)

    def evaluate_at(step: int) -> dict[str, float]:
        nonlocal early
        assert evaluate is not None
        values = {f"eval/{name}": value for name, value in evaluate(state, frozen).items()}
        recorder.write(step, values)
        recorder.note(summary(step, values))
        early = early.after(step, values, config.eval)
        checkpoints.check_measured(values)
        return values

    last_step = first if early.is_spent(config.eval) else run.total_steps
    if first < last_step:
        checkpoints.check_room(state)  # not after the hours until the first save
        recorder.note("compiling: the first evaluation and the first step take longest")
    else:
        recorder.note(nothing_left(run, first, early))
    if evaluate is not None and first == 0:
        last_eval = evaluate_at(0)
    if config.debug.dump_hlo:
        debug.dump_hlo(folder / "hlo", lower(run))
    with debug.traced(folder / "profile", config.debug.profile_steps) as before:
        for step in range(first + 1, last_step + 1):
            before(step)
            recent = {step - 1: recent.get(step - 1), step: batches.next(newest_weights)}
            batch = put_batch(run.mesh, recent[step])
            with jax.transfer_guard("disallow"):
                state, values = train_step(state, frozen, batch)
            check(recorder.push(step, {**values, **batches.metrics}))
            if step == config.debug.memory_profile_step:
                debug.save_memory_profile(folder, step)
            logged = config.rollout.log_samples_every_steps
            if distributed.is_main() and logged and step % logged == 0:
                if samples := batches.log_samples(folder, step):
                    recorder.show_samples(step, samples)
            done, stopping = step == run.total_steps, stop(step)
            evaluating = evaluate is not None and (
                done or config.eval.every_steps and step % config.eval.every_steps == 0
            )
            saving = "persistent" if done or stopping else checkpoints.due(step)
            if evaluating or saving:
                check(recorder.flush())
            with recorder.paused():
                if evaluating:
                    last_eval = evaluate_at(step)
                    if early.is_spent(config.eval):
                        done, saving = True, "persistent"
                if saving:
                    recorder.sync()
                    extra = {
                        "num_tokens": recorder.num_tokens,
                        "source": batches.save(folder, step, kept=checkpoints.resumable()),
                        "stopping": list(early),
                    }
                    checkpoints.save(
                        step,
                        state,
                        extra,
                        last_eval if evaluating else None,
                        tier=saving,
                        wait=done or stopping,
                    )
            if early.is_spent(config.eval):
                recorder.note(early.words(config.eval))
                break
            if stopping and not done:
                recorder.note(
                    f"stopped by a signal after step {step}, which is saved; the same command "
                    "resumes"
                )
                break
    return last_eval


def nothing_left(run: Run, first: int, early: evaluation.Stopping) -> str:
    """Say that a run that was started again had come to its end, and which key lets it go on."""
    key = next(name for name in LENGTHS if getattr(run.config, name))
    given, end = f"config.{key} = {getattr(run.config, key):g}", ""
    if early.is_spent(run.config.eval):
        given, end = (
            f"config.eval.patience = {run.config.eval.patience}",
            ", where it stopped early",
        )
    elif key != LENGTHS[0]:
        given += f" ({run.total_steps} steps)"
    return (
        f"nothing left to train: step {first} is saved{end}, and {given}; raise it to go on, or "
        "name another workdir to begin anew"
    )


def model_flops(run: Run) -> float:
    """Count the model FLOPs of a step, for the utilization of the chips."""
    packed = run.config.data.layout != "plain"
    return step_flops(
        run.step_spec,
        run.train.abstract(),
        segment_length=run.config.max_length if packed else None,
    ).model


def _grown(run: Run) -> list[str]:
    """Name the tokens that the checkpoint has no rows for."""
    new, resolved = run.resolved.new_tokens, run.resolved
    if not new:
        return []
    lora = resolved.models.policy.options.lora
    trained = lora is None or {*lora.whole} & {"embed/tokens"} or lora.tokens or lora.on("embed")
    more = f" and {len(new) - 10} more" if len(new) > 10 else ""
    size = resolved.model_config.vocab_size
    return [
        f"vocabulary: grown from {size - len(new)} to the tokenizer's {size} by "
        f"{', '.join(new[:10])}{more}; a new token's row is the mean of the others"
        + ("" if trained else " and is not trained (model.lora.tokens=new)")
    ]


def describe(run: Run, first: int = 0) -> list[str]:
    """Say in a few lines what is about to run, after ``first`` steps."""
    shape, mesh = run.train.shape, {axis: size for axis, size in run.mesh.shape.items() if size > 1}
    trained, frozen = (
        initialize.count(run.state_specs.trained),
        initialize.count(run.state_specs.frozen),
    )
    groups = run.train.report.get("groups_per_step", shape.groups)
    resumed = []
    if first and run.resolved.rollouts is not None and run.config.rollout.overlap:
        resumed = [
            "config.rollout.overlap: the rollout that was being made when the run stopped is made "
            "anew with these weights, so what follows is not the same to the bit"
        ]
    policy = run.resolved.models.policy
    rope, alone = policy.config.rope_note(), hf.not_exported(policy.config, policy.options.heads)
    return [
        f"{run.config.objective.name}: {run.train.num_examples} examples, {run.total_steps} steps "
        f"of {groups:.4g} groups in {shape.rows} rows of {shape.length} tokens "
        f"({run.config.data.layout})",
        f"parameters: {trained:,} trained, {frozen:,} frozen; devices: {jax.device_count()} "
        f"{jax.devices()[0].device_kind}{f' {mesh}' if mesh else ''}",
        "data: "
        + ", ".join(
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in {**run.examples.report, **run.train.report}.items()
        ),
        *([rope] if rope else []),
        *([alone] if alone else []),
        *_grown(run),
        *resumed,
    ]


def summary(step: int, values: dict[str, float]) -> str:
    """Write an evaluation on one line."""
    shown = (
        "loss",
        "rewards/accuracies",
        "rewards/margins",
        "accuracy",
        "margin",
        "absolute_error",
        "divergence",
        "reverse_kl",
        "nll",
        "ptx_nll",
        "kl",
        "reward",
    )
    names = [name for name in shown if f"eval/{name}" in values]
    names = names or [name.removeprefix("eval/") for name in values][:4]
    found = [f"{name} {values[f'eval/{name}']:.4g}" for name in names]
    return f"eval at step {step}: " + ", ".join(found)
