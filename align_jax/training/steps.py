# SPDX-License-Identifier: Apache-2.0
"""The train step and the eval step: pure functions of (state, frozen, batch), the same for every
objective.

    state   = {"step", "params": what is trained, "opt_state", "carry": running statistics of objectives,
               "reference": only where the reference moves with the policy}
    frozen  = {"base": the reference of a full fine-tune, and under LoRA the policy's base too;
    "reference": overrides}

              ┌─ policy forward ────┐
    batch ────┤                     ├─ losses, weights ─ one division ─ gradient ─ optax ─ state
              └─ reference forward ─┘

A step's batch may be split into M microbatches.  Every division is by a sum over the *whole* global
batch, known before the first microbatch, so the result does not depend on the split.  Objectives
that need a statistic of the whole batch get it from a first pass without gradients (free when M =
1: the same forward serves).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from align_jax.core.metrics import with_margin
from align_jax.core.schema import Batch, Outputs
from align_jax.losses import objective
from align_jax.losses.logprobs import at_last, at_sources, sum_by_slot, token_outputs
from align_jax.losses.objective import Term
from align_jax.models.lora import merge
from align_jax.models.model import Model
from align_jax.parallel.mesh import ROWS

Tree = Any
Sums = dict[str, tuple[jax.Array, jax.Array]]  # metric -> (weighted sum, sum of the weights)


class StepSpec(NamedTuple):
    """What a step is compiled from: everything static."""

    policy: Model  # with its adapter, if it has one
    base: Model  # the reference: the same without adapter
    terms: tuple[Term, ...]
    optimizer: optax.GradientTransformation
    schedule: Any  # step -> learning rate, for the metrics
    microbatches: int = 1
    chunk: int = 128  # loss positions of every row whose logits are alive at once
    seed: int = 0
    sync_every_steps: int = 0
    mix: float = 1.0
    value_head: str = "value"
    # of the samples that a policy gradient learns from: logits are divided by it
    temperature: float = 1.0
    load_balancing: float = 0.0  # coefficient of a mixture of experts' auxiliary loss

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields of Outputs, beyond the basic three, that some term asks for."""
        return tuple(sorted({need for term in self.terms for need in term.needs}))

    @property
    def wants_logps(self) -> bool:
        """Tell whether any term looks at log-probabilities; reward models, which need scores alone,
        do not."""
        return any(term.needs != ("scores",) for term in self.terms)

    @property
    def wants_reference(self) -> bool:
        """Tell whether any term compares the policy with a reference."""
        return any(term.reference for term in self.terms)

    @property
    def measured(self) -> tuple[int, ...]:
        """Terms that need statistics of the whole batch."""
        return tuple(i for i, term in enumerate(self.terms) if term.objective.measure is not None)


def init_state(spec: StepSpec, params: Tree) -> Tree:
    """Make the state of step 0 from the trained parameters."""
    state = {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "opt_state": spec.optimizer.init(params),
        "carry": {
            str(i): jax.tree.map(jnp.asarray, spec.terms[i].objective.carry) for i in spec.measured
        },
    }
    if spec.sync_every_steps:
        state["reference"] = jax.tree.map(jnp.copy, params)
    return state


# ----------------------------------------------------------------------------------------- forwards

# Chunks of the loss from which on the output head is copied to each device for all of them: each
# would gather it and sum its gradient anew.  Below, the float32 gradient that each device then
# holds whole is not worth its memory.
COPIED_FROM_CHUNKS = 8


