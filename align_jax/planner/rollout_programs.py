# SPDX-License-Identifier: Apache-2.0
"""The programs that a rollout runs beside the train step, lowered from shapes alone: what ``plan``
compiles.

    prefill ─ decode (a loop: one token a row) ─ rewards ─ rescore (policy; reference, where its KL is in the reward)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from align_jax.core.schema import Batch
from align_jax.inference import score
from align_jax.inference.generate import Request
from align_jax.inference.resharding import decode_specs
from align_jax.inference.samplers import Sampling
from align_jax.interop import hf
from align_jax.models.config import ModelConfig
from align_jax.models.lora import merge
from align_jax.models.model import Model, build
from align_jax.online import batches
from align_jax.online import rewards as reward_table
from align_jax.online.config import RolloutConfig
from align_jax.online.rollout import generation_mesh, make_generator
from align_jax.parallel.lowering import lower
from align_jax.parallel.sharding import row_sharding
from align_jax.planner.communication import Pass, least
from align_jax.planner.cost_model import Program
from align_jax.training import initialize
from align_jax.training.flops import Forward, StepFlops, decode_flops, forward_flops
from align_jax.training.partitioning import abstract_batch, abstract_params

Tree = Any


class RewardProgram:
    """A reward model as a run has it: its parameters' shapes, and the program that scores texts.

    Args:
        options: of the row ``model`` of ``REWARDS``.
        policy: the policy's config: the reward model's too where its own cannot be read here.
        mesh: the mesh.
        attention: a key of ``models.attention.ATTENTION``.

    Attributes:
        note: "" where the checkpoint's own config was read; else what was assumed.
    """

    def __init__(
        self, options: Mapping[str, Any], policy: ModelConfig, mesh: Mesh, attention: str
    ) -> None:
        self.note, path, dtype = "", options["path"], options.get("compute_dtype", "float32")
        try:
            config = hf.load_config(path).padded(mesh.shape["tensor"])
        except OSError:
            config = policy
            self.note = (
                f"the reward model {path} cannot be read here: taken to be of the policy's shape"
            )
        self.model: Model = build(
            config, compute_dtype=dtype, remat="none", attention=attention, heads=("score",)
        )
        self.params = abstract_params(mesh, self.model.shapes(jnp.dtype(dtype)), self.model.axes())
        self._rows = options.get("rows", 16)
        self._length = options.get("max_length") or config.max_positions
        self._mesh = mesh

    def program(
        self, name: str, held: Mapping[str, Tree], samples: int, platform: str | None
    ) -> Program:
        """Return the program that scores texts of the greatest length.

        Args:
            name: the program's.
            held: what lies on the devices, by kind.
            samples: completions of a rollout.
            platform: as ``programs`` takes it.
        """
        rows = row_sharding(self._mesh)
        tokens = jax.ShapeDtypeStruct((self._rows, self._length), np.int32, sharding=rows)
        lengths = jax.ShapeDtypeStruct((self._rows,), np.int32, sharding=rows)
        lowered = lower(
            score.scores, self._mesh, self.model, self.params, tokens, lengths, platform=platform
        )
        run = Pass(self.model, self.params, self._rows, self._length, 1)
        flops = forward_flops(self.model, rows=self._rows, length=self._length, positions=1)
        return Program(
            name,
            lowered,
            (self.params, tokens, lengths),
            {**held, "batch": (tokens, lengths)},
            _only(flops, tokens.size),
            least([run], self._mesh.shape),
            runs=-(-samples // self._rows),
        )


def reward_programs(
    rewards: Mapping[str, Any], policy: ModelConfig, mesh: Mesh, attention: str
) -> dict[str, RewardProgram]:
    """Return the reward models that a config's ``rewards`` names, by name."""
    return {
        term.name: RewardProgram(term.options, policy, mesh, attention)
        for term in reward_table.read(rewards)
        if term.kind == "model"
    }


