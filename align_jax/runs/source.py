# SPDX-License-Identifier: Apache-2.0
"""Where the loop's batches come from: a fixed data set, or the policy's own samples.

data set ─ (reference's log-probabilities, cached) ─ Offline ─┐
                                                              ├─ next(weights) ─► Batch
prompts ─ rollouts of the policy ───────────────── Rollouts ──┘
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import tqdm
from etils import epath

from align_jax.core.options import ReferenceOptions
from align_jax.data.datasets import Examples
from align_jax.data.pipeline import Pipeline
from align_jax.data.tokenizer import tokenizer_digest
from align_jax.data.truncation import Limits
from align_jax.interop import hf
from align_jax.online.rollout import Rollouts, read_saved
from align_jax.parallel import distributed
from align_jax.parallel.sharding import put_batch
from align_jax.runs import weights
from align_jax.runs.setup import (
    Run,
    make_pipeline,
    make_reference_specs,
    make_step_spec,
    resolve_config,
)
from align_jax.training import partitioning, reference


def cached_reference(run: Run, examples: Examples) -> reference.Cache:
    """Read the reference's token log-probabilities of a data set from disk, or compute and keep
    them."""
    config, r = run.config, run.config.reference
    path = r.path or config.model.path
    inputs = {
        "examples": examples.digest,
        "tokenizer": tokenizer_digest(run.resolved.tokenizer),
        "limits": repr(Limits.of(config.data, config.max_length)),
        "control_tokens": list(config.data.control_tokens),
        "weights": reference.weights_digest(hf.locate(path) if path else None, config.seed),
        "model": repr(run.resolved.model_config),
        "types": [r.dtype, config.model.compute_dtype, "" if r.path else config.model.quantize],
    }
    file = (
        epath.Path(r.cache or epath.Path(run.workdir) / "reference")
        / f"{reference.digest_of(inputs)}.npz"
    )
    if (found := reference.load(file, inputs)) is not None:
        return found
    specs = make_reference_specs(config, run.resolved, run.step_spec, run.mesh)
    frozen = weights.load_frozen(run.step_spec, specs, config)
    step = partitioning.jit_reference_step(run.step_spec)
    batches = make_pipeline(config, run.resolved, run.mesh, examples, once=True).iterator()
    cache = reference.compute(
        iter(tqdm.tqdm(batches, desc="reference", disable=None)),
        lambda batch: step(frozen, put_batch(run.mesh, batch)),
        len(examples),
    )
    if distributed.is_main():
        reference.save(file, cache, inputs)
    return cache


def as_guided(run: Run) -> Run:
    """Return the run with the guide in the reference's place."""
    r = run.config.reference
    guide = ReferenceOptions(path=r.guide, dtype=r.dtype, mode="cached", cache=r.cache)
    config = dataclasses.replace(run.config, reference=guide)
    resolved = resolve_config(config, jax.device_count())
    spec = make_step_spec(config, resolved, run.total_steps)
    return run._replace(config=config, resolved=resolved, step_spec=spec)


def batches_of(run: Run, source: Pipeline, examples: Examples) -> Callable[[int], Iterator[Any]]:
    """Return a function from a step to this process's batches from there on, what is cached of the
    reference and of a guide filled in."""
    caches = {}
    if run.config.reference.mode == "cached" and run.step_spec.wants_reference:
        caches["reference_token_logps"] = cached_reference(run, examples)
    if any(term.loss.wants_guide for term in run.resolved.terms):
        caches["guide_token_logps"] = cached_reference(as_guided(run), examples)

    def fill(batch: Any) -> Any:
        for field, cache in caches.items():
            batch = cache.fill(batch, field)
        return batch

    return lambda step: map(fill, source.iterator(step))


class Offline:
    """Batches of a fixed data set with the face of an online source: the loop sees no
    difference."""

    metrics: dict[str, float] = {}

    def __init__(self, batches: Iterator[Any]):
        self._batches = batches

    def next(self, weights: Callable[[], Any]) -> Any:
        """Return this process's next batch, whatever the weights."""
        return next(self._batches)

    def evaluate(self, weights: Any) -> tuple[dict[str, float], Iterator[Any]]:
        """Sample held-out prompts: a data set's held-out examples have the eval step instead."""
        raise AssertionError("a fixed data set has no prompts to sample")

    def save(self, workdir: Any, step: int, kept: Sequence[int] = ()) -> dict[str, Any]:
        """Return what a checkpoint has to hold beside the step: nothing."""
        return {}

    def log_samples(self, workdir: Any, step: int) -> Sequence[Mapping[str, Any]]:
        """Write and return the samples: there are none."""
        return []

    def close(self) -> None:
        """Close what is open: nothing."""


def check_source(train: Pipeline | Rollouts, workdir: str, extra: Mapping[str, Any]) -> str:
    """Tell why a run's batches cannot go on from what a checkpoint holds; "" where they can."""
    saved = extra.get("source")
    if isinstance(train, Pipeline) or not saved:
        return ""
    try:
        read_saved(workdir, saved)
    except (FileNotFoundError, ValueError) as error:
        return f"the rollout beside it is lost: {error}"
    return ""


def make_source(run: Run, first: int, saved: dict[str, Any]) -> Offline | Rollouts:
    """Return where the loop's batches come from, going on after ``first`` steps."""
    if isinstance(run.train, Pipeline):
        return Offline(batches_of(run, run.train, run.examples)(first))
    if saved:
        run.train.restore(run.workdir, saved)
    return run.train