def _unembed(
    model: Model, params: Tree, batch: Batch, chunk: int, temperature: float
) -> Callable[[Any], Any]:
    """Return hidden states [N, c, D] -> logits [N, c, V], for a loop over chunks."""
    many = -(-batch.loss_index.shape[1] // chunk) >= COPIED_FROM_CHUNKS
    logits = model.unembedding(params) if many else functools.partial(model.unembed, params)
    return lambda x: logits(x) / temperature


def forward(
    model: Model,
    params: Tree,
    batch: Batch,
    *,
    needs: tuple[str, ...] = (),
    chunk: int,
    logps: bool = True,
    value_head: str = "value",
    reference: tuple[Model, Tree] | None = None,
    key: jax.Array | None = None,
    temperature: float = 1.0,
) -> tuple[Outputs, dict]:
    """Run a model over a batch.

    Args:
        model: the model.
        params: its parameters.
        batch: the rows.
        needs: optional fields of Outputs to compute.
        chunk: loss positions of every row whose logits are alive at once.
        logps: false leaves the output head out (zeros instead): a reward model's.
        value_head: which head gives the values.
        reference: model and parameters to compare with, where ``"kl"`` is needed.
        key: of dropout; None = off.
        temperature: the logits are divided by it.

    Returns:
        The outputs, and the model's auxiliary losses (sums over layers; empty for dense models).
    """
    fields = (batch.tokens, batch.segment_ids, batch.positions, batch.prefix_ids)
    hidden, aux = model.hidden(params, *fields, dropout_key=key)
    other_hidden = other_unembed = None
    if "kl" in needs and reference is not None:
        other, other_params = reference
        other_hidden = other.hidden(other_params, *fields)[0]
        other_unembed = _unembed(other, other_params, batch, chunk, temperature)
    outputs = objective.blank_outputs(batch)
    if logps:
        unembed = _unembed(model, params, batch, chunk, temperature)
        outputs = token_outputs(
            hidden,
            unembed,
            batch,
            needs=needs,
            chunk=chunk,
            reference_hidden=other_hidden,
            reference_unembed=other_unembed,
        )
    if "scores" in needs:
        outputs = outputs._replace(scores=at_last(model.head(params, "score", hidden), batch))
    if "values" in needs:
        outputs = outputs._replace(values=at_sources(model.head(params, value_head, hidden), batch))
    return outputs, aux


def _policy(
    spec: StepSpec,
    trainable: Tree,
    frozen: Tree,
    batch: Batch,
    reference: tuple[Model, Tree] | None,
    key: jax.Array | None,
) -> tuple[Outputs, dict]:
    with jax.named_scope("policy"):
        return forward(
            spec.policy,
            merge(frozen["base"], trainable),
            batch,
            needs=spec.needs,
            chunk=spec.chunk,
            logps=spec.wants_logps,
            value_head=spec.value_head,
            reference=reference,
            key=key,
            temperature=spec.temperature,
        )


def _reference_model(spec: StepSpec, state: Tree, frozen: Tree) -> tuple[Model, Tree]:
    if "reference" in state:  # it moves with the policy
        return spec.policy, merge(frozen["base"], state["reference"])
    return spec.base, frozen.get("reference", frozen["base"])


def _reference(spec: StepSpec, reference: tuple[Model, Tree], batch: Batch) -> Outputs | None:
    if not spec.wants_reference:
        return None
    if batch.reference_token_logps is not None:
        token_logps = batch.reference_token_logps
        return Outputs(token_logps, sum_by_slot(token_logps, batch), batch.lengths)
    with jax.named_scope("reference"):
        outputs, _ = forward(*reference, batch, chunk=spec.chunk, temperature=spec.temperature)
    return jax.lax.stop_gradient(outputs)


# ------------------------------------------------------------------------ statistics and the losses


def _measure(
    spec: StepSpec,
    trainable: Tree,
    frozen: Tree,
    reference_model: tuple[Model, Tree],
    policy: Outputs,
    reference: Outputs | None,
    batch: Batch,
) -> dict[str, dict[str, jax.Array]]:
    """Measure one microbatch, without gradients: per-example quantities, from which summarize makes
    statistics."""
    policy, mismatched = jax.lax.stop_gradient(policy), None
    if batch.mismatched is not None:
        params = merge(frozen["base"], jax.lax.stop_gradient(trainable))
        with jax.named_scope("mismatched"):
            mine, _ = forward(spec.policy, params, batch.mismatched, chunk=spec.chunk)
            mismatched = (mine, _reference(spec, reference_model, batch.mismatched))
    return {
        str(i): objective.measure(spec.terms[i], policy, reference, batch, mismatched)
        for i in spec.measured
    }


def _summarize(spec: StepSpec, measured: Tree, weights: Tree, carry: Tree) -> tuple[Tree, Tree]:
    """Turn what was measured, [M, b] arrays over the global batch, into statistics and the next
    carry."""
    stats, carried = {}, {}
    for i in map(str, spec.measured):
        stats[i], carried[i] = objective.summarize(
            spec.terms[int(i)], measured[i], weights[int(i)], carry[i]
        )
    return stats, carried


def _weights(spec: StepSpec, batch: Batch) -> list[jax.Array]:
    """Return every term's weights [b], which depend on the batch alone."""
    return [objective.group_weights(term, batch) for term in spec.terms]


def _own_statistics(
    spec: StepSpec,
    trainable: Tree,
    frozen: Tree,
    reference_model: tuple[Model, Tree],
    policy: Outputs,
    reference: Outputs | None,
    batch: Batch,
    carry: Tree,
) -> tuple[Tree, Tree]:
    """Make the statistics of a batch that is a single part."""
    if not spec.measured:
        return {}, carry
    measured = _measure(spec, trainable, frozen, reference_model, policy, reference, batch)
    measured, weights = jax.tree.map(lambda x: x[None], (measured, _weights(spec, batch)))
    stats, carry = _summarize(spec, measured, weights, carry)
    return part(stats, 0), carry


def _total(
    spec: StepSpec,
    policy: Outputs,
    reference: Outputs | None,
    batch: Batch,
    stats: Tree,
    denominators: list[jax.Array] | None,
) -> tuple[jax.Array, Sums]:
    """This microbatch's share of the loss, and its metrics."""
    total, metrics = jnp.zeros((), jnp.float32), {}
    for i, term in enumerate(spec.terms):
        losses, weights, more = objective.apply(term, policy, reference, batch, stats.get(str(i)))
        summed = jnp.sum(losses * weights)
        denominator = jnp.sum(weights) if denominators is None else denominators[i]
        total += term.weight * summed / jnp.maximum(denominator, 1e-8)
        if len(spec.terms) > 1:
            more = {**more, f"loss/{term.name}": (summed, jnp.sum(weights))}
        # where two terms report the same quantity, the first one's stands
        metrics = {**more, **metrics}
    return total, jax.lax.stop_gradient(metrics)


# ------------------------------------------------------------------------------------- microbatches


def split(batch: Batch, parts: int) -> Batch:
    """Split a batch into microbatches: ``[N, ...] -> [M, N/M, ...]``, whole groups, interleaved.

    Interleaved (unit i goes to part i mod M) each device keeps its own rows, so the split moves
    nothing between devices; contiguous parts would cost an all-to-all.

    Raises:
        ValueError: the groups do not divide into so many parts.
    """
    rows, (groups, _) = batch.tokens.shape[0], batch.lengths.shape
    units = min(rows, groups)  # the smallest pieces that hold whole rows and whole groups
    if units % parts:
        raise ValueError(
            f"a batch of {units} units (rows with whole groups) does not divide "
            f"into {parts} microbatches"
        )

    def interleave(x: jax.Array) -> jax.Array:
        x = x.reshape(units // parts, parts, x.shape[0] // units, *x.shape[1:])
        x = jnp.moveaxis(x, 1, 0).reshape(parts, -1, *x.shape[3:])
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(None, ROWS))

    return jax.tree.map(interleave, batch)


def part(tree: Tree, index: int) -> Tree:
    """Take one microbatch out of a split tree."""
    return jax.tree.map(lambda x: x[index], tree)


# ---------------------------------------------------------------------------------------- the steps


def train_step(
    spec: StepSpec, state: Tree, frozen: Tree, batch: Batch
) -> tuple[Tree, dict[str, jax.Array]]:
    """Take one optimizer step.

    Args:
        spec: static; everything else is arrays.
        state: what is trained (donated).
        frozen: weights that are not.
        batch: the global batch of this step.

    Returns:
        The next state, and the metrics: means over the global batch, NaN where there was nothing to
        average.  Where the loss or the gradient's norm is not finite the state is returned
        unchanged but for its step, so that nothing is spoiled; the caller stops the run.
    """
    parts = spec.microbatches
    batches = split(batch, parts)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(spec.seed), state["step"]), parts)
    reference_model = _reference_model(spec, state, frozen)

    def part_loss(
        trainable: Tree,
        batch: Batch,
        key: jax.Array,
        stats: Tree,
        reference: Outputs | None,
        denominators: list[jax.Array] | None,
    ) -> tuple[jax.Array, tuple[Sums, Tree]]:
        if reference is None:
            reference = _reference(spec, reference_model, batch)
        policy, aux = _policy(spec, trainable, frozen, batch, reference_model, key)
        carry = state["carry"]
        if stats is None:
            stats, carry = _own_statistics(
                spec, trainable, frozen, reference_model, policy, reference, batch, carry
            )
        with jax.named_scope("loss"):
            total, metrics = _total(spec, policy, reference, batch, stats, denominators)
        for name, value in aux.items():
            total += spec.load_balancing * value / parts
            metrics[f"loss/{name}"] = (jax.lax.stop_gradient(value), jnp.ones(()))
        return total, (metrics, carry)

    grad = jax.value_and_grad(part_loss, has_aux=True)
    if parts == 1:
        (loss, (metrics, carry)), grads = grad(
            state["params"], part(batches, 0), keys[0], None, None, None
        )
    else:
        loss, metrics, carry, grads = _accumulate(
            spec, state, frozen, batches, keys, reference_model, grad
        )

    with jax.named_scope("optimizer"):
        norm = optax.global_norm(grads)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integer counts with floats
            updates, opt_state = spec.optimizer.update(grads, state["opt_state"], state["params"])
            rate = jnp.asarray(spec.schedule(state["step"]), jnp.float32)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        changed = {
            "params": optax.apply_updates(state["params"], updates),
            "opt_state": opt_state,
            "carry": carry,
        }
        step = state["step"] + 1
        if spec.sync_every_steps:
            changed["reference"] = _sync(spec, step, state["reference"], changed["params"])
        kept = {name: state[name] for name in changed}
        new_state = {
            "step": step,
            **jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, kept),
        }
    means = {
        name: jnp.where(weight > 0, total / jnp.maximum(weight, 1e-8), jnp.nan)
        for name, (total, weight) in metrics.items()
    }
    real = jnp.sum(batch.segment_ids > 0, dtype=jnp.float32)
    counts = {
        "num_tokens": real,
        "padding_fraction": 1.0 - real / batch.tokens.size,
        "groups": jnp.sum(batch.weight > 0),
    }
    return new_state, {
        "loss": loss,
        "grad_norm": norm,
        "learning_rate": rate,
        **counts,
        **with_margin(means),
    }


