# SPDX-License-Identifier: Apache-2.0
"""What an objective is: a frozen value whose fields are its options and whose methods are pure.

An objective turns what the policy and the reference say of a batch into *each group's loss*; each
group's weight is a function of the batch alone.  Nothing is reduced here: see ``reduction``.

    "dpo+sft", options ──resolve──► Terms ──reduction.total──► loss
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from align_jax.core.choose import nearest
from align_jax.core.schema import Batch, Outputs
from align_jax.losses.logprobs import JENSEN_SHANNON, Divergence, sum_by_slot
from align_jax.losses.options import Option, Options, declared, make

# name -> (weighted sum, sum of the weights), scalars; or an extreme (core.metrics)
Metrics = dict[str, Any]
Tree = Any  # a pytree of arrays
Find = Callable[[str], "Objective"]  # name -> row; a ValueError of an unknown one


class Inputs(NamedTuple):
    """What an objective sees of a batch.

    Attributes:
        batch: the rows.
        policy: the policy's outputs.
        reference: the reference's; None where there is none.
        mismatched: the policy's and the reference's outputs of ``batch.mismatched``.
        stats: the statistics of the whole batch that the objective asked for.
        text: the policy's outputs of ``batch.text``.
    """

    batch: Batch
    policy: Outputs
    reference: Outputs | None = None
    mismatched: tuple[Outputs, Outputs] | None = None
    stats: Tree = None
    text: Outputs | None = None

    def of_policy(self, field: str) -> Array:
        """Return an optional field of the policy's outputs; a ValueError where it is None."""
        return _present(self.policy, "policy", field)

    def of_batch(self, field: str) -> Array:
        """Return an optional field of the batch; a ValueError where it is None."""
        return jnp.asarray(_present(self.batch, "batch", field))

    def of_reference(self, field: str) -> Array:
        """Return a field of the reference's outputs; a ValueError where there are none."""
        if self.reference is None:
            raise ValueError("an objective needs the reference's log-probabilities, got none")
        return getattr(self.reference, field)


def _present(source: Batch | Outputs, name: str, field: str) -> Array:
    value = getattr(source, field)
    if value is None:
        raise ValueError(f"an objective needs {name}.{field}, which is None")
    return value


Result = tuple[Float[Array, "B"], Metrics]


def group_weights(batch: Batch) -> Float[Array, "B"]:
    """Weigh each group as the data says: the mean over the global batch's groups."""
    return jnp.asarray(batch.weight, jnp.float32)


def token_counts(batch: Batch) -> Float[Array, "B R"]:
    """Return each response's loss tokens."""
    return jnp.asarray(batch.lengths).astype(jnp.float32)


def token_weights(batch: Batch) -> Float[Array, "B"]:
    """Weigh each group by its loss tokens: the mean over the global batch's tokens."""
    return group_weights(batch) * token_counts(batch).sum(axis=1)


