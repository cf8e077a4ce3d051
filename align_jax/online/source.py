# SPDX-License-Identifier: Apache-2.0
"""An online source put together from plain arguments: prompts, generator, rewards, rollouts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from transformers import PreTrainedTokenizerBase

from align_jax.core.options import Config, RolloutOptions
from align_jax.core.schema import Example
from align_jax.inference.engines import Engine, Local, Server
from align_jax.inference.generate import Generator, bucket
from align_jax.inference.resharding import decode_mesh, placer
from align_jax.inference.samplers import Sampling
from align_jax.interop import hf
from align_jax.losses.objective import Term
from align_jax.models.lora import fold
from align_jax.models.model import Model
from align_jax.online import config as rollout_config
from align_jax.online import rewards
from align_jax.online.config import RolloutConfig
from align_jax.online.prompts import Prompts
from align_jax.online.rollout import Rollouts
from align_jax.parallel.mesh import row_shards
from align_jax.training.partitioning import abstract_params, check_divisible

# keys of the config's ``rollout`` group that are fields of RolloutConfig, where they are set
_FIELDS = (
    "epochs",
    "rescore",
    "keep_unfinished",
    "missing_eos_penalty",
    "overlong_buffer",
    "normalize_scores",
    "score_clip",
    "tries",
    "stop_kl",
    "overlap",
    "pairing",
    "min_difference",
    "threshold",
)


def make_rollout_config(terms: Sequence[Term], config: Config) -> RolloutConfig:
    """Say how rollouts are made, from the config's ``rollout`` group.

    Raises:
        KeyError, ValueError: an unknown option, or sizes that do not divide.
    """
    rollout, unset = config.rollout, RolloutOptions()
    options = {
        name: getattr(rollout, name)
        for name in _FIELDS
        if getattr(rollout, name) != getattr(unset, name)
    }
    if rollout.server.url:
        options["server"] = dataclasses.asdict(rollout.server)
    return rollout_config.make_rollout_config(
        terms,
        batch_size=config.batch_size,
        microbatches=config.microbatches,
        prompts=rollout.prompts,
        responses=rollout.responses_per_prompt,
        max_new_tokens=rollout.max_new_tokens,
        rows=rollout.rows,
        tensor=rollout.tensor,
        stop=rollout.stop,
        layout=config.data.layout,
        value_head=config.model.value_head,
        seed=config.seed,
        sampling=Sampling(rollout.temperature, rollout.top_k, rollout.top_p, rollout.min_p),
        options=options,
    )


def make_rollouts(
    config: RolloutConfig,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    policy: Model,
    reference: Model,
    reward_weights: Mapping[str, Any],
    mesh: jax.sharding.Mesh,
    max_length: int,
    truncation: str,
    shuffle: bool,
    seed: int,
    held_out: Sequence[Example] = (),
) -> Rollouts:
    """Make the source of an online run.

    Args:
        config: from ``make_rollout_config``.
        examples: prompts, with what the rewards compare with in their extras.
        tokenizer: the policy's.
        policy, reference: models of the weights that will be given.
        reward_weights: the config's ``rewards`` group.
        mesh: where generation and training run.
        max_length: tokens of a prompt with its completion.
        truncation, shuffle, seed: of the prompts.
        held_out: prompts to evaluate on; none: no evaluation.

    Raises:
        ValueError: no prompts are left, or fewer held-out ones than processes.
    """
    read = functools.partial(
        Prompts,
        tokenizer=tokenizer,
        max_length=max_length,
        max_new_tokens=config.max_new_tokens,
        truncation=truncation,
        seed=seed,
    )
    prompts, others = (
        read(examples, shuffle=shuffle),
        read(held_out, shuffle=False) if held_out else None,
    )
    if others is not None and len(others) < jax.process_count():
        raise ValueError(
            f"{len(others)} held-out prompts for {jax.process_count()} processes: "
            "each needs one at least"
        )
    longest = max(prompts.longest, 0 if others is None else others.longest)
    if config.server is None:
        where = generation_mesh(config, policy, mesh)
        engine: Engine = Local(
            make_generator(config, policy, tokenizer, where, max_length, longest),
            None,
            *[placer(policy, where)] * bool(config.tensor),
        )
    else:
        engine = Server(
            **{
                "tokenizer": tokenizer,
                "export": lambda folder, params: export(folder, policy, params),
                **config.server,
            }
        )
    return Rollouts(
        config,
        prompts,
        engine,
        rewards.resolve(reward_weights, mesh=mesh),
        tokenizer,
        policy=policy,
        reference=reference,
        mesh=mesh,
        held_out=others,
    )


def generation_mesh(
    config: RolloutConfig, policy: Model, mesh: jax.sharding.Mesh
) -> jax.sharding.Mesh:
    """Return the mesh that generates: the training mesh, or another over its devices
    (``rollout.tensor``).

    Raises:
        ValueError: ``rollout.tensor`` does not divide a host's devices, or the model.
    """
    if not config.tensor:
        return mesh
    where = decode_mesh(mesh, config.tensor)
    try:
        check_divisible(abstract_params(where, policy.shapes(), policy.axes()))
    except ValueError as error:
        raise ValueError(f"config.rollout.tensor = {config.tensor}: {error}") from None
    return where


def make_generator(
    config: RolloutConfig,
    policy: Model,
    tokenizer: PreTrainedTokenizerBase,
    mesh: jax.sharding.Mesh,
    max_length: int,
    longest: int,
) -> Generator:
    """Make what samples on the run's own mesh.

    Args:
        config, policy, tokenizer, max_length: as ``make_rollouts`` takes them.
        mesh: from ``generation_mesh``.
        longest: tokens of the longest prompt.
    """
    shards = row_shards(mesh)
    rows = -(-min(config.prompts * config.responses, config.rows) // shards) * shards
    return Generator(
        policy,
        tokenizer,
        rows=rows,
        max_length=max_length,
        mesh=mesh,
        prompt_bucket=bucket(longest, max_length - 1),
    )


def export(folder: str, policy: Model, params: Mapping[str, Any]) -> None:
    """Write a policy's weights for a server: adapters merged, scalar heads left out; the tokenizer
    stays as it is."""
    whole = fold(params, policy.options.lora) if policy.options.lora is not None else dict(params)
    hf.save(
        folder,
        policy.config,
        {name: leaf for name, leaf in whole.items() if name not in policy.options.heads},
    )
