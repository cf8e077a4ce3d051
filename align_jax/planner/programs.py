# SPDX-License-Identifier: Apache-2.0
"""Every program of a run, lowered for a topology from shapes alone.

train ─ eval ─ reference (where its log-probabilities are cached)
online: prefill ─ decode (a loop: one token a row) ─ reward NAME ─ rescore ─ rescore reference
        (with an environment also prefill and decode of later turns, but where the cache is kept
        decode alone; of ReMax the greedy ones; where samples meet another player's, the opponent's)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from align_jax.core.options import RolloutOptions
from align_jax.core.schema import Batch
from align_jax.inference import score
from align_jax.inference.generate import Lowered, Request
from align_jax.inference.mixture import Mixture
from align_jax.inference.resharding import decode_specs
from align_jax.inference.samplers import Sampling
from align_jax.models.lora import merge
from align_jax.models.model import Model
from align_jax.online import batches
from align_jax.online.config import RolloutConfig
from align_jax.online.environment import later_room, turn_tokens
from align_jax.online.generators import generation_mesh, make_generator, make_mixture
from align_jax.online.partners import others
from align_jax.parallel.lowering import lower
from align_jax.parallel.sharding import row_sharding
from align_jax.planner.abstract_run import AbstractRun, RewardModel, rollout_batch
from align_jax.planner.communication import ModelCall, lower_bound, model_calls
from align_jax.planner.cost_model import Program
from align_jax.training import partitioning
from align_jax.training.flops import StepFlops, decode_flops, forward_flops, step_flops

PLATFORM = "tpu"


def lowered_programs(run: AbstractRun, wanted: Sequence[str] = ()) -> list[Program]:
    """Lower a run's programs.

    Args:
        run: the run.
        wanted: names of those to return; none: all.

    Raises:
        ValueError: a program that the run has not.
    """
    programs = [train_program(run)] if not wanted or "train" in wanted else []
    if list(wanted) != ["train"]:
        programs += other_programs(run)
    names = [program.name for program in programs]
    if unknown := sorted(set(wanted) - set(names)):
        others = ", ".join(name for name in names if name != "train")
        raise ValueError(f"--programs: this run has no {unknown}; it has train, {others}")
    return [program for program in programs if not wanted or program.name in wanted]


def train_program(run: AbstractRun) -> Program:
    """Lower the run's train step."""
    spec, specs, batch = run.spec, run.specs, run.batch()
    bound = lower_bound(
        model_calls(spec, specs, batch), run.mesh.shape, specs.trained, spec.microbatches
    )
    return Program(
        "train",
        partitioning.lower_train_step(spec, specs.state, specs.frozen, batch, run.mesh, PLATFORM),
        (specs.state, specs.frozen, batch),
        {**run.resident, "batch": batch},
        step_flops(spec, batch, segment_length=run.segment_length),
        bound,
        runs=1 if run.rollouts is None else run.rollouts.steps,
    )


def other_programs(run: AbstractRun) -> Iterator[Program]:
    """Lower what the run compiles beside its train step."""
    if run.rollouts is not None:
        yield from rollout_programs(run, run.rollouts)
        return
    batch = run.batch(train=False)
    if run.config.data.eval or run.config.data.eval_fraction:
        yield _eval_program(run, batch)
    if run.config.reference.mode == "cached" and run.spec.wants_reference:
        yield _reference_program(run, batch._replace(reference_token_logps=None))


def _eval_program(run: AbstractRun, batch: Batch) -> Program:
    spec, specs = run.spec, run.specs
    arguments = (specs.state, specs.frozen, batch)
    step = partitioning.jit_eval_step(spec, run.mesh)
    return Program(
        "eval",
        lower(step, run.mesh, *arguments, platform=PLATFORM),
        arguments,
        {**run.resident, "batch": batch},
        step_flops(spec, batch, segment_length=run.segment_length, train=False),
        lower_bound(model_calls(spec, specs, batch, train=False), run.mesh.shape),
    )


def _reference_program(run: AbstractRun, batch: Batch) -> Program:
    """Lower what fills the cache of the reference's log-probabilities, its weights beside the
    run's."""
    spec, frozen = run.spec, run.reference_specs.frozen
    flops = step_flops(spec, batch, segment_length=run.segment_length, train=False)
    weights = frozen.get("reference", frozen["base"])
    return Program(
        "reference",
        lower(partitioning.jit_reference_step(spec), run.mesh, frozen, batch, platform=PLATFORM),
        (frozen, batch),
        {**run.resident, "reference": frozen, "batch": batch},
        dataclasses.replace(flops, policy=0.0, statistics=0.0),
        lower_bound([_call(spec.reference, weights, batch)], run.mesh.shape),
    )


