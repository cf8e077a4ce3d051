# SPDX-License-Identifier: Apache-2.0
"""The train step and the eval step: pure functions of (state, frozen, batch), the same for every
objective.

    state   = {"step", "params": what is trained, "opt_state", "running": statistics that objectives
               keep from step to step, "reference": only where it moves with the policy}
    frozen  = {"base": the reference of a full fine-tune, and under LoRA the policy's base too;
               "reference": overrides it}

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

from align_jax import losses
from align_jax.core.metrics import Sums, divide, join
from align_jax.core.schema import Batch, Outputs
from align_jax.losses.logprobs import (
    JENSEN_SHANNON,
    WHOLE,
    Divergence,
    at_last,
    at_sources,
    blank_outputs,
    sum_by_slot,
    token_outputs,
)
from align_jax.losses.objective import Term
from align_jax.models.lora import merge
from align_jax.models.model import Aux, Model
from align_jax.models.moe import load_balancing
from align_jax.parallel.mesh import ROWS

Tree = Any
Schedule = Callable[[jax.Array], Any]  # step -> learning rate


# Loss positions of every row whose logits are alive at once.  Each chunk reads the head and adds to
# the head's gradient, so few are fast; a GPU has the memory for larger ones.
CHUNK, CHUNKS = 128, {"gpu": 512}


class StepSpec(NamedTuple):
    """What a step is compiled from: everything static."""

    policy: Model  # with its adapter, if it has one
    base: Model  # the same without adapter
    terms: tuple[Term, ...]
    optimizer: optax.GradientTransformation
    schedule: Schedule  # for the metrics
    microbatches: int = 1
    chunk: int = CHUNK  # loss positions of every row whose logits are alive at once
    seed: int = 0
    sync_every_steps: int = 0
    mix: float = 1.0
    value_head: str = "value"
    value_warmup_steps: int = 0  # first steps in which it alone moves
    # of the samples that a policy gradient learns from: logits are divided by it
    temperature: float = 1.0
    other: Model | None = None  # the reference, where it is another model than the base
    load_balancing: float = 0.0  # coefficient of a mixture of experts' auxiliary loss

    @property
    def reference(self) -> Model:
        """What the policy is compared with: the base, or a model of its own."""
        return self.other or self.base

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields of Outputs, beyond the basic three, that some term asks for."""
        return tuple(sorted({need for term in self.terms for need in term.needs}))

    @property
    def divergence(self) -> Divergence:
        """Which divergence from the reference is computed, where ``needs`` names one."""
        asked = (term.loss.divergence for term in self.terms if "divergence" in term.needs)
        return next(asked, JENSEN_SHANNON)

    @property
    def wants_logps(self) -> bool:
        """Tell whether any term looks at log-probabilities; reward models, which need scores alone,
        do not."""
        return not all(term.scores_alone for term in self.terms)

    @property
    def wants_reference(self) -> bool:
        """Tell whether any term compares the policy with a reference."""
        return any(term.reference for term in self.terms)

    @property
    def wants_statistics(self) -> bool:
        """Tell whether any term depends on statistics of the whole batch."""
        return losses.needs_statistics(self.terms)

    @property
    def balances(self) -> bool:
        """Tell whether the loss holds how evenly experts are chosen over the whole batch."""
        return bool(self.load_balancing and self.policy.config.num_experts)

    @property
    def drops(self) -> bool:
        """Tell whether dropout acts in training: not where the policy is compared with its own old
        log-probabilities, which were computed without; their ratio is to begin at 1."""
        return not any(term.objective.rollout for term in self.terms)


def init_state(spec: StepSpec, params: Tree, reference: Tree | None = None) -> Tree:
    """Make the state of step 0.

    Args:
        spec: what the step is compiled from.
        params: the trained parameters.
        reference: where a moving reference starts; what it lacks (None: all of it) starts from
            ``params``.
    """
    state = {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "opt_state": spec.optimizer.init(params),
        "running": losses.first_running(spec.terms),
    }
    if spec.sync_every_steps:
        state["reference"] = merge(jax.tree.map(jnp.copy, params), reference or {})
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


