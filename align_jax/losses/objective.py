# SPDX-License-Identifier: Apache-2.0
"""What an objective is, and the one way to call it.

An objective is a row in ``losses.OBJECTIVES``: a pure function of what the policy and the reference
say of a batch to *each group's loss and weight*.  Nothing is reduced here; whoever holds the whole
global batch computes

    total = Σ_k weight_k · (Σ_i losses_ki · weights_ki) / (Σ_i weights_ki)        k terms, i groups

so the result does not depend on how the batch was split over devices and microbatches.

    resolve ──► Terms ──► measure (every microbatch, no gradients) ──► summarize (once) ──► apply (every microbatch)
                            only where a term needs a statistic of the whole batch
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from align_jax.core.schema import Batch, Outputs
from align_jax.losses.logprobs import sum_by_slot

Metrics = dict[str, tuple[Any, Any]]  # name -> (sum, weight), scalars
# options of every objective with a reference
HUMANLINE = {"humanline": False, "log_eps_p": -1.0, "log_eps_r": 1.5}


@dataclasses.dataclass(frozen=True)
class Objective:
    """A row of the table.

    Attributes:
        fn: ``fn(policy, reference, batch, *, stats=None, **options) -> (losses [B], weights [B],
            metrics)``.  The weights depend on the batch and the options alone, never on what a
            model says.
        data: "completions" (R = 1), "pairs" (R = 2, chosen first), "ranked" (R = K, best first),
            "unpaired" (R = 1 with a label) or "rollout".
        reference: does it need the reference's log-probabilities?
        reference_option: if set, only where this option is not 0.
        formula: in one line.
        paper: arXiv id, or authors and year.
        metric: the held-out metric that training should improve, with its direction:
            "rewards/accuracies up".
        needs: fields of Outputs to be computed beyond the first three.
        option_needs: option -> fields needed where that option is on.
        adds: option -> (objective, default): a further term of the sum whose coefficient is this
            option.  It is a term of its own because its denominator (tokens) is not the pairs'.
        mismatched: does it need ``batch.mismatched``, each prompt with another prompt's response?
        measure: ``measure(policy, reference, batch, *, mismatched=None, **options) -> dict of [b]
            arrays``.
        summarize: ``summarize(measured: dict of [M, b], weights [M, b], carry, **options) ->
            (stats,
            carry)``; the leaves of stats have a leading axis M, and ``stats[m]`` goes to ``fn``
            with microbatch m.
        carry: the first value of what ``summarize`` carries from step to step, kept in the train
            state.
        rollout: options that the rollout source reads for this objective, with their defaults: how
            advantages are made.
    """

    fn: Callable[..., tuple[Array, Array, Metrics]]
    data: str
    formula: str
    paper: str
    metric: str
    reference: bool = False
    reference_option: str | None = None
    needs: tuple[str, ...] = ()
    option_needs: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    adds: Mapping[str, tuple[str, float]] = dataclasses.field(default_factory=dict)
    mismatched: bool = False
    measure: Callable[..., dict[str, Array]] | None = None
    summarize: Callable[..., tuple[Any, Any]] | None = None
    carry: Any = None
    rollout: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """Every option with its default: the function's, the added terms' coefficients, the
        rollout's, humanline."""
        found = {
            name: parameter.default
            for name, parameter in inspect.signature(self.fn).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name != "stats"
        }
        found |= {name: default for name, (_, default) in self.adds.items()} | dict(self.rollout)
        return found | (HUMANLINE if self.reference else {})