def rollout_programs(run: AbstractRun, rollouts: RolloutConfig) -> Iterator[Program]:
    """Lower what a rollout runs."""
    policy, options = merge(run.specs.base, run.specs.trained), rollouts.options
    reference, held = _reference(run, policy)
    both = [(run.spec.policy, policy), (reference, held)]
    own = rollouts.own_prompts
    if not options.server.url and own:
        weights = both if rollouts.reference_share else both[:1]
        yield from _generation(run, rollouts, weights, own)
    if options.against == "reference":
        yield from _generation(run, rollouts, both[1:], own, " opponent")
    if options.against == "mixture":
        yield from _generation(run, rollouts, both, own, " opponent")
    if rollouts.taught:
        yield from _generation(run, rollouts, both[1:], options.prompts - own, " teacher")
    for name, reward in run.rewards.items():
        beside = rollouts.greedy + others(options)  # what is scored of each prompt, too
        samples = rollouts.samples + rollouts.sampled_prompts * beside
        yield _reward_program(run, name, reward, samples)
    if rollouts.targets is None:  # the objective takes no old or reference log-probabilities
        return
    groups = np.arange(rollouts.batch_size // rollouts.microbatches)
    host = rollout_batch(run.config, rollouts, run.mesh)._replace(mismatched=None, text=None)
    part = partitioning.abstract_batch(run.mesh, batches.take(host, groups))
    fields = rollouts.token_fields
    if rollouts.options.rescore or rollouts.value_head or fields:
        head, model = rollouts.value_head, run.spec.policy
        yield _rescore(run, rollouts, "rescore", model, policy, part, head, fields)
    if rollouts.needs_reference:
        yield _rescore(run, rollouts, "rescore reference", reference, held, part, "")


def _reference(run: AbstractRun, policy: Any) -> tuple[Model, Any]:
    """Return the reference and its weights, shapes: where it moves, a policy of an earlier step."""
    if run.spec.sync_every_steps:
        return run.spec.policy, policy
    weights = run.specs.reference
    return run.spec.reference, run.specs.base if weights is None else weights


def _rescore(
    run: AbstractRun,
    rollouts: RolloutConfig,
    name: str,
    model: Model,
    params: Any,
    part: Batch,
    value_head: str,
    needs: tuple[str, ...] = (),
) -> Program:
    static = {"value_head": value_head, "needs": needs, "temperature": rollouts.temperature}
    call = _call(model, params, part)
    return Program(
        name,
        lower(score.outputs_of, run.mesh, model, params, part, platform=PLATFORM, **static),
        (params, part),
        {**run.resident, "batch": part},
        _forward(call),
        lower_bound([call], run.mesh.shape),
        runs=rollouts.slices * rollouts.microbatches,
    )


def _reward_program(run: AbstractRun, name: str, reward: RewardModel, samples: int) -> Program:
    """Lower what scores texts of the greatest length."""
    rows, sharding = reward.rows, row_sharding(run.mesh)
    tokens = jax.ShapeDtypeStruct((rows, reward.length), np.int32, sharding=sharding)
    lengths = jax.ShapeDtypeStruct((rows,), np.int32, sharding=sharding)
    places = jax.ShapeDtypeStruct((rows, 1), np.int32, sharding=sharding)
    arguments = (reward.params, tokens, lengths, places)
    call = ModelCall(reward.model, reward.params, rows, reward.length, 1)
    return Program(
        f"reward {name}",
        lower(score.scores, run.mesh, reward.model, *arguments, platform=PLATFORM),
        arguments,
        {**run.resident, "batch": (tokens, lengths, places)},
        _forward(call),
        lower_bound([call], run.mesh.shape),
        runs=-(-samples // rows),
    )


Weights = Sequence[tuple[Model, Any]]  # of one model, or of the two that a mixture is of


def _generation(
    run: AbstractRun, rollouts: RolloutConfig, weights: Weights, prompts: int, name: str = ""
) -> Iterator[Program]:
    """Lower what one player samples a rollout's prompts with, so many of them."""
    max_length, options = run.config.max_length, rollouts.options
    longest = max_length - options.max_new_tokens
    (model, params), mesh = weights[0], generation_mesh(rollouts, weights[-1][0], run.mesh)
    if options.tensor:
        weights = [(one, decode_specs(one, held, mesh)) for one, held in weights]
        params = weights[0][1]
    player: Model | Mixture = model
    if len(weights) > 1:
        player = make_mixture(rollouts, model, weights[1][0])
        params = {"first": params, "second": weights[1][1]}
    generator = make_generator(rollouts, player, run.tokenizer, mesh, max_length, longest)
    first = Request(
        (1,) * longest,
        options.responses_per_prompt,
        turn_tokens(options),
        Sampling.of(options),
        stop=options.stop,
    )
    turn = functools.partial(_turn, run, weights, params, mesh)
    alone = dataclasses.replace(first, samples=1)
    greedy = [alone] * (prompts * rollouts.greedy)  # of ReMax
    together = greedy if first == alone else []  # requests of like shapes share their calls
    asked = [first] * prompts + together
    lowered = generator.lower(params, asked, PLATFORM)
    one_host = len({device.process_index for device in mesh.devices.flat}) == 1
    kept = one_host and not greedy and generator.keeps(lowered.state, asked, lowered.calls)
    later_turns = options.max_turns - 1 if options.environment else 0
    yield from turn(lowered, first, name, more=_kept_steps(options) if kept else 0)
    if greedy and not together:
        yield from turn(generator.lower(params, greedy, PLATFORM), alone, " greedy")
    if later_turns and not kept:
        later = dataclasses.replace(alone, room=later_room(options, longest, max_length))
        several = [later] * (rollouts.samples + len(greedy))
        lowered = generator.lower(params, several, PLATFORM)
        yield from turn(lowered, later, " of later turns", later_turns)


def _kept_steps(options: RolloutOptions) -> int:
    """Count the later turns' steps of the decode loop where the cache is kept: of their answers,
    and of the environment's replies, as many tokens as answers of full length leave it."""
    answers = turn_tokens(options)
    replies = max(0, options.max_new_tokens - options.max_turns * answers)
    return answers * (options.max_turns - 1) + replies


def _turn(
    run: AbstractRun,
    weights: Weights,
    params: Any,
    mesh: Mesh,
    lowered: Lowered,
    request: Request,
    name: str,
    times: int = 1,
    more: int = 0,
) -> Iterator[Program]:
    """Say what answers a request's like, so many times over, with so many more steps of the loop
    each time."""
    state, drawn = lowered.state, request.max_new_tokens
    resident: Mapping[str, Any] = {**run.resident, "cache": state}
    if run.rollouts is not None and run.rollouts.options.tensor:
        resident = {**resident, "generation": params}
    prompts, length = lowered.prompts
    calls = [ModelCall(model, held, prompts, length, 1) for model, held in weights]
    yield Program(
        f"prefill{name}",
        lowered.prefill,
        params,
        resident,
        _forward(*calls),
        lower_bound(calls, mesh.shape),
        outputs=state,
        runs=lowered.calls * times,
        mesh=mesh,
    )
    rows = state.tokens.shape[0]
    middle = max(len(request.prompt), request.room[0]) + (drawn + more) // 2
    flops = sum(decode_flops(model, rows=rows, context=middle).total for model, _ in weights)
    yield Program(
        f"decode{name}",
        lowered.decode,
        (params, state),
        resident,
        StepFlops(flops, 0.0, 0.0, 0.0, rows),
        lower_bound([ModelCall(model, held, rows, 1, 1) for model, held in weights], mesh.shape),
        runs=lowered.calls * (drawn + more) * times,
        mesh=mesh,
    )


def _call(model: Model, params: Any, batch: Batch) -> ModelCall:
    rows, length = batch.tokens.shape
    return ModelCall(model, params, rows, length, batch.loss_index.shape[1])


def _forward(*calls: ModelCall) -> StepFlops:
    """Count a program that is one forward pass, of each model if there are two."""
    first = calls[0]
    flops = sum(
        forward_flops(one.model, rows=one.rows, length=one.length, positions=one.positions).total
        for one in calls
    )
    return StepFlops(flops, 0.0, 0.0, 0.0, first.rows * first.length)
