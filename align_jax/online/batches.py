# SPDX-License-Identifier: Apache-2.0
"""From chosen samples to a batch, and from per-response arrays to per-token fields.

Each group of samples is a bin of its own (see ``data.layout``): R plain rows, or one row in which
the prompt is stored and computed once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from align_jax.core.schema import Batch
from align_jax.data import layout as layouts
from align_jax.data.layout import BatchShape, TokenizedGroup
from align_jax.data.row_length import cost
from align_jax.inference.generate import Completion, bucket
from align_jax.losses import process
from align_jax.losses.targets import Extras
from align_jax.online.config import RolloutConfig
from align_jax.online.sampling import PromptSamples, gather
from align_jax.online.selection import Groups

Completions = Sequence[Sequence[Completion]]  # of each prompt


def with_layout(config: RolloutConfig, longest: int, attention_cost: float) -> RolloutConfig:
    """Return the config with "auto" replaced by the layout whose full rows cost less.

    Args:
        config: how rollouts are made.
        longest: tokens of the longest prompt.
        attention_cost: see ``data.row_length``.
    """
    if config.layout != "auto":
        return config
    responses, response = config.groups[1], config.options.max_new_tokens
    plain = responses * cost(longest + response, attention_cost)
    shared = cost(longest + responses * response, attention_cost)
    layout = "shared_prefix" if responses > 1 and shared < plain else "plain"
    return dataclasses.replace(config, layout=layout)


def rollout_shape(config: RolloutConfig, longest: int) -> BatchShape:
    """Return the static sizes of an optimizer step's batch, the whole mesh's.

    Args:
        config: how rollouts are made.
        longest: tokens of the longest prompt.

    Raises:
        ValueError: a layout that rollouts do not have.
    """
    if config.layout not in ("plain", "shared_prefix"):
        raise ValueError(
            f"config.data.layout = {config.layout!r}: rollouts are plain or shared_prefix"
        )
    return layouts.one_group_shape(
        config.layout,
        groups=config.batch_size,
        responses=config.groups[1],
        prompt=longest,
        response=config.options.max_new_tokens,
    )


def abstract_batch(config: RolloutConfig, shape: BatchShape) -> Batch:
    """Return a step's batch, the whole mesh's, as arrays that take no memory.

    Args:
        config: how rollouts are made.
        shape: from ``rollout_shape``.
    """
    filled = ["old_token_logps", "advantages"] if config.targets is not None else []
    filled += ["sampler_token_logps"] if config.keeps_drawn else []
    by_sequence = config.correction is not None and config.correction.by_sequence
    filled += ["sampler_ratio"] if config.correction and not by_sequence else []
    filled += ["returns", "old_values"] if config.value_head else []
    batch = layouts.abstract_batch(
        shape,
        config.layout,
        config.kind,
        mismatched=shape if config.mismatched else None,
        token_fields=filled,
    )
    return batch._replace(sampler_ratio=batch.scores) if by_sequence else batch


def write(
    groups: Groups,
    prompts: Sequence[Int[np.ndarray, "_"]],
    completions: Completions,
    scores: Float[np.ndarray, "Q n"],
    shape: BatchShape,
    *,
    layout: str,
    pad: int,
    keep_unfinished: bool = True,
) -> Batch:
    """Write groups into rows.

    Args:
        groups: which samples belong together.
        prompts: token ids of each of the rollout's prompts.
        completions: its samples.
        scores: theirs.
        shape: of rows; there are as many as the groups take.
        layout: a key of ``data.layout.LAYOUTS``.
        pad: id that fills rows.
        keep_unfinished: whether the tokens of completions cut off by the limit bear the loss.
    """
    bins = []
    for prompt, samples in zip(groups.prompts, groups.samples):
        responses = []
        for sample in samples:
            one = completions[prompt][sample]
            learned = keep_unfinished or one.finish == "stop"
            responses.append((one.tokens, one.mask & learned))
        bins.append([TokenizedGroup(prompts[prompt], tuple(responses))])
    found = np.take_along_axis(scores[groups.prompts], groups.samples, axis=1)
    fields: dict[str, Any] = {"scores": found.astype(np.float32)}
    if groups.label is None:
        fields["margin"] = np.zeros(len(bins), np.float32)
    else:
        fields["label"] = groups.label
    weight = groups.weight.astype(np.float32)
    return layouts.make_batch(bins, shape, layout, pad=pad, weight=weight, **fields)


def weigh_learned(batch: Batch, kind: str) -> Batch:
    """Give weight 0 to groups of which too few responses bear a loss to say anything: there is no
    preference for or against an answer that is not learned.

    Policy gradients alone count such responses, with their scores, in the baselines.

    Args:
        batch: of groups, some of whose responses may bear no loss.
        kind: what the objective trains on, a key of ``SELECTIONS``.
    """
    if kind == "rollout":
        return batch
    least = 2 if kind in ("pairs", "ranked") else 1
    enough = (batch.lengths > 0).sum(axis=1) >= least
    return batch._replace(weight=np.where(enough, batch.weight, np.float32(0)))


def token_field(
    batch: Batch, groups: Groups, completions: Completions, field: str
) -> Float[np.ndarray, "N T"]:
    """Lay a per-token quantity of the completions (a field of Completion) over the batch's loss
    tokens."""
    out = np.zeros(batch.tokens.shape, np.float32)
    slots = groups.samples.size // len(out)
    for number, one in enumerate(_samples(groups, completions)):
        row, slot = divmod(number, slots)
        at = np.flatnonzero(batch.loss_mask[row] & (batch.slot[row] == slot))
        out[row, at] = getattr(one, field)[one.mask][: len(at)]
    return out


def cut_off(groups: Groups, completions: Completions) -> Bool[np.ndarray, "G R"]:
    """Tell which samples were cut off by the limit."""
    found = [one.finish == "length" for one in _samples(groups, completions)]
    return np.array(found).reshape(groups.samples.shape)


def extras_of(method: str, groups: Groups, samples: Sequence[PromptSamples]) -> Extras:
    """Return what a method of making advantages looks at, beside the batch and what the policy says
    of it.

    Args:
        method: a value of ``losses.targets.Advantages``.
        groups: which samples belong together.
        samples: of the rollout's prompts.
    """
    if method == "greedy":
        scores = np.array([one.greedy_score for one in samples], np.float32)
        return Extras(greedy_score=scores[groups.prompts])
    if method == "decoupled":
        each = np.stack([np.stack([*one.each_reward.values()], axis=-1) for one in samples])
        own = np.take_along_axis(each[groups.prompts], groups.samples[..., None], axis=1)
        return Extras(each_score=own.astype(np.float32))
    return Extras()


def steps_of(batch: Batch, groups: Groups, samples: Sequence[PromptSamples]) -> process.Steps:
    """Lay what the samples' steps are worth over a batch.

    Args:
        batch: of the groups.
        groups: which samples belong together.
        samples: of the rollout's prompts, with their steps.
    """
    pairs = zip(groups.prompts, groups.samples)
    own = [samples[prompt].steps[i] for prompt, several in pairs for i in several]
    most = int(gather(np.array([max(map(len, own))], np.float32)).max())
    # powers of two: few programs; one more, for what comes behind the last step
    rewards = np.full((len(own), bucket(most + 1, 2 * most + 16)), np.nan, np.float32)
    ended = np.zeros(batch.tokens.shape, np.int32)
    at_ends = np.zeros(batch.tokens.shape, np.float32)
    slots = groups.samples.size // len(ended)
    for number, steps in enumerate(own):
        rewards[number, : len(steps)] = [reward for _, reward in steps]
        row, slot = divmod(number, slots)
        at = np.flatnonzero(batch.loss_mask[row] & (batch.slot[row] == slot))
        if not len(at):
            continue
        for place, reward in steps:
            at_ends[row, at[place]] += reward
            ended[row, at[place + 1 :]] += 1
    return process.Steps(rewards.reshape(*groups.samples.shape, -1), ended, at_ends)


def _samples(groups: Groups, completions: Completions) -> Iterator[Completion]:
    """Yield the groups' samples in the order of their slots."""
    for prompt, samples in zip(groups.prompts, groups.samples):
        for sample in samples:
            yield completions[prompt][sample]