def summed(values: Float[Array, "B"], weights: Float[Array, "B"]) -> tuple[Array, Array]:
    """Make a metric of each group's value: (weighted sum, sum of the weights)."""
    return (weights * values).sum(), weights.sum()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss(Options):
    """An objective with its options; most override ``losses`` alone."""

    reference: ClassVar[bool] = False  # can it compare with the reference?
    wants_margin: ClassVar[bool] = False  # are the pairs' margins what it learns?
    wants_guide: ClassVar[bool] = False  # does it read a guide's log-probabilities of the tokens?
    mismatched: ClassVar[bool] = False  # does it need each prompt with another prompt's response?
    text: ClassVar[bool] = False  # does it learn text beside the rollout?
    # whose samples the policy's meet on the rollout source: what rollout.against = "auto" means
    opponent: ClassVar[str] = "none"
    learns_opponent: ClassVar[bool] = False  # are they in its groups, behind the policy's?

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields of Outputs, beyond the first three, that it reads of the policy."""
        return ()

    @property
    def decides(self) -> Mapping[str, Any]:
        """Rollout options that it decides where they are "auto"."""
        return {}

    @property
    def wants_weights(self) -> bool:
        """Whether the rows' weights are what it is told, so that there must be some."""
        return False

    @property
    def uses_reference(self) -> bool:
        """Whether it compares with the reference, with these options."""
        return self.reference

    @property
    def own_share(self) -> float | None:
        """Share of the prompts whose responses are the policy's own samples, the others being the
        data's answers; None: rewards decide whether all are."""
        return None

    @property
    def teacher_answers(self) -> bool:
        """Whether the reference's own samples stand in the place of the data's answers."""
        return False

    @property
    def reference_share(self) -> float:
        """α of the mixture that samples are drawn from, token by token, α reference + (1 - α)
        policy; its ratios are then those to the mixture (``sampler_token_logps``)."""
        return 0.0

    @property
    def uses_statistics(self) -> bool:
        """Whether it depends on statistics of the whole batch, with these options."""
        return False

    @property
    def divergence(self) -> Divergence:
        """Which one it reads, where ``needs`` names a divergence from the reference."""
        return JENSEN_SHANNON

    def weights(self, batch: Batch) -> Float[Array, "B"]:
        """Return each group's weight, a function of the batch alone; 0 for fillers."""
        return group_weights(batch)

    def losses(self, inputs: Inputs) -> Result:
        """Return each group's loss, and the metrics; no mean is taken over groups."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class StatisticsLoss(Loss):
    """A loss that depends on statistics of the whole global batch, in ``inputs.stats``.

    They are made in two steps, so that they do not depend on how the batch was split: numbers of
    each group (or token) of a microbatch, then one reduction over those of all microbatches.  No
    gradient flows through them.
    """

    # first value of what is kept from step to step, in the train state
    running: ClassVar[Mapping[str, float]] = {}

    @property
    def uses_statistics(self) -> bool:
        return True

    def batch_statistics(self, inputs: Inputs) -> dict[str, Float[Array, "b"]]:
        """Return a microbatch's share: numbers of each group."""
        raise NotImplementedError

    def reduce_statistics(
        self, found: Mapping[str, Float[Array, "M b"]], weights: Float[Array, "M b"], running: Tree
    ) -> tuple[Tree, Tree]:
        """Reduce the shares of all M microbatches.

        Args:
            found: what ``batch_statistics`` gave.
            weights: the groups' weights.
            running: statistics kept from the step before.

        Returns:
            The statistics, whose leaves have a leading axis M (``stats[m]`` is for microbatch m),
            and the running ones after this step.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Humanline(Options):
    """Clamp the token log-ratios of the policy to the reference.

        a_t ← b_t + clip(a_t - b_t, log_eps_p, log_eps_r)

    References:
        Liu et al. 2025, arXiv 2509.24207 (humanline clipping); HALOs, commit 4831988,
        ``get_sequence_rewards``.
    """

    humanline: Annotated[bool, Option("clamp token log-ratios to the reference")] = False
    log_eps_p: Annotated[
        float,
        Option("humanline's least log-ratio", unit="nats", below=0, only={"humanline": (True,)}),
    ] = -1.0
    log_eps_r: Annotated[
        float,
        Option("humanline's greatest log-ratio", unit="nats", above=0, only={"humanline": (True,)}),
    ] = 1.5

    def clamp(self, policy: Outputs, reference: Outputs, batch: Batch) -> Outputs:
        """Return the policy's outputs, clamped and summed anew."""
        ratios = policy.token_logps - reference.token_logps
        ratios = jnp.clip(ratios, self.log_eps_p, self.log_eps_r)
        token_logps = jnp.where(batch.loss_mask, reference.token_logps + ratios, 0.0)
        return policy._replace(token_logps=token_logps, logps=sum_by_slot(token_logps, batch))


