# SPDX-License-Identifier: Apache-2.0
"""What does the policy say, what is it worth, and how far is it from the reference?"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from align_jax.core.schema import Batch
from align_jax.data.datasets import Examples
from align_jax.data.tokenizer import pad_id
from align_jax.evals.subject import Subject, standard_error
from align_jax.inference.engines import Local
from align_jax.inference.generate import Completion, Generator, bucket, local
from align_jax.inference.samplers import Sampling
from align_jax.inference.score import rescore
from align_jax.online import batches, selection
from align_jax.online import sampling as online_sampling
from align_jax.online.config import RolloutConfig
from align_jax.online.prompts import Prompts
from align_jax.online.rewards import WeightedRewards
from align_jax.parallel.mesh import row_shards
from align_jax.parallel.sharding import put_batch


def sample(
    subject: Subject,
    examples: Examples,
    rewards: WeightedRewards,
    *,
    samples: int = 1,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),
    max_length: int = 1024,
    rows: int = 64,
    seed: int = 0,
) -> list[online_sampling.Asked]:
    """Sample every prompt and score the samples."""
    limit = min(max_length, subject.model.config.max_positions)
    prompts = Prompts(
        examples.items,
        subject.tokenizer,
        max_length=limit,
        max_new_tokens=max_new_tokens,
        seed=seed,
        shuffle=False,
    )
    shards = row_shards(subject.mesh)
    generator = Generator(
        subject.model,
        subject.tokenizer,
        rows=-(-rows // shards) * shards,
        max_length=limit,
        mesh=subject.mesh,
        prompt_bucket=bucket(prompts.longest, limit - 1),
    )
    config = RolloutConfig(
        "completions",
        len(prompts),
        samples,
        max_new_tokens,
        batch_size=len(prompts),
        sampling=sampling,
    )
    return online_sampling.sample(
        range(len(prompts)), config, prompts, Local(generator, subject.params), rewards, {}
    )[0]


def generation(
    subject: Subject,
    examples: Examples,
    rewards: WeightedRewards,
    *,
    samples: int = 1,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),
    max_length: int = 1024,
    rows: int = 64,
    seed: int = 0,
) -> dict[str, float]:
    """Measure the mean reward of samples, and with a reference the KL from it.

    Args:
        subject: the policy.
        examples: of kind "prompts".
        rewards: what a completion is worth.
        samples: completions of each prompt.
        max_new_tokens, sampling, max_length, seed: of the samples.
        rows: completions decoded together.

    Returns:
        ``reward`` with ``/stderr`` over prompts, ``best_of_n`` where there are several samples,
        each reward by itself, ``completions/{mean_length,clipped_ratio}``, ``distinct`` (share of
        different ones), and ``objective/kl``: the mean over completions of Σ_t log π - log π_ref,
        nats, at temperature 1.
    """
    asked = sample(
        subject,
        examples,
        rewards,
        samples=samples,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        max_length=max_length,
        rows=rows,
        seed=seed,
    )
    raw = np.stack([one.raw for one in asked])
    completions = [one for each in asked for one in each.completions]
    values = {
        "prompts": float(len(asked)),
        "reward": float(raw.mean()),
        "reward/stderr": standard_error(raw.mean(axis=1)),
        "completions/mean_length": float(np.mean([len(one.tokens) for one in completions])),
        "completions/clipped_ratio": float(
            np.mean([one.finish == "length" for one in completions])
        ),
        "distinct": len({one.text for one in completions}) / len(completions),
    }
    if samples > 1:
        values["best_of_n"] = float(raw.max(axis=1).mean())
    if len(asked[0].parts) > 1:
        for name in asked[0].parts:
            values[f"rewards/{name}"] = float(np.mean([one.parts[name] for one in asked]))
    if subject.reference is not None:
        kl = divergence(
            subject, [one.ids for one in asked], [one.completions for one in asked], rows
        )
        values |= {"objective/kl": float(kl.mean()), "objective/kl/stderr": standard_error(kl)}
    return values


def divergence(
    subject: Subject,
    prompts: Sequence[np.ndarray],
    completions: Sequence[Sequence[Completion]],
    rows: int,
) -> Float[np.ndarray, "n"]:
    """Return Σ_t log π - log π_ref of each completion, by forwards over whole rows, nats."""
    scores = np.zeros((len(prompts), len(completions[0])), np.float32)
    groups = selection.unpaired(scores, scores.reshape(-1), threshold=0.0)
    shape = batches.plan_shape(
        groups=len(groups.prompts),
        responses=1,
        prompt=max(map(len, prompts)),
        layout="plain",
        response=max(len(one.tokens) for several in completions for one in several),
    )
    batch = batches.write(
        groups, prompts, completions, scores, shape, layout="plain", pad=pad_id(subject.tokenizer)
    )
    shards, found = row_shards(subject.mesh), []
    size = -(-min(rows, len(batch.weight)) // shards) * shards
    with jax.set_mesh(subject.mesh):
        for begin in range(0, len(batch.weight), size):
            chosen = np.minimum(np.arange(begin, begin + size), len(batch.weight) - 1)
            part: Batch = batches.take(batch, chosen)
            placed = put_batch(subject.mesh, part)
            mine = local(rescore(subject.model, subject.params, placed)[0])
            other = local(rescore(subject.reference, subject.reference_params, placed)[0])
            found.append((mine - other).sum(axis=1)[: len(batch.weight) - begin])
    return np.concatenate(found)
