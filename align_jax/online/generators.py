# SPDX-License-Identifier: Apache-2.0
"""What samples on the run's own mesh: the policy, and the other player."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from align_jax.inference.engines import Local
from align_jax.inference.generate import Generator, bucket
from align_jax.inference.mixture import Mixture
from align_jax.inference.resharding import decode_mesh, make_resharder
from align_jax.models.model import Model, Params
from align_jax.online.config import RolloutConfig
from align_jax.online.environment import later_room
from align_jax.online.partners import Opponent
from align_jax.parallel.mesh import row_shards
from align_jax.training.partitioning import abstract_params, check_divisible


def make_opponent(
    rollouts: RolloutConfig,
    policy: Model,
    reference: Model,
    tokenizer: PreTrainedTokenizerBase,
    mesh: Mesh,
    max_length: int,
    longest: int,
) -> Opponent | None:
    """Make the other player: the reference, whose samples may stand in the data's place, or its
    mixture with the policy, which may draw the policy's own in its place; None where there is none
    that samples.

    Args:
        rollouts, policy, reference, tokenizer, mesh: as ``make_rollouts`` takes them.
        max_length, longest: as ``make_generator`` takes them.

    Raises:
        ValueError: as ``generation_mesh``.
    """
    options, against = rollouts.options, rollouts.options.against
    reference = within(reference, policy.config.vocab_size)
    mixes = against == "mixture" or rollouts.reference_share > 0
    if not mixes and against != "reference" and not rollouts.taught:
        return None
    where = generation_mesh(rollouts, reference, mesh)
    player = make_mixture(rollouts, policy, reference) if mixes else reference
    generator = make_generator(rollouts, player, tokenizer, where, max_length, longest)
    reshard = None
    if options.tensor:
        own, theirs = make_resharder(policy, where), make_resharder(reference, where)

        def reshard_both(both: Params) -> Params:
            return {"first": own(both["first"]), "second": theirs(both["second"])}

        reshard = reshard_both if mixes else theirs
    return Opponent(Local(generator, reshard=reshard), mixes)


def within(model: Model, tokens: int) -> Model:
    """Return the model with no more than the first so many tokens: what it draws, another one of
    the same tokenizer can read, though its table may be padded to fewer rows."""
    if model.config.vocab_size <= tokens:
        return model
    return dataclasses.replace(model, config=dataclasses.replace(model.config, vocab_size=tokens))


def make_mixture(rollouts: RolloutConfig, policy: Model, reference: Model) -> Mixture:
    """Make the mixture that a rollout samples from, or that its samples meet."""
    if share := rollouts.reference_share:
        return Mixture(policy, reference, share, arithmetic=True)
    return Mixture(policy, reference, rollouts.options.mixture)


def generation_mesh(rollouts: RolloutConfig, policy: Model, mesh: Mesh) -> Mesh:
    """Return the mesh that generates: the training mesh, or another over its devices
    (``rollout.tensor``).

    Raises:
        ValueError: ``rollout.tensor`` does not divide a host's devices, or the model.
    """
    tensor = rollouts.options.tensor
    if not tensor:
        return mesh
    where = decode_mesh(mesh, tensor)
    try:
        check_divisible(abstract_params(where, policy.shapes(), policy.axes()))
    except ValueError as error:
        raise ValueError(f"config.rollout.tensor = {tensor}: {error}") from None
    return where


def make_generator(
    rollouts: RolloutConfig,
    policy: Model | Mixture,
    tokenizer: PreTrainedTokenizerBase,
    mesh: Mesh,
    max_length: int,
    longest: int,
) -> Generator:
    """Make what samples on the run's own mesh.

    Args:
        rollouts, policy, tokenizer: as ``make_rollouts`` takes them.
        mesh: from ``generation_mesh``.
        max_length: tokens of a prompt with its completion.
        longest: tokens of the longest prompt.
    """
    shards, options, keep = row_shards(mesh), rollouts.options, 0
    rows = -(-min(rollouts.samples, options.rows) // shards) * shards
    if options.environment:
        context, answer = later_room(options, longest, max_length)
        keep = context + bucket(answer, max_length)
    return Generator(
        policy,
        tokenizer,
        rows=rows,
        max_length=max_length,
        mesh=mesh,
        prompt_bucket=bucket(longest, max_length - 1),
        keep=keep,
    )