@dataclasses.dataclass(frozen=True)
class Objective:
    """A row of the table.

    Attributes:
        loss: the loss's class; its fields are the objective's own options.
        formula: in one line.
        paper: arXiv id, or authors and year.
        use: when to take it, in one line.
        data: "completions" (R = 1), "pairs" (R = 2, chosen first), "ranked" (R = K, best first),
            "unpaired" (R = 1 with a label), "scored" (R = 1 with a number),
            "stepwise" (R = 1, labels at the ends of steps) or "rollout".
        metric: the held-out metric that training should improve, with its direction:
            "rewards/accuracies up".
        adds: option -> (objective, default): a further term of the sum whose coefficient is this
            option.  It is a term of its own because its denominator (tokens) is not the pairs'.
        rollout: the options that the rollout source reads for this objective: how advantages are
            made.
    """

    loss: type[Loss]
    formula: str
    paper: str
    use: str
    data: str
    metric: str
    adds: Mapping[str, tuple[str, float]] = dataclasses.field(default_factory=dict)
    rollout: type[Options] | None = None

    @property
    def reference(self) -> bool:
        """Whether it can compare with the reference."""
        return self.loss.reference

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields of Outputs, beyond the first three, that it reads by default."""
        return self.loss().needs

    @property
    def mismatched(self) -> bool:
        """Whether it needs ``batch.mismatched``, each prompt with another prompt's response."""
        return self.loss.mismatched

    @property
    def humanline(self) -> bool:
        """Whether it reads log-ratios to the reference, which humanline would clamp."""
        return self.reference and "divergence" not in self.needs

    @property
    def declared(self) -> dict[str, Option]:
        """Every option: the loss's, the added terms' coefficients, the rollout's, humanline."""
        found = declared(self.loss)
        for option, (other, default) in self.adds.items():
            meaning = f"coefficient of the term {other!r} that it adds; 0 = none"
            found[option] = Option(meaning, low=0, default=default, kinds=(float,))
        for more in (self.rollout, Humanline if self.humanline else None):
            found |= declared(more) if more else {}
        return found

    @property
    def options(self) -> dict[str, Any]:
        """Every option with its default."""
        return {name: option.default for name, option in self.declared.items()}