def _first(logits: Callable[[Any], Any], count: int) -> Callable[[Any], Any]:
    """Return the logits of the first tokens of the vocabulary alone."""
    return lambda x: logits(x)[..., :count]


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
    divergence: Divergence = JENSEN_SHANNON,
    key: jax.Array | None = None,
    temperature: float = 1.0,
) -> tuple[Outputs, Aux]:
    """Run a model over a batch.

    Args:
        model: the model.
        params: its parameters.
        batch: the rows.
        needs: optional fields of Outputs to compute.
        chunk: loss positions of every row whose logits are alive at once.
        logps: false leaves the output head out (zeros instead): a reward model's.
        value_head: which head gives the values.
        reference: model and parameters to compare with, where whole distributions are.
        divergence: which one is needed as ``"divergence"``.
        key: of dropout; None = off.
        temperature: the logits are divided by it.

    Returns:
        The outputs, and the routing's sums over all layers (empty for dense models).
    """
    fields = (batch.tokens, batch.segment_ids, batch.positions, batch.prefix_ids)
    hidden, aux = model.hidden(params, *fields, dropout_key=key)
    other = None
    if WHOLE.intersection(needs) and reference is not None:
        unembed = _unembed(*reference, batch, chunk, temperature)
        both = min(model.config.vocab_size, reference[0].config.vocab_size)
        if model.config.vocab_size != reference[0].config.vocab_size:
            unembed = _first(unembed, both)  # of another size, compared over what they share
        other = reference[0].hidden(reference[1], *fields)[0], unembed
    outputs = blank_outputs(batch)
    if logps:
        unembed = _unembed(model, params, batch, chunk, temperature)
        outputs = token_outputs(
            hidden, unembed, batch, needs=needs, chunk=chunk, reference=other, divergence=divergence
        )
    if {"scores", "step_scores"}.intersection(needs):
        scores = model.head(params, "score", hidden)
        if "scores" in needs:
            outputs = outputs._replace(scores=at_last(scores, batch))
        if "step_scores" in needs:
            outputs = outputs._replace(step_scores=jnp.where(batch.loss_mask, scores, 0.0))
    if "values" in needs:
        outputs = outputs._replace(values=at_sources(model.head(params, value_head, hidden), batch))
    return outputs, aux


class Forwards(NamedTuple):
    """The forwards of one step: what it is compiled from, and the weights that it leaves alone."""

    spec: StepSpec
    base: Tree  # the frozen weights under what is trained
    reference_model: Model
    reference_params: Tree

    def policy(
        self, trainable: Tree, batch: Batch, key: jax.Array | None = None
    ) -> tuple[Outputs, Aux]:
        """Run the policy; return its outputs and the routing's sums."""
        spec = self.spec
        with jax.named_scope("policy"):
            return forward(
                spec.policy,
                merge(self.base, trainable),
                batch,
                needs=spec.needs,
                chunk=spec.chunk,
                logps=spec.wants_logps,
                value_head=spec.value_head,
                reference=(self.reference_model, self.reference_params),
                divergence=spec.divergence,
                key=key,
                temperature=spec.temperature,
            )

    def reference(self, batch: Batch) -> Outputs | None:
        """Run the reference, or take what is cached; None where no term needs it."""
        spec, token_logps = self.spec, batch.reference_token_logps
        if not spec.wants_reference:
            return None
        if token_logps is not None:
            return Outputs(token_logps, sum_by_slot(token_logps, batch), batch.lengths)
        with jax.named_scope("reference"):
            outputs, _ = forward(
                self.reference_model,
                self.reference_params,
                batch,
                chunk=spec.chunk,
                temperature=spec.temperature,
            )
        return jax.lax.stop_gradient(outputs)

    def text(self, trainable: Tree, batch: Batch, key: jax.Array | None = None) -> Outputs | None:
        """Run the policy over the text beside a rollout, at temperature 1."""
        spec, text = self.spec, batch.text
        if text is None:
            return None
        with jax.named_scope("text"):
            params = merge(self.base, trainable)
            return forward(spec.policy, params, text, chunk=spec.chunk, key=key)[0]

    def mismatched(self, trainable: Tree, batch: Batch) -> tuple[Outputs, Outputs] | None:
        """Run both over each prompt with another prompt's response, without gradient."""
        other, spec = batch.mismatched, self.spec
        if other is None or (reference := self.reference(other)) is None:
            return None
        params = merge(self.base, jax.lax.stop_gradient(trainable))
        with jax.named_scope("mismatched"):
            policy, _ = forward(
                spec.policy, params, other, chunk=spec.chunk, temperature=spec.temperature
            )
        return policy, reference

    def inputs(
        self,
        trainable: Tree,
        batch: Batch,
        key: jax.Array | None = None,
        reference: Outputs | None = None,
    ) -> tuple[losses.Inputs, Aux]:
        """Return what the objectives see of a batch, and the routing's sums.

        Args:
            trainable: what is trained.
            batch: the rows.
            key: of dropout; None = off.
            reference: the reference's outputs, where they are known already.
        """
        reference = self.reference(batch) if reference is None else reference
        policy, aux = self.policy(trainable, batch, key)
        mismatched, text = self.mismatched(trainable, batch), self.text(trainable, batch, key)
        return losses.Inputs(batch, policy, reference, mismatched, text=text), aux