@dataclasses.dataclass(frozen=True)
class Term:
    """One objective of a weighted sum, with its options filled in."""

    name: str
    objective: Objective
    options: Mapping[str, Any]  # what fn takes
    weight: float = 1.0
    humanline: tuple[float, float] | None = None  # (log_eps_p, log_eps_r)
    # what the rollout source takes
    rollout: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def reference(self) -> bool:
        """Tell whether this term needs the reference's log-probabilities."""
        if not self.objective.reference or self.options.get("reference_free", False):
            return False
        option = self.objective.reference_option
        return option is None or bool(self.options[option]) or self.humanline is not None

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields of Outputs to be computed beyond the first three, with these options."""
        extra = [
            field
            for option, fields in self.objective.option_needs.items()
            if self.options.get(option)
            for field in fields
        ]
        return tuple(dict.fromkeys([*self.objective.needs, *extra]))


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {sorted(known)}"


def resolve(
    table: Mapping[str, Objective],
    name: str,
    options: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
) -> tuple[Term, ...]:
    """Turn a name such as "dpo+bco_pair+sft" into the terms of a weighted sum.

    An option is given to every term that accepts it.

    Args:
        table: the objectives.
        name: one objective or several joined by "+".
        options: option -> value; what is not named keeps its default.
        weights: one for each objective named; 1 by default.

    Returns:
        The terms; more than were named where an option adds one (``dpo`` with ``sft_coef``).

    Raises:
        KeyError: an unknown objective, or an option that none of them accepts.
        ValueError: weights that do not match the names, or objectives on different kinds of data.
    """
    options = dict(options or {})
    names = [part.strip() for part in name.split("+")]
    for part in names:
        if part not in table:
            raise KeyError(f"unknown objective {part!r}{_nearest(part, list(table))}")
    coefficients = [1.0] * len(names) if weights is None else [float(weight) for weight in weights]
    if len(coefficients) != len(names):
        raise ValueError(
            f"objective {name!r}: expected {len(names)} weights, got {len(coefficients)}"
        )
    accepted = {option for part in names for option in table[part].options}
    accepted |= {
        option
        for part in names
        for other, _ in table[part].adds.values()
        for option in table[other].options
    }
    for option in options:
        if option not in accepted:
            raise KeyError(
                f"objective {name!r} has no option {option!r}{_nearest(option, sorted(accepted))}"
            )
    terms: list[Term] = []
    for part, coefficient in zip(names, coefficients):
        terms.extend(_terms(table, part, options, coefficient))
    kinds = {term.objective.data for term in terms} - {"completions"}
    if len(kinds) > 1:
        raise ValueError(
            f"objective {name!r} mixes kinds of data: "
            f"{ {term.name: term.objective.data for term in terms} }"
        )
    return tuple(terms)


def _terms(
    table: Mapping[str, Objective], name: str, options: Mapping[str, Any], weight: float
) -> list[Term]:
    objective = table[name]
    chosen = {option: options.get(option, default) for option, default in objective.options.items()}
    humanline = None
    if objective.reference:
        on, low, high = (chosen.pop(key) for key in HUMANLINE)
        if on and not low < 0 < high:
            raise ValueError(f"humanline expects log_eps_p < 0 < log_eps_r, got {low} and {high}")
        if on and chosen.get("reference_free"):
            raise ValueError(
                f"objective {name!r}: humanline clamps ratios to the reference, but "
                "reference_free is on"
            )
        humanline = (float(low), float(high)) if on else None
    added = [(other, float(chosen.pop(option))) for option, (other, _) in objective.adds.items()]
    rollout = {option: chosen.pop(option) for option in objective.rollout}
    terms = [Term(name, objective, chosen, weight, humanline, rollout)]
    for other, coefficient in added:
        if coefficient:
            terms.extend(_terms(table, other, options, weight * coefficient))
    return terms


def data_kind(terms: Sequence[Term]) -> str:
    """Return the kind of data these terms train on; "sft" goes along with any."""
    kinds = [term.objective.data for term in terms]
    return next((kind for kind in kinds if kind != "completions"), "completions")


def clamp_ratios(
    policy: Outputs, reference: Outputs, batch: Batch, low: float, high: float
) -> Outputs:
    """Clamp the token log-ratios of the policy to the reference: humanline.

        a_t ← b_t + clip(a_t - b_t, low, high)

    Args:
        policy: its ``token_logps`` [N, T] are changed, and ``logps`` summed anew.
        reference: the same batch's.
        batch: the batch.
        low: log ε_P, in nats, negative.
        high: log ε_R, in nats, positive.

    References:
        Liu et al. 2025, arXiv 2509.24207 (humanline clipping); HALOs, commit 4831988,
        ``get_sequence_rewards``.
    """
    ratios = jnp.clip(policy.token_logps - reference.token_logps, low, high)
    token_logps = jnp.where(batch.loss_mask, reference.token_logps + ratios, 0.0)
    return policy._replace(token_logps=token_logps, logps=sum_by_slot(token_logps, batch))


def apply(
    term: Term, policy: Outputs, reference: Outputs | None, batch: Batch, stats: Any = None
) -> tuple[Float[Array, "B"], Float[Array, "B"], Metrics]:
    """Compute a term's losses, weights and metrics; the only place where an objective is called.

    Raises:
        ValueError: the term needs a reference and got none.
    """
    if term.reference and reference is None:
        raise ValueError(
            f"objective {term.name!r} needs the reference's log-probabilities, got none"
        )
    if term.humanline is not None:
        policy = clamp_ratios(policy, reference, batch, *term.humanline)
    with jax.named_scope(f"objective_{term.name}"):
        return term.objective.fn(policy, reference, batch, stats=stats, **term.options)


def measure(
    term: Term,
    policy: Outputs,
    reference: Outputs | None,
    batch: Batch,
    mismatched: tuple[Outputs, Outputs | None] | None = None,
) -> dict[str, Float[Array, "b"]]:
    """Compute a microbatch's share of the statistics that a term needs; {} where it needs none.  No
    gradients."""
    if term.objective.measure is None:
        return {}
    if term.objective.mismatched and mismatched is None:
        raise ValueError(f"objective {term.name!r} needs the outputs of batch.mismatched, got none")
    if term.humanline is not None:
        policy = clamp_ratios(policy, reference, batch, *term.humanline)
        if mismatched is not None:
            mismatched = (
                clamp_ratios(*mismatched, batch.mismatched, *term.humanline),
                mismatched[1],
            )
    measured = term.objective.measure(
        policy, reference, batch, mismatched=mismatched, **term.options
    )
    return jax.tree.map(jax.lax.stop_gradient, measured)


def summarize(
    term: Term,
    measured: Mapping[str, Float[Array, "M b"]],
    weights: Float[Array, "M b"],
    carry: Any = None,
) -> tuple[Any, Any]:
    """Turn all microbatches' measurements into ``stats`` (leading axis M) and the next step's
    carry."""
    if term.objective.summarize is None:
        return None, carry
    return term.objective.summarize(dict(measured), weights, carry, **term.options)


def blank_outputs(batch: Batch, needs: Sequence[str] = ()) -> Outputs:
    """Return outputs that say nothing (zeros), of the shapes that a model would give."""
    tokens = jnp.zeros(batch.tokens.shape, jnp.float32)
    groups = jnp.zeros(batch.lengths.shape, jnp.float32)
    fields = {field: groups if field == "scores" else tokens for field in needs}
    return Outputs(token_logps=tokens, logps=groups, lengths=jnp.asarray(batch.lengths), **fields)


def group_weights(term: Term, batch: Batch) -> Float[Array, "B"]:
    """Return a term's weights, which depend on the batch alone, before any model has run.

    The step sums these over the whole global batch for its denominators.
    """
    blank = blank_outputs(batch, term.needs)
    stats = None
    if term.objective.measure is not None:
        mismatched = None
        if term.objective.mismatched:
            other = blank_outputs(batch.mismatched)
            mismatched = (other, other)
        measured = measure(term, blank, blank, batch, mismatched)
        rows = jax.tree.map(lambda x: x[None], measured)
        stats, _ = summarize(
            term, rows, jnp.asarray(batch.weight, jnp.float32)[None], term.objective.carry
        )
        stats = jax.tree.map(lambda x: x[0], stats)
    return apply(term, blank, blank, batch, stats)[1]