def _sync(spec: StepSpec, step: jax.Array, reference: Tree, params: Tree) -> Tree:
    """TR-DPO (arXiv 2404.09656): every k steps, reference <- mix * policy + (1 - mix) *
    reference."""
    mix = jnp.where(step % spec.sync_every_steps == 0, spec.mix, 0.0)
    return jax.tree.map(lambda r, p: (mix * p + (1.0 - mix) * r).astype(r.dtype), reference, params)


def _accumulate(
    spec: StepSpec,
    state: Tree,
    frozen: Tree,
    batches: Batch,
    keys: jax.Array,
    reference_model: tuple[Model, Tree],
    grad: Any,
) -> tuple[jax.Array, Sums, Tree, Tree]:
    """Sum loss, metrics and gradients over the microbatches."""
    references, stats, carry = None, {}, state["carry"]
    _, weights = jax.lax.scan(lambda _, batch: (None, _weights(spec, batch)), None, batches)
    denominators = [jnp.sum(x) for x in weights]
    if spec.measured:

        def first_pass(_, xs: tuple[Batch, jax.Array]) -> tuple[None, tuple[Tree, Outputs | None]]:
            batch, key = xs
            reference = _reference(spec, reference_model, batch)
            policy, _aux = _policy(spec, state["params"], frozen, batch, reference_model, key)
            measured = _measure(
                spec, state["params"], frozen, reference_model, policy, reference, batch
            )
            return None, (measured, reference)

        _, (measured, references) = jax.lax.scan(first_pass, None, (batches, keys))
        stats, carry = _summarize(spec, measured, weights, carry)
    batches = batches._replace(mismatched=None)  # only the first pass looks at them

    def second_pass(grads: Tree, xs: tuple) -> tuple[Tree, tuple[jax.Array, Sums]]:
        batch, key, stats, reference = xs
        (loss, (metrics, _)), more = grad(
            state["params"], batch, key, stats, reference, denominators
        )
        return jax.tree.map(jnp.add, grads, more), (loss, metrics)

    zeros = jax.tree.map(jnp.zeros_like, state["params"])
    grads, (losses, metrics) = jax.lax.scan(second_pass, zeros, (batches, keys, stats, references))
    return jnp.sum(losses), jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics), carry, grads


def eval_step(spec: StepSpec, state: Tree, frozen: Tree, batch: Batch) -> Sums:
    """Measure the loss and the metrics of a batch, without dropout and without a gradient.

    Returns:
        (sum, weight) pairs, to be added up over the evaluation set; ``loss`` weighted by the
        batch's real groups.
    """
    reference_model = _reference_model(spec, state, frozen)
    reference = _reference(spec, reference_model, batch)
    policy, _ = _policy(spec, state["params"], frozen, batch, reference_model, None)
    stats, _ = _own_statistics(
        spec, state["params"], frozen, reference_model, policy, reference, batch, state["carry"]
    )
    total, metrics = _total(spec, policy, reference, batch, stats, None)
    groups = jnp.sum(batch.weight)
    return {"loss": (total * groups, groups), **metrics}


def reference_step(spec: StepSpec, frozen: Tree, batch: Batch) -> jax.Array:
    """Return the reference's token log-probabilities [N, T], for the cache."""
    model, params = spec.base, frozen.get("reference", frozen["base"])
    return forward(model, params, batch, needs=(), chunk=spec.chunk)[0].token_logps