def forwards_of(spec: StepSpec, state: Tree, frozen: Tree) -> Forwards:
    """Say which weights the forwards of a step run with."""
    if "reference" in state:  # it moves with the policy
        return Forwards(
            spec, frozen["base"], spec.policy, merge(frozen["base"], state["reference"])
        )
    return Forwards(spec, frozen["base"], spec.reference, frozen.get("reference", frozen["base"]))


# ------------------------------------------------------------------------------------- microbatches


def split(batch: Batch, parts: int) -> Batch:
    """Split a batch into microbatches: ``[N, ...] -> [M, N/M, ...]``, whole groups, interleaved.

    Interleaved (unit i goes to part i mod M) each device keeps its own rows, so the split moves
    nothing between devices; contiguous parts would cost an all-to-all.

    Raises:
        ValueError: the groups do not divide into so many parts.
    """
    if batch.text is not None:
        rest = split(batch._replace(text=None), parts)
        return rest._replace(text=split(batch.text, parts))
    rows, (groups, _) = batch.tokens.shape[0], batch.lengths.shape
    units = min(rows, groups)  # the smallest pieces that hold whole rows and whole groups
    if units % parts:
        raise ValueError(
            f"a batch of {units} units (rows with whole groups) does not divide into {parts} "
            "microbatches"
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
    parts, forwards = spec.microbatches, forwards_of(spec, state, frozen)
    batches = split(batch, parts)
    key = jax.random.fold_in(jax.random.key(spec.seed), state["step"])
    keys = jax.random.split(key, parts) if spec.drops else None
    denominators = losses.weights(spec.terms, batch).sum(axis=1)  # [K]

    def share(
        trainable: Tree, xs: tuple[Batch, jax.Array | None], first: FirstPass | None
    ) -> tuple[jax.Array, tuple[Sums, Aux, Tree]]:
        """A microbatch's share of the loss; without a first pass it is the whole batch."""
        inputs, aux = forwards.inputs(trainable, *xs, first and first.reference)
        if first is None:
            stats, running = losses.own_statistics(spec.terms, inputs, state["running"])
        else:
            stats, running = first.stats, None
        with jax.named_scope("loss"):
            total = losses.total(spec.terms, inputs, stats, denominators)
        loss = total.loss
        if spec.balances:
            loss += spec.load_balancing * load_balancing(aux, first.routing if first else aux)
        return loss, (total.metrics, aux, running)

    grad = jax.value_and_grad(share, has_aux=True)
    if parts == 1:
        xs = part((batches, keys), 0)
        (loss, (metrics, aux, running)), grads = grad(state["params"], xs, None)
    else:
        first, running = _first_pass(forwards, state, batches, keys)
        batches = batches._replace(mismatched=None)  # only the first pass looks at them

        def add(grads: Tree, xs: tuple) -> tuple[Tree, tuple[jax.Array, Sums, Aux]]:
            batch, key, reference, stats = xs
            own = FirstPass(reference, stats, first.routing)
            (loss, (metrics, aux, _)), more = grad(state["params"], (batch, key), own)
            return jax.tree.map(jnp.add, grads, _float32(more)), (loss, metrics, aux)

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state["params"])
        each = (batches, keys, first.reference, first.stats)
        grads, (loss, metrics, aux) = jax.lax.scan(add, zeros, each)
        loss, aux = jax.tree.map(lambda x: jnp.sum(x, axis=0), (loss, aux))
        metrics = {name: join(one) for name, one in metrics.items()}

    if aux:
        metrics["loss/load_balancing"] = load_balancing(aux, aux), jnp.ones(())
    key = jax.random.fold_in(key, ROUNDING)
    new_state, update_metrics = _update(spec, state, loss, _float32(grads), running, key)
    real = jnp.sum(batch.segment_ids > 0, dtype=jnp.float32)
    return new_state, {
        "loss": loss,
        **update_metrics,
        "num_tokens": real,
        "padding_fraction": 1.0 - real / batch.tokens.size,
        "groups": jnp.sum(batch.weight > 0),
        **divide(metrics),
    }


