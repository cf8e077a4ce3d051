# SPDX-License-Identifier: Apache-2.0
"""What does the policy say, what is it worth, and how far is it from the reference?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from align_jax.core.options import RolloutOptions
from align_jax.data.datasets import Examples
from align_jax.data.layout import one_group_shape
from align_jax.data.tokenizer import pad_id
from align_jax.evals.policy import EvaluatedPolicy, standard_error
from align_jax.inference.engines import Local
from align_jax.inference.generate import Completion, Generator, bucket, local_rows
from align_jax.inference.score import rescore
from align_jax.models.model import LoadedModel
from align_jax.online import batches, selection
from align_jax.online.environment import make_player
from align_jax.online.rewards import WeightedRewards, counted
from align_jax.online.sampling import Prompts, PromptSampler, PromptSamples
from align_jax.parallel.mesh import row_shards
from align_jax.parallel.sharding import put_batch

ONE_SAMPLE = RolloutOptions(responses_per_prompt=1, max_new_tokens=128, rows=64)


Keep = Callable[[Mapping[str, Any]], None]  # takes what was said to a prompt


def record(samples: PromptSamples, index: int) -> dict[str, Any]:
    """Return a prompt with one of its samples as plain values, as ``samples.jsonl`` holds them."""
    prompt, said = samples.example.prompt, samples.completions[index]
    return {
        "prompt": prompt if isinstance(prompt, str) else [dict(one) for one in prompt],
        "output": said.text,
        "tokens": len(said.tokens),
        "finish": said.finish,
        "source": samples.example.source,
    }


def sample(
    policy: EvaluatedPolicy,
    examples: Examples,
    rewards: WeightedRewards,
    options: RolloutOptions = ONE_SAMPLE,
    *,
    max_length: int = 1024,
    seed: int = 0,
) -> list[PromptSamples]:
    """Sample every prompt and score the samples.

    Raises:
        ValueError: the prompts lack what the rewards or the environment read.
    """
    rewards.check(examples.items)
    limit = min(max_length, policy.model.config.longest)
    prompts = Prompts(
        examples.items,
        policy.tokenizer,
        max_length=limit,
        max_new_tokens=options.max_new_tokens,
        seed=seed,
        shuffle=False,
    )
    shards = row_shards(policy.mesh)
    generator = Generator(
        policy.model,
        policy.tokenizer,
        rows=-(-options.rows // shards) * shards,
        max_length=limit,
        mesh=policy.mesh,
        prompt_bucket=bucket(prompts.longest, limit - 1),
    )
    player = make_player(
        options,
        policy.tokenizer,
        examples.items,
        longest=prompts.longest,
        max_length=limit,
        rewarded=rewards.of_environment,
        end_tokens=policy.model.config.end_tokens,
    )
    sampler = PromptSampler(options, Local(generator, policy.params), rewards, player)
    found, _, _ = sampler.sample(prompts, range(len(prompts)), {}, alone=True)
    return found


def generation(
    policy: EvaluatedPolicy,
    examples: Examples,
    rewards: WeightedRewards,
    options: RolloutOptions = ONE_SAMPLE,
    *,
    max_length: int = 1024,
    seed: int = 0,
    keep: Keep | None = None,
) -> dict[str, float]:
    """Measure the mean reward of samples, and with a reference the KL from it.

    Args:
        policy: the policy.
        examples: of kind "prompts".
        rewards: what a completion is worth.
        options: how samples are drawn, and how many are decoded together.
        max_length: tokens of a prompt with its completion.
        seed: of the draws.
        keep: is given each sample with its reward.

    Returns:
        ``reward`` with ``/stderr`` over prompts, ``best_of_n`` where there are several samples,
        each reward by itself (where it said something),
        ``completions/{mean_length,clipped_ratio}``, ``distinct`` (share of different ones), and
        ``objective/kl``: the mean over completions of Σ_t log π - log π_ref, nats, at temperature
        1.
    """
    samples = sample(policy, examples, rewards, options, max_length=max_length, seed=seed)
    totals = np.stack([one.rewards for one in samples])
    for one in samples:
        for index, reward in enumerate(one.rewards):
            if keep is not None:
                keep({**record(one, index), "reward": float(reward)})
    completions = [one for several in samples for one in several.completions]
    cut_off = [one.finish == "length" for one in completions]
    values = {
        "prompts": float(len(samples)),
        "reward": float(totals.mean()),
        "reward/stderr": standard_error(totals.mean(axis=1)),
        "completions/mean_length": float(np.mean([one.mask.sum() for one in completions])),
        "completions/clipped_ratio": float(np.mean(cut_off)),
        "distinct": len({one.text for one in completions}) / len(completions),
    }
    if options.responses_per_prompt > 1:
        values["best_of_n"] = float(totals.max(axis=1).mean())
    if len(samples[0].each_reward) > 1:
        for name in samples[0].each_reward:
            said = counted(np.concatenate([one.each_reward[name] for one in samples]))
            if len(said):
                values[f"rewards/{name}"] = float(said.mean())
    if policy.reference is not None:
        prompts, texts = [one.prompt for one in samples], [one.completions for one in samples]
        kl = divergence(policy, prompts, texts, options.rows)
        values |= {"objective/kl": float(kl.mean()), "objective/kl/stderr": standard_error(kl)}
    return values


def divergence(
    policy: EvaluatedPolicy,
    prompts: Sequence[np.ndarray],
    completions: Sequence[Sequence[Completion]],
    rows: int,
) -> Float[np.ndarray, "n"]:
    """Return Σ_t log π - log π_ref of each completion, by forwards over whole rows, nats.

    Raises:
        ValueError: there is no reference.
    """
    if policy.reference is None:
        raise ValueError("the divergence from a reference needs one")
    own = LoadedModel(policy.model, policy.params)
    ours, theirs = (
        sequence_logps(policy, one, prompts, completions, rows) for one in (own, policy.reference)
    )
    return ours - theirs


def sequence_logps(
    policy: EvaluatedPolicy,
    scoring: LoadedModel,
    prompts: Sequence[np.ndarray],
    completions: Sequence[Sequence[Completion]],
    rows: int,
) -> Float[np.ndarray, "n"]:
    """Return each completion's log-probability after its prompt, by forwards over whole rows, nats.

    Args:
        policy: who said them, for its tokenizer and mesh.
        scoring: who is asked: the policy, its reference or another.
        prompts: tokens; not necessarily those that the policy was given.
        completions: of each prompt, equally many.
        rows: of a forward.
    """
    scores = np.zeros((len(prompts), len(completions[0])), np.float32)
    groups = selection.unpaired(scores, scores.reshape(-1), RolloutOptions())
    shape = one_group_shape(
        "plain",
        groups=len(groups.prompts),
        responses=1,
        prompt=max(map(len, prompts)),
        response=max(len(one.tokens) for several in completions for one in several),
    )
    batch = batches.write(
        groups, prompts, completions, scores, shape, layout="plain", pad=pad_id(policy.tokenizer)
    )
    shards, found = row_shards(policy.mesh), []
    size = -(-min(rows, len(batch.weight)) // shards) * shards
    with jax.set_mesh(policy.mesh):
        for begin in range(0, len(batch.weight), size):
            chosen = np.minimum(np.arange(begin, begin + size), len(batch.weight) - 1)
            placed = put_batch(policy.mesh, batches.take(batch, chosen))
            logps = local_rows(rescore(*scoring, placed)[0])
            found.append(logps.sum(axis=1)[: len(batch.weight) - begin])
    return np.concatenate(found)