def programs(
    config: RolloutConfig,
    models: initialize.Models,
    weights: initialize.StateSpecs,
    tokenizer: PreTrainedTokenizerBase,
    batch: Batch,
    mesh: Mesh,
    *,
    held: Mapping[str, Tree],
    rewards: Mapping[str, RewardProgram],
    max_length: int,
    platform: str | None = None,
) -> list[Program]:
    """Lower what a rollout runs.

    Args:
        config: how rollouts are made.
        models: the policy's and the reference's.
        weights: theirs, shapes with shardings.
        tokenizer: the policy's.
        batch: an optimizer step's global batch, as arrays that take no memory.
        mesh: the mesh.
        held: kind of memory -> what lies on the devices all the time.
        rewards: from ``reward_programs``.
        max_length: tokens of a prompt with its completion.
        platform: "tpu" for a topology's devices; None: the devices' own.
    """
    policy, found = merge(weights.base, weights.trained), []
    if not config.options.server.url:
        found += _generation(
            config, models.policy, policy, tokenizer, mesh, held, max_length, platform
        )
    found += [
        one.program(f"reward {name}", held, config.samples, platform)
        for name, one in rewards.items()
    ]
    if config.targets is None:
        return found
    groups = config.batch_size // config.microbatches
    part = abstract_batch(mesh, batches.take(batch._replace(mismatched=None), np.arange(groups)))
    wanted = (
        [("rescore", models.policy, policy, config.value_head)]
        if config.options.rescore or config.value_head
        else []
    )
    if config.needs_reference:
        reference = weights.base if weights.reference is None else weights.reference
        wanted.append(("rescore reference", models.base, reference, ""))
    for name, model, params, head in wanted:
        lowered = lower(
            score.rescore,
            mesh,
            model,
            params,
            part,
            value_head=head,
            temperature=config.temperature,
            platform=platform,
        )
        (rows, length), positions = part.tokens.shape, part.loss_index.shape[1]
        flops = forward_flops(model, rows=rows, length=length, positions=positions)
        found.append(
            Program(
                name,
                lowered,
                (params, part),
                {**held, "batch": part},
                _only(flops, rows * length),
                least([Pass(model, params, rows, length, positions)], mesh.shape),
                runs=config.slices * config.microbatches,
            )
        )
    return found


def _generation(
    config: RolloutConfig,
    model: Model,
    params: Tree,
    tokenizer: PreTrainedTokenizerBase,
    mesh: Mesh,
    held: Mapping[str, Tree],
    max_length: int,
    platform: str | None,
) -> list[Program]:
    options = config.options
    longest = max_length - options.max_new_tokens
    where = generation_mesh(config, model, mesh)
    if options.tensor:
        params = decode_specs(model, params, where)
        held = {**held, "generation": params}
    generator = make_generator(config, model, tokenizer, where, max_length, longest)
    request = Request(
        (1,) * longest,
        options.responses_per_prompt,
        options.max_new_tokens,
        Sampling.of(options),
        stop=options.stop,
    )
    lowered = generator.lower(params, [request] * options.prompts, platform)
    prompts, length = lowered.prompts
    rows = lowered.state.tokens.shape[0]
    held = {**held, "cache": lowered.state}
    prefill = forward_flops(model, rows=prompts, length=length, positions=1)
    decode = decode_flops(model, rows=rows, context=longest + options.max_new_tokens // 2)
    return [
        Program(
            "prefill",
            lowered.prefill,
            params,
            held,
            _only(prefill, prompts * length),
            least([Pass(model, params, prompts, length, 1)], where.shape),
            lowered.state,
            lowered.calls,
            where,
        ),
        Program(
            "decode",
            lowered.decode,
            (params, lowered.state),
            held,
            _only(decode, rows),
            least([Pass(model, params, rows, 1, 1)], where.shape),
            (),
            lowered.calls * options.max_new_tokens,
            where,
        ),
    ]


def _only(flops: Forward, tokens: int) -> StepFlops:
    return StepFlops(flops.total, 0.0, 0.0, 0.0, tokens)