def mismatched(
    groups: Groups,
    prompts: Sequence[Int[np.ndarray, "_"]],
    completions: Completions,
    shape: BatchShape,
    *,
    pad: int,
) -> Batch:
    """Pair each prompt with the response of a group that has another prompt.

    Raises:
        ValueError: all groups have the same prompt.
    """
    texts = [prompts[prompt].tobytes() for prompt in groups.prompts]
    samples = list(_samples(groups, completions))  # R = 1
    bins = []
    for prompt, partner in zip(groups.prompts, layouts.mismatch(texts)):
        one = samples[partner]
        bins.append([TokenizedGroup(prompts[prompt], ((one.tokens, one.mask),))])
    weight = groups.weight.astype(np.float32)
    return layouts.make_batch(bins, shape, "plain", pad=pad, weight=weight)


def take(batch: Batch, chosen: Int[np.ndarray, "b"]) -> Batch:
    """Return the batch of some of a batch's groups."""
    groups, fields = len(batch.weight), batch._asdict()
    for name, x in fields.items():
        if isinstance(x, Batch):
            fields[name] = take(x, chosen)
        elif x is not None:
            rows = len(x) // groups  # of a group
            by_group = x.reshape(groups, rows, *x.shape[1:])
            fields[name] = by_group[chosen].reshape(-1, *x.shape[1:])
    return Batch(**fields)