def _float32(tree: Tree) -> Tree:
    """Widen what is added up; no copy where it is float32, and counts stay what they are."""

    def widened(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(widened, tree)


ROUNDING = 1 << 30  # a step's key for rounding: no microbatch has this number


def round_at_random(key: jax.Array, wide: Tree, like: Tree) -> Tree:
    """Round float32 leaves to bfloat16 where ``like`` has that type: up or down, so that the mean
    is what was rounded.

    To the nearest, all that is below half a bfloat16's last place (2⁻⁹ of it) would be lost at
    every step: small updates of parameters, and a second moment's decay of one in a thousand.

    References:
        Gupta et al. 2015, arXiv 1502.02551, section 3 (stochastic rounding).

    >>> x, like = jnp.full(4096, 1.0 + 2.0**-10), jnp.zeros(4096, jnp.bfloat16)
    >>> rounded = round_at_random(jax.random.key(0), x, like)
    >>> round(float((rounded - 1).mean(dtype=jnp.float32) * 2**10), 1)
    0.9
    """

    def leaf(number: int, x: jax.Array, narrow: jax.Array) -> jax.Array:
        if narrow.dtype != jnp.bfloat16 or x.dtype != jnp.float32:
            return x.astype(narrow.dtype)
        noise = jax.random.bits(jax.random.fold_in(key, number), x.shape, jnp.uint16)
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise.astype(jnp.uint32)
        cut = jax.lax.bitcast_convert_type(bits >> 16 << 16, jnp.float32)
        return jnp.where(jnp.isfinite(x), cut, x).astype(jnp.bfloat16)

    leaves, structure = jax.tree.flatten(wide)
    pairs = zip(leaves, jax.tree.leaves(like), strict=True)
    return jax.tree.unflatten(structure, [leaf(number, *pair) for number, pair in enumerate(pairs)])


class FirstPass(NamedTuple):
    """What the gradient's pass over microbatches finds computed."""

    reference: Outputs | None  # of each microbatch, where it was run
    stats: Tree  # of the whole batch, for each microbatch
    routing: Aux  # the routing's sums over the whole batch


def _first_pass(
    forwards: Forwards, state: Tree, batches: Batch, keys: jax.Array | None
) -> tuple[FirstPass, Tree]:
    """Compute the statistics of the whole batch, without gradients, where something needs any.

    Returns:
        What it found, and the running statistics after this step.
    """
    spec, params = forwards.spec, state["params"]
    if not (spec.wants_statistics or spec.balances):
        return FirstPass(None, {}, {}), state["running"]

    def of_part(
        _: None, xs: tuple[Batch, jax.Array | None]
    ) -> tuple[None, tuple[Outputs | None, Tree, Aux]]:
        if not spec.wants_statistics:
            return None, (None, {}, forwards.policy(params, *xs)[1])
        inputs, aux = forwards.inputs(params, *xs)
        return None, (inputs.reference, losses.batch_statistics(spec.terms, inputs), aux)

    _, (references, found, aux) = jax.lax.scan(of_part, None, (batches, keys))
    stats, running = losses.reduce_statistics(spec.terms, found, state["running"])
    routing = jax.tree.map(lambda x: jnp.sum(x, axis=0), aux)
    return FirstPass(references, stats, routing), running


def _update(
    spec: StepSpec, state: Tree, loss: jax.Array, grads: Tree, running: Tree, key: jax.Array
) -> tuple[Tree, dict[str, jax.Array]]:
    """Move the parameters, unless the step is not finite."""
    keys = jax.random.split(key, 3)
    with jax.named_scope("optimizer"):
        norm = optax.tree.norm(grads)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integer counts with floats
            # all is float32 whatever the parameters; what is kept of it has its own type
            held, before = _float32(state["opt_state"]), _float32(state["params"])
            updates, opt_state = spec.optimizer.update(grads, held, before)
            opt_state = round_at_random(keys[0], opt_state, state["opt_state"])
            rate = jnp.asarray(spec.schedule(state["step"]), jnp.float32)
            if spec.value_warmup_steps:
                updates = _of_values_first(spec, state["step"], updates)
            params = optax.apply_updates(before, updates)
            params = round_at_random(keys[1], params, state["params"])
        step = state["step"] + 1
        changed = {"params": params, "opt_state": opt_state, "running": running}
        if spec.sync_every_steps:
            mixed = _sync(spec, step, _float32(state["reference"]), _float32(params))
            changed["reference"] = round_at_random(keys[2], mixed, state["reference"])
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        kept = {name: state[name] for name in changed}
        changed = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, kept)
    return {"step": step, **changed}, {"grad_norm": norm, "learning_rate": rate}


