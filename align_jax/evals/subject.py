# SPDX-License-Identifier: Apache-2.0
"""Who is evaluated: a policy with its tokenizer, and what it may be compared with."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from align_jax.core.schema import Batch
from align_jax.data.datasets import Examples
from align_jax.data.pipeline import make_pipeline
from align_jax.inference.generate import local
from align_jax.inference.score import rescore
from align_jax.losses.logprobs import sum_by_slot
from align_jax.models.model import Model
from align_jax.parallel.mesh import row_shards
from align_jax.parallel.sharding import put_batch


class Subject(NamedTuple):
    """A policy under evaluation.

    Attributes:
        model, params: the policy.
        tokenizer: its tokenizer.
        mesh: where it lies.
        reference, reference_params: what it is compared with; None where there is nothing.
        name: for reports.
    """

    model: Model
    params: Any
    tokenizer: Any
    mesh: jax.sharding.Mesh
    reference: Model | None = None
    reference_params: Any = None
    name: str = ""


class Sequences(NamedTuple):
    """Log-probabilities of responses, in the order of the examples."""

    logps: Float[np.ndarray, "n R"]  # nats
    reference: Float[np.ndarray, "n R"] | None
    lengths: Float[np.ndarray, "n R"]  # tokens


def sequences(
    subject: Subject,
    examples: Examples,
    *,
    batch_size: int = 16,
    max_length: int = 1024,
    truncation: str = "keep_end",
) -> Sequences:
    """Score every example's responses by the policy, and by the reference where there is one.

    Args:
        subject: the policy.
        examples: of any kind with responses.
        batch_size: groups at once; rounded up to what the mesh divides.
        max_length: tokens of prompt and response.
        truncation: see ``data.batching.truncate``; dropped examples are left out.
    """
    multiple = row_shards(subject.mesh)
    limit = min(max_length, subject.model.config.max_positions)
    pipeline = make_pipeline(
        examples,
        subject.tokenizer,
        batch_size=-(-batch_size // multiple) * multiple,
        max_length=limit,
        truncation=truncation,
        trim=True,
        shuffle=False,
        repeat=False,
        row_multiple=multiple,
    )
    parts = [_score(subject, batch) for batch in pipeline.iterator()]
    logps, reference, lengths = zip(*parts)
    return Sequences(
        np.concatenate(logps),
        None if reference[0] is None else np.concatenate(reference),
        np.concatenate(lengths),
    )


def _score(subject: Subject, batch: Batch) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    with jax.set_mesh(subject.mesh):
        placed = put_batch(subject.mesh, batch)
        real = batch.example_index >= 0

        def sums(model: Model, params: Any) -> np.ndarray:
            token_logps, _ = rescore(model, params, placed)
            return np.asarray(sum_by_slot(jax.numpy.asarray(local(token_logps)), batch))[real]

        mine = sums(subject.model, subject.params)
        other = (
            None if subject.reference is None else sums(subject.reference, subject.reference_params)
        )
    return mine, other, batch.lengths[real].astype(np.float32)


def standard_error(x: Float[np.ndarray, "n"]) -> float:
    """Return the standard error of a mean; NaN for fewer than two numbers."""
    return float(np.std(x, ddof=1) / np.sqrt(len(x))) if len(x) > 1 else float("nan")
