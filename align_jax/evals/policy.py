# SPDX-License-Identifier: Apache-2.0
"""What is evaluated: a policy with its tokenizer, and what it may be compared with."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from transformers import PreTrainedTokenizerBase

from align_jax.core.options import DataOptions
from align_jax.core.schema import Batch
from align_jax.data.datasets import Examples
from align_jax.data.layout import BatchSizes, round_up
from align_jax.data.pipeline import make_pipeline
from align_jax.inference.generate import local_rows
from align_jax.inference.score import RewardModel, rescore
from align_jax.losses.logprobs import sum_by_slot
from align_jax.models.model import LoadedModel, Model, Params
from align_jax.parallel.mesh import row_shards
from align_jax.parallel.sharding import put_batch


class EvaluatedPolicy(NamedTuple):
    """A policy under evaluation.

    Attributes:
        model, params: the policy.
        tokenizer: its tokenizer.
        mesh: where it lies.
        reference: what it is compared with; None where there is nothing.
        name: for reports.
        separator: of a process reward model, what stands behind each step; None: it is none.
    """

    model: Model
    params: Params
    tokenizer: PreTrainedTokenizerBase
    mesh: jax.sharding.Mesh
    reference: LoadedModel | None = None
    name: str = ""
    separator: str | None = None

    @property
    def head(self) -> str:
        """What it says: "" words, "score" rewards of whole answers, "steps" of their steps."""
        if "score" not in self.model.options.heads:
            return ""
        return "score" if self.separator is None else "steps"

    def reward_model(self, batch_size: int, max_length: int) -> RewardModel:
        """Return what scores so many texts at once, rounded up to what the mesh divides, of at most
        so many tokens."""
        loaded, rows = LoadedModel(self.model, self.params), row_shards(self.mesh)
        return RewardModel(
            loaded,
            self.tokenizer,
            rows=round_up(batch_size, rows),
            max_length=max_length,
            mesh=self.mesh,
        )


class ResponseLogps(NamedTuple):
    """Log-probabilities of responses, in the order of the examples."""

    policy: Float[np.ndarray, "n R"]  # nats
    reference: Float[np.ndarray, "n R"] | None
    lengths: Float[np.ndarray, "n R"]  # tokens
    rows: Int[np.ndarray, "n"]  # number of each example


def response_logps(
    policy: EvaluatedPolicy,
    examples: Examples,
    *,
    batch_size: int = 16,
    max_length: int = 1024,
    truncation: str = "keep_end",
) -> ResponseLogps:
    """Score every example's responses by the policy, and by the reference where there is one.

    Args:
        policy: the policy.
        examples: of any kind with responses.
        batch_size: groups at once; rounded up to what the mesh divides.
        max_length: tokens of prompt and response.
        truncation: see ``data.truncation.truncate``; dropped examples are left out.
    """
    multiple = row_shards(policy.mesh)
    limit = min(max_length, policy.model.config.longest)
    pipeline = make_pipeline(
        examples,
        policy.tokenizer,
        DataOptions(truncation=truncation, layout="plain"),
        BatchSizes(round_up(batch_size, multiple), limit, row_multiple=multiple),
        once=True,
    )
    own, reference, lengths, index = [], [], [], []
    with jax.set_mesh(policy.mesh):
        for batch in pipeline.iterator():
            placed, real = put_batch(policy.mesh, batch), np.asarray(batch.example_index) >= 0
            own.append(_sums(policy.model, policy.params, placed, batch)[real])
            if policy.reference is not None:
                reference.append(_sums(*policy.reference, placed, batch)[real])
            lengths.append(batch.lengths[real].astype(np.float32))
            index.append(np.asarray(batch.example_index)[real])
    return ResponseLogps(
        np.concatenate(own),
        np.concatenate(reference) if reference else None,
        np.concatenate(lengths),
        np.concatenate(index),
    )


def _sums(model: Model, params: Params, placed: Batch, batch: Batch) -> Float[np.ndarray, "B R"]:
    token_logps, _ = rescore(model, params, placed)
    return np.asarray(sum_by_slot(jnp.asarray(local_rows(token_logps)), batch))


def standard_error(x: Float[np.ndarray, "n"]) -> float:
    """Return the standard error of a mean; NaN for fewer than two numbers."""
    return float(np.std(x, ddof=1) / np.sqrt(len(x))) if len(x) > 1 else float("nan")
