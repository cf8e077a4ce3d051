# SPDX-License-Identifier: Apache-2.0
"""Objectives on unpaired feedback: a label for each response says whether it was desirable.

x = P - R is a response's log-ratio of policy to reference, σ the logistic function, z₀ an estimate
of the policy's KL from the reference: the mean of x over *mismatched* pairs (each prompt with
another prompt's response), clamped below at 0 after the mean, without gradient.  Its scope is the
global batch, so it does not depend on devices or microbatches.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid
from jaxtyping import Array, Float

from align_jax.core.schema import Batch
from align_jax.losses.logprobs import sum_by_slot
from align_jax.losses.objective import (
    Inputs,
    Loss,
    Metrics,
    Result,
    StatisticsLoss,
    Tree,
    group_weights,
    summed,
    token_weights,
)
from align_jax.losses.options import Option
from align_jax.losses.pairs import Beta

BALANCE = (1.0, 4.0 / 3.0)  # of w_D n_D to w_U n_U


def balance_warning(
    desirable: int, undesirable: int, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> str | None:
    """Return a warning where the classes' total weights are out of the advised proportion.

    w_D n_D / (w_U n_U) should lie in [1, 4/3].  One class alone is no mistake, but said.

    References:
        Ethayarajh et al. 2024, arXiv 2402.01306, equation 8.

    >>> balance_warning(100, 300)
    'w_D n_D / (w_U n_U) = 0.333 lies outside [1, 1.333]: set desirable_weight to between 3 and 4'
    """
    if not desirable or not undesirable:
        only = "undesirable" if undesirable else "desirable"
        return f"all feedback is {only}: the loss has nothing to contrast it with"
    ratio = desirable_weight * desirable / (undesirable_weight * undesirable)
    if BALANCE[0] <= ratio <= BALANCE[1]:
        return None
    low, high = (bound * undesirable_weight * undesirable / desirable for bound in BALANCE)
    return (
        f"w_D n_D / (w_U n_U) = {ratio:.3g} lies outside [1, 1.333]: set desirable_weight to "
        f"between {low:.3g} and {high:.3g}"
    )


def log_ratios(policy: Float[Array, "B R"], reference: Float[Array, "B R"]) -> Float[Array, "B"]:
    """Compute x = P - R of single responses.

    Raises:
        ValueError: groups of more than one response.
    """
    if policy.shape[1] != 1:
        raise ValueError(
            f"an unpaired objective expects groups of R = 1 response, got R = {policy.shape[1]}"
        )
    return (policy - reference)[:, 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnpairedLoss(Loss):
    """A loss of each response's x: the same for both labels, but for its sign and weight.

    desirable: w_D f(z),    undesirable: w_U f(-z),    z = β x - shift
    """

    beta: Beta = 0.1
    desirable_weight: Annotated[
        float,
        Option("w_D: of desirable responses; w_D n_D / (w_U n_U) is to be in [1, 4/3]", low=0),
    ] = 1.0
    undesirable_weight: Annotated[float, Option("w_U: of undesirable responses", low=0)] = 1.0

    reference: ClassVar[bool] = True

    def value(self, z: Float[Array, "B"]) -> Float[Array, "B"]:
        """Compute f(z) = 1 - σ(z)."""
        return sigmoid(-z)

    def ratios(self, inputs: Inputs) -> Float[Array, "B"]:
        """Compute x."""
        return log_ratios(inputs.policy.logps, inputs.of_reference("logps"))

    def labeled(self, inputs: Inputs, z: Float[Array, "B"]) -> Float[Array, "B"]:
        """Compute each response's loss by its label."""
        wanted, unwanted = self.value(z), self.value(-z)
        return jnp.where(
            inputs.of_batch("label"),
            self.desirable_weight * wanted,
            self.undesirable_weight * unwanted,
        )

    def metrics(self, inputs: Inputs, shift: Float[Array, ""]) -> Metrics:
        """Report rewards; ``shift`` is what a desirable response's reward must exceed."""
        batch, label, weight = inputs.batch, inputs.of_batch("label"), self.weights(inputs.batch)
        wanted, unwanted = jnp.where(label, weight, 0.0), jnp.where(label, 0.0, weight)
        reward, logps = self.beta * self.ratios(inputs), inputs.policy.logps[:, 0]
        right = ((reward > shift) == label).astype(jnp.float32)
        metrics = {
            "rewards/chosen": summed(reward, wanted),
            "rewards/rejected": summed(reward, unwanted),
            "rewards/accuracies": summed(right, weight),
            "logps/chosen": summed(logps, wanted),
            "logps/rejected": summed(logps, unwanted),
        }
        if inputs.policy.entropy is not None:
            entropy = sum_by_slot(inputs.policy.entropy, batch)[:, 0]
            metrics["entropy"] = (weight * entropy).sum(), token_weights(batch).sum()
        return metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kto(StatisticsLoss, UnpairedLoss):
    """KTO: how far each response's x lies on the right side of z₀.

        desirable:   w_D (1 - σ(β (x - z₀)))
        undesirable: w_U (1 - σ(β (z₀ - x)))

    1/2 w where the policy is the reference.

    References:
        Ethayarajh et al. 2024, arXiv 2402.01306, equations 7 and 8.

    >>> from align_jax.losses import jitted
    >>> run = jitted("kto", beta=0.5)
    >>> found = run([-8.0, -9.0], [True, False], [-10.0, -9.0],
    ...             mismatched_policy=[-5.0, -4.0], mismatched_reference=[-6.0, -4.0])
    >>> [round(x, 4) for x in found.losses.tolist()], round(float(found.metrics["kl"]), 4)
    ([0.3208, 0.4378], 0.5)
    """

    kl_scope: Annotated[
        Literal["global", "microbatch"],
        Option("z₀ over the global batch, or over each microbatch as HALOs and TRL have it"),
    ] = "global"

    mismatched: ClassVar[bool] = True

    def batch_statistics(self, inputs: Inputs) -> dict[str, Float[Array, "b"]]:
        """Return x of each mismatched response, and its weight (0 where a prompt found no
        partner)."""
        other = inputs.batch.mismatched
        if other is None or inputs.mismatched is None:
            raise ValueError("kto needs batch.mismatched and its outputs, got none")
        policy, reference = inputs.mismatched
        return {"x": log_ratios(policy.logps, reference.logps), "weight": group_weights(other)}

    def reduce_statistics(
        self, found: Mapping[str, Float[Array, "M b"]], weights: Float[Array, "M b"], running: Tree
    ) -> tuple[Tree, Tree]:
        """Compute z₀ = max(0, mean x)."""
        axes = None if self.kl_scope == "global" else 1
        total = (found["x"] * found["weight"]).sum(axis=axes)
        count = found["weight"].sum(axis=axes)
        kl = jnp.maximum(total / jnp.maximum(count, 1e-30), 0.0)
        return jnp.broadcast_to(kl, weights.shape[:1]), running

    def losses(self, inputs: Inputs) -> Result:
        kl, total = inputs.stats, group_weights(inputs.batch).sum()
        metrics = self.metrics(inputs, self.beta * kl) | {"kl": (kl * total, total)}
        return self.labeled(inputs, self.beta * (self.ratios(inputs) - kl)), metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class KtoLogsigmoid(Kto):
    """KTO with a logistic loss in place of the bounded value: w_D (-log σ(β (x - z₀))) and its
    mirror.

    References:
        Ethayarajh et al. 2024, arXiv 2402.01306: an ablation of the value function.

    >>> from align_jax.losses import jitted
    >>> found = jitted("kto_logsigmoid", beta=0.5)([-8.0, -9.0], [True, False], [-10.0, -9.0],
    ...     mismatched_policy=[-5.0, -4.0], mismatched_reference=[-6.0, -4.0])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [0.3869, 0.5759]
    """

    def value(self, z: Float[Array, "B"]) -> Float[Array, "B"]:
        return -log_sigmoid(z)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KtoZero(UnpairedLoss):
    """KTO with z₀ = 0, which needs no mismatched responses: w_D (1 - σ(β x)), w_U (1 - σ(-β x)).

    TRL calls the same numbers APO-zero on unpaired feedback (``apo_zero_unpaired``).

    References:
        Ethayarajh et al. 2024, arXiv 2402.01306: an ablation of the reference point.
        D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7, each side by itself.

    >>> from align_jax.losses import jitted
    >>> found = jitted("kto_zero", beta=0.5)([-8.0, -9.0], [True, False], [-10.0, -9.0])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [0.2689, 0.5]
    """

    def losses(self, inputs: Inputs) -> Result:
        z = self.beta * self.ratios(inputs)
        return self.labeled(inputs, z), self.metrics(inputs, jnp.zeros(()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bco(StatisticsLoss, UnpairedLoss):
    """Binary classifier optimization with a reward shift.

        desirable: -w_D log σ(β x - δ),    undesirable: -w_U log σ(-(β x - δ))

    δ is the running mean of β x over all responses seen, this batch's included, without gradient;
    it is kept in the train state.  With ``density_ratio`` each loss is multiplied by the data's
    weight, which then counts neither in δ nor in the mean over responses.

    References:
        Jung et al. 2024, arXiv 2404.04656: the reward shift, and underlying distribution matching;
        TRL 1.9.0, ``BCOTrainer.bco_loss``.

    >>> from align_jax.losses import jitted
    >>> found = jitted("bco", beta=0.5)([-8.0, -9.0], [True, False], [-10.0, -9.0])
    >>> [round(x, 4) for x in found.losses.tolist()], round(float(found.metrics["delta"]), 4)
    ([0.4741, 0.4741], 0.5)
    """

    density_ratio: Annotated[
        bool,
        Option(
            "the data's weights are ratios of prompts' densities (density_ratios): they multiply "
            "the losses alone"
        ),
    ] = False

    running: ClassVar[Mapping[str, float]] = {"mean": 0.0, "count": 0.0}  # of β x so far

    @property
    def wants_weights(self) -> bool:
        return self.density_ratio

    def weights(self, batch: Batch) -> Float[Array, "B"]:
        given = group_weights(batch)
        return (given > 0).astype(jnp.float32) if self.density_ratio else given

    def value(self, z: Float[Array, "B"]) -> Float[Array, "B"]:
        return -log_sigmoid(z)

    def batch_statistics(self, inputs: Inputs) -> dict[str, Float[Array, "b"]]:
        """Return β x."""
        return {"reward": self.beta * self.ratios(inputs)}

    def reduce_statistics(
        self, found: Mapping[str, Float[Array, "M b"]], weights: Float[Array, "M b"], running: Tree
    ) -> tuple[Tree, Tree]:
        """Update the running mean of the rewards with this batch, and hand it out."""
        count, before = running["count"] + weights.sum(), running["mean"]
        mean = before + (weights * (found["reward"] - before)).sum() / jnp.maximum(count, 1e-30)
        return jnp.broadcast_to(mean, weights.shape[:1]), {"mean": mean, "count": count}

    def losses(self, inputs: Inputs) -> Result:
        delta, total = inputs.stats, self.weights(inputs.batch).sum()
        metrics = self.metrics(inputs, delta) | {"delta": (delta * total, total)}
        losses = self.labeled(inputs, self.beta * self.ratios(inputs) - delta)
        return losses * group_weights(inputs.batch) if self.density_ratio else losses, metrics