def _of_values_first(spec: StepSpec, step: jax.Array, updates: Tree) -> Tree:
    """Hold all but the value head in the first steps; the optimizer's moments gather meanwhile."""
    moves = step >= spec.value_warmup_steps
    return {
        name: part
        if name == spec.value_head
        else jax.tree.map(lambda x: jnp.where(moves, x, jnp.zeros_like(x)), part)
        for name, part in updates.items()
    }


def _sync(spec: StepSpec, step: jax.Array, reference: Tree, params: Tree) -> Tree:
    """TR-DPO (arXiv 2404.09656): every k steps, reference <- mix * policy + (1 - mix) *
    reference."""
    mix = jnp.where(step % spec.sync_every_steps == 0, spec.mix, 0.0)
    return jax.tree.map(lambda r, p: mix * p + (1.0 - mix) * r, reference, params)


def eval_statistics(spec: StepSpec, state: Tree, frozen: Tree, batch: Batch) -> Tree:
    """Return a batch's share of the evaluation set's statistics; see
    ``losses.batch_statistics``."""
    inputs, _ = forwards_of(spec, state, frozen).inputs(state["params"], batch)
    return losses.batch_statistics(spec.terms, inputs)


def eval_step(spec: StepSpec, state: Tree, frozen: Tree, batch: Batch, stats: Tree = None) -> Sums:
    """Evaluate the loss and the metrics of a batch, without dropout and without a gradient.

    Args:
        spec, state, frozen, batch: as ``train_step`` takes them.
        stats: the objectives' statistics of the whole evaluation set, for this batch; None: this
            batch is all of it.

    Returns:
        (sum, weight) pairs, to be added up over the evaluation set and then divided, once; those of
        ``loss`` have an entry for each term.
    """
    inputs, _ = forwards_of(spec, state, frozen).inputs(state["params"], batch)
    if stats is None:
        stats, _ = losses.own_statistics(spec.terms, inputs, state["running"])
    total = losses.total(spec.terms, inputs, stats)
    return {"loss": total.sums, **total.metrics}


def reference_step(spec: StepSpec, frozen: Tree, batch: Batch) -> jax.Array:
    """Return the reference's token log-probabilities [N, T], for the cache."""
    model, params = spec.reference, frozen.get("reference", frozen["base"])
    return forward(model, params, batch, needs=(), chunk=spec.chunk)[0].token_logps
