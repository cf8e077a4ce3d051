# SPDX-License-Identifier: Apache-2.0
"""Paired objectives that need more than a pair's log-ratios: AOT's ranks, a dynamic beta, TDPO's
token KLs.

Where the loss depends on the whole global batch, ``batch_statistics`` gives each pair's number, and
``reduce_statistics`` sees them all, without gradients, and hands each pair what it needs; so the
loss does not depend on how the batch was split over devices and microbatches.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Float

from align_jax.losses.logprobs import sum_by_slot
from align_jax.losses.objective import (
    Inputs,
    Loss,
    Result,
    StatisticsLoss,
    Tree,
    group_weights,
    summed,
)
from align_jax.losses.options import Option
from align_jax.losses.pairs import Beta, LabelSmoothing, LdAlpha, Pair, pair_metrics, pair_of
from align_jax.losses.preference import scaled_difference, scaled_sides, smoothed_logistic

Statistics = Mapping[str, Float[Array, "M b"]]


def _at_same_rank(
    keys: Float[Array, "M b"], values: Float[Array, "M b"], weights: Float[Array, "M b"]
) -> Float[Array, "M b"]:
    """Give each pair the value whose rank among the values is that pair's rank among the keys.

    Filler pairs (weight 0) rank last in both and get their own key.
    """
    real = (weights > 0).reshape(-1)
    keys, values = keys.reshape(-1), values.reshape(-1)
    order = jnp.argsort(jnp.where(real, keys, jnp.inf))
    ranked = jnp.sort(jnp.where(real, values, jnp.inf))
    found = jnp.zeros_like(keys).at[order].set(ranked)
    return jnp.where(real, found, keys).reshape(weights.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aot(StatisticsLoss):
    """AOT (paired): the policy's differences dominate the reference's, rank by rank.

        u = sort(P_w - P_l) - sort(R_w - R_l),    -(1-ε) log σ(β u) - ε log σ(-β u)

    The sorts run over the global batch (TRL: over each device's microbatch).  Pair i's loss is that
    of its own rank.

    References:
        Melnyk et al. 2024, arXiv 2406.05882, algorithm 1 (paired).

    >>> from align_jax.losses import jitted
    >>> found = jitted("aot", beta=0.5)(policy=[[-10.0, -12.0], [-8.0, -7.0]],
    ...                                 reference=[[-9.0, -9.0], [-5.0, -8.0]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [0.9741, 0.9741]
    """

    beta: Beta = 0.1
    label_smoothing: LabelSmoothing = 0.0
    ld_alpha: LdAlpha = None

    reference: ClassVar[bool] = True

    def _difference(self, pair: Pair) -> Float[Array, "B"]:
        """P_w - P_l, less the margin in nats."""
        return pair.policy_chosen - pair.policy_rejected - pair.margin / self.beta

    def batch_statistics(self, inputs: Inputs) -> dict[str, Float[Array, "b"]]:
        pair = pair_of(inputs, self.ld_alpha)
        return {
            "policy": self._difference(pair),
            "reference": pair.reference_chosen - pair.reference_rejected,
        }

    def reduce_statistics(
        self, found: Statistics, weights: Float[Array, "M b"], running: Tree
    ) -> tuple[Tree, Tree]:
        """Give each pair the reference's difference of the rank that its own difference has."""
        return _at_same_rank(found["policy"], found["reference"], weights), running

    def losses(self, inputs: Inputs) -> Result:
        pair = pair_of(inputs, self.ld_alpha)
        u = self._difference(pair) - inputs.stats
        losses = smoothed_logistic(self.beta * u, self.label_smoothing)
        return losses, pair_metrics(inputs, pair, self.beta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AotUnpaired(StatisticsLoss):
    """AOT (unpaired): the chosen log-ratios dominate the rejected ones, rank by rank.

        u = sort(x_w) - sort(x_l),    -(1-ε) log σ(β u) - ε log σ(-β u)

    A rank's chosen and rejected response may stand in different microbatches, so each pair reports
    half of the losses of its chosen's and of its rejected's rank, with the whole gradient of each
    to its own side; the sums agree.

    References:
        Melnyk et al. 2024, arXiv 2406.05882, algorithm 1 (unpaired).

    >>> from align_jax.losses import jitted
    >>> found = jitted("aot_unpaired", beta=0.5)(policy=[[-10.0, -12.0], [-8.0, -7.0]],
    ...                                          reference=[[-9.0, -9.0], [-5.0, -8.0]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [1.0032, 1.0032]
    """

    beta: Beta = 0.1
    label_smoothing: LabelSmoothing = 0.0
    ld_alpha: LdAlpha = None

    reference: ClassVar[bool] = True

    def batch_statistics(self, inputs: Inputs) -> dict[str, Float[Array, "b"]]:
        """Return β x_w and β x_l, each with its half of the margin."""
        chosen, rejected = scaled_sides(pair_of(inputs, self.ld_alpha), self.beta)
        return {"chosen": chosen, "rejected": rejected}

    def reduce_statistics(
        self, found: Statistics, weights: Float[Array, "M b"], running: Tree
    ) -> tuple[Tree, Tree]:
        """Give each chosen response the rejected one of its rank, and each rejected one the chosen
        one."""
        chosen, rejected = found["chosen"], found["rejected"]
        return {
            "rejected": _at_same_rank(chosen, rejected, weights),
            "chosen": _at_same_rank(rejected, chosen, weights),
        }, running

    def losses(self, inputs: Inputs) -> Result:
        pair = pair_of(inputs, self.ld_alpha)
        chosen, rejected = scaled_sides(pair, self.beta)
        both = smoothed_logistic(chosen - inputs.stats["rejected"], self.label_smoothing)
        both += smoothed_logistic(inputs.stats["chosen"] - rejected, self.label_smoothing)
        losses = both - jax.lax.stop_gradient(0.5 * both)
        return losses, pair_metrics(inputs, pair, self.beta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BetaDpo(StatisticsLoss):
    """DPO with a β that follows how informative the batch's pairs are.

        β = β₀ (1 + α (mean_i M_i - M₀)),    M_i = β₀ d_i,    M₀ ← m M₀ + (1-m) mean_i M_i

    β has no gradient and stays above β₀/100; M₀ starts at the first batch's mean and is kept in the
    train state. The paper's second part, which drops outlying pairs at random, is not here.
    Rewards reported use β₀.

    References:
        Wu et al. 2024, arXiv 2407.08639, the batch-level dynamic β; α = 0.6, m = 0.9 are the
        paper's.

    >>> from align_jax.losses import jitted
    >>> found = jitted("beta_dpo", beta=0.5)(policy=[[-10.0, -12.0]], reference=[[-11.0, -11.0]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [0.3133]
    """

    beta: Beta = 0.1
    alpha: Annotated[float, Option("α: how strongly β follows the batch's mean gap", low=0)] = 0.6
    momentum: Annotated[
        float, Option("m: of the gap's running mean", low=0, high=1, unless={"alpha": (0,)})
    ] = 0.9

    reference: ClassVar[bool] = True
    # M₀, and whether it has been set
    running: ClassVar[Mapping[str, float]] = {"mean": 0.0, "started": 0.0}

    def batch_statistics(self, inputs: Inputs) -> dict[str, Float[Array, "b"]]:
        """Return each pair's discrepancy of reward, β₀ (x_w - x_l)."""
        pair = pair_of(inputs)
        return {"gap": self.beta * (pair.chosen - pair.rejected)}

    def reduce_statistics(
        self, found: Statistics, weights: Float[Array, "M b"], running: Tree
    ) -> tuple[Tree, Tree]:
        """Compute the batch's beta, and update the running mean of the gaps."""
        mean = (weights * found["gap"]).sum() / jnp.maximum(weights.sum(), 1e-30)
        before = jnp.where(running["started"] > 0, running["mean"], mean)
        beta = self.beta * (1.0 + self.alpha * (mean - before))
        beta = jnp.maximum(beta, 1e-2 * self.beta)
        after = self.momentum * before + (1.0 - self.momentum) * mean
        running = {"mean": after, "started": jnp.ones_like(running["started"])}
        return jnp.broadcast_to(beta, weights.shape[:1]), running

    def losses(self, inputs: Inputs) -> Result:
        pair, beta = pair_of(inputs), inputs.stats
        metrics = pair_metrics(inputs, pair, self.beta)
        total = group_weights(inputs.batch).sum()
        metrics["beta"] = beta * total, total
        return -log_sigmoid(scaled_difference(pair, beta)), metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tdpo(Loss):
    """Token-level DPO: DPO less the difference of the sequential forward KLs.

        -log σ(β d - α (β D_l - β sg(D_w)) - margin),    D = Σ_t KL(π_ref(·|y_<t) || π(·|y_<t))

    That is TDPO₂; ``stop_gradient_chosen=False`` with ``alpha=1`` is TDPO₁.

    References:
        Zeng et al. 2024, arXiv 2404.11999, the losses of TDPO₁ and TDPO₂.

    >>> from align_jax.losses import jitted
    >>> found = jitted("tdpo", beta=0.5)(policy=[[[-4.0], [-6.0]]], reference=[[[-5.0], [-5.0]]],
    ...                                  kl=[[[0.5], [1.5]]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [0.3869]
    """

    beta: Beta = 0.1
    alpha: Annotated[float, Option("α: weight of the difference of the KLs", low=0)] = 0.5
    stop_gradient_chosen: Annotated[
        bool, Option("no gradient through the chosen response's KL (TDPO₂)", unless={"alpha": (0,)})
    ] = True

    reference: ClassVar[bool] = True

    @property
    def needs(self) -> tuple[str, ...]:
        return ("kl",)

    def losses(self, inputs: Inputs) -> Result:
        pair, weight = pair_of(inputs), group_weights(inputs.batch)
        chosen, rejected = sum_by_slot(inputs.of_policy("kl"), inputs.batch).T  # [B] each
        metrics = pair_metrics(inputs, pair, self.beta)
        metrics |= {"kl/chosen": summed(chosen, weight), "kl/rejected": summed(rejected, weight)}
        if self.stop_gradient_chosen:
            chosen = jax.lax.stop_gradient(chosen)
        z = self.beta * (pair.chosen - pair.rejected) - self.alpha * self.beta * (rejected - chosen)
        return -log_sigmoid(z - pair.margin), metrics