@dataclasses.dataclass(frozen=True)
class Term:
    """One objective of a weighted sum, with its options filled in."""

    name: str
    objective: Objective
    loss: Loss
    weight: float = 1.0
    humanline: Humanline | None = None  # where it is on
    rollout: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # for the rollout source

    @property
    def reference(self) -> bool:
        """Tell whether this term needs the reference's log-probabilities."""
        return self.loss.uses_reference or self.humanline is not None

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields of Outputs, beyond the first three, to be computed with these options."""
        return self.loss.needs

    @property
    def scores_alone(self) -> bool:
        """Tell whether this term reads a score head and no log-probabilities."""
        return bool(self.needs) and {"scores", "step_scores"}.issuperset(self.needs)

    def clamped(self, inputs: Inputs) -> Inputs:
        """Return the inputs as the loss is to see them: humanline, where it is on.

        Raises:
            ValueError: the term needs a reference, or mismatched responses, and got none.
        """
        if self.reference and inputs.reference is None:
            raise ValueError(
                f"objective {self.name!r} needs the reference's log-probabilities, got none"
            )
        if self.humanline is None or inputs.reference is None:
            return inputs
        batch, mismatched = inputs.batch, inputs.mismatched
        if mismatched is not None and batch.mismatched is not None:
            policy, reference = mismatched
            mismatched = self.humanline.clamp(policy, reference, batch.mismatched), reference
        policy = self.humanline.clamp(inputs.policy, inputs.reference, batch)
        return inputs._replace(policy=policy, mismatched=mismatched)


def accepted(find: Find, name: str) -> dict[str, Option]:
    """Return the options that a sum of objectives accepts, those of the terms they add too.

    Raises:
        ValueError: an unknown objective.
    """
    rows = [find(part.strip()) for part in name.split("+")]
    rows += [find(other) for row in rows for other, _ in row.adds.values()]
    found: dict[str, Option] = {}
    for row in rows:
        found |= {option: one for option, one in row.declared.items() if option not in found}
    return found


def resolve(
    find: Find,
    name: str,
    options: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
) -> tuple[Term, ...]:
    """Turn a name such as "dpo+bco_pair+sft" into the terms of a weighted sum.

    An option is given to every term that accepts it.

    Args:
        find: returns an objective by its name.
        name: one objective or several joined by "+".
        options: option -> value; what is not named keeps its default.
        weights: one for each objective named; 1 by default.

    Returns:
        The terms; more than were named where an option adds one (``dpo`` with ``sft_coef``).

    Raises:
        ValueError: an unknown objective, an option that none of them accepts, a value out of
            range or without effect beside the others, weights that do not match the names, or
            objectives on different kinds of data.
    """
    options, known = dict(options or {}), accepted(find, name)
    for option in options:
        if option not in known:
            raise ValueError(
                f"objective {name!r} has no option {option!r}{nearest(option, known)}; its own "
                f"at their defaults: --config.objective=\"{{'name': '{name}'}}\""
            )
    names = [part.strip() for part in name.split("+")]
    coefficients = [1.0] * len(names) if weights is None else [float(weight) for weight in weights]
    if len(coefficients) != len(names):
        raise ValueError(
            f"objective {name!r}: expected {len(names)} weights, got {len(coefficients)}"
        )
    terms: list[Term] = []
    for part, coefficient in zip(names, coefficients):
        terms += _terms(find, part, options, coefficient)
    try:
        owned = {option for term in terms for option in term.objective.declared}
        for option in options.keys() - owned:
            known[option].check(option, options[option])
            if options[option] != known[option].default:
                raise ValueError(
                    f"{option} = {options[option]!r} has no effect: it is of a term that is left "
                    "out, because its coefficient is 0"
                )
        _check_sum(terms)
    except ValueError as error:
        raise ValueError(f"objective {name!r}: {error}") from error
    return tuple(terms)


# kinds of data whose answers a term of completions would learn whatever they are worth
_UNTOLD = {
    "rollout": "the policy's own samples, good or bad; for text beside the rollouts use ptx_coef",
    "scored": "every answer, whatever its score",
    "stepwise": "every step, right or wrong",
}


def _check_sum(terms: Sequence[Term]) -> None:
    """Refuse terms that do not learn from the same batch.

    Raises:
        ValueError: the terms, and in what they differ.
    """
    kinds = {term.name: term.objective.data for term in terms}
    if len({*kinds.values()} - {"completions"}) > 1:
        raise ValueError(f"mixes kinds of data: {kinds}")
    learning = [name for name, kind in kinds.items() if kind == "completions"]
    for kind in kinds.values() if learning else ():
        if kind in _UNTOLD:
            raise ValueError(f"{learning[0]!r} would learn {_UNTOLD[kind]}")
    sampled = [term for term in terms if term.rollout or term.loss.opponent != "none"]
    for term in sampled[1:]:
        first, other = (
            {**one.rollout, "rollout.against": one.loss.opponent} for one in (sampled[0], term)
        )
        unlike = [key for key in {**first, **other} if first.get(key) != other.get(key)]
        if unlike:
            key = unlike[0]
            raise ValueError(
                f"{sampled[0].name!r} and {term.name!r} want one rollout made in two ways: {key} = "
                f"{first.get(key)!r} and {other.get(key)!r}"
            )


def _terms(find: Find, name: str, options: Mapping[str, Any], weight: float) -> list[Term]:
    """Make an objective's term, and those that it adds."""
    objective, more = find(name), []
    known = objective.declared
    values = objective.options | {option: options[option] for option in options if option in known}
    try:
        loss = make(objective.loss, options)
        humanline = make(Humanline, options) if objective.humanline else Humanline()
        rollout = make(objective.rollout, options).values() if objective.rollout else {}
        rollout |= {
            option: value for option, value in loss.decides.items() if rollout[option] == "auto"
        }
        for option, (other, _) in objective.adds.items():
            known[option].check(option, values[option])
            if values[option]:
                more += _terms(find, other, options, weight * float(values[option]))
        for option, value in values.items():
            known[option].check_effect(option, value, values)
    except ValueError as error:
        raise ValueError(f"objective {name!r}: {error}") from error
    if humanline.humanline and getattr(loss, "reference_free", False):
        raise ValueError(
            f"objective {name!r}: humanline clamps ratios to the reference, but reference_free is "
            "on"
        )
    on = humanline if humanline.humanline else None
    return [Term(name, objective, loss, weight, on, rollout), *more]


def data_kind(terms: Sequence[Term]) -> str:
    """Return the kind of data these terms train on; "sft" goes along with any."""
    kinds = [term.objective.data for term in terms]
    return next((kind for kind in kinds if kind != "completions"), "completions")
