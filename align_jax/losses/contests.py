# SPDX-License-Identifier: Apache-2.0
"""Objectives in which each of the policy's samples meets another player's: XPO and Nash-MD.

The rollout source draws both and scores them (``rollout.against``).
"""

import dataclasses
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

from align_jax.losses.logprobs import sum_by_slot
from align_jax.losses.objective import Inputs, Loss, Result, group_weights, summed
from align_jax.losses.options import Option
from align_jax.losses.pairs import Beta
from align_jax.losses.preference import square


@dataclasses.dataclass(frozen=True, kw_only=True)
class Xpo(Loss):
    """XPO: DPO on a sample of the policy and one of the reference, and a term that makes the
    reference's less likely, so that the policy explores.

        -log σ(β d) + α P_ref    (or IPO's (d - 1/(2β))²),    P_ref of the reference's sample

    The better-scored of the two is chosen, the policy's where they are equal.  A group holds n
    samples of the policy, then n of the reference; mean over these pairs, of which one with a
    response that bears no loss (cut off, and not kept) adds nothing.

    References:
        Xie et al. 2024, arXiv 2405.21046, algorithm 1; ``form``: TRL 1.10, ``xpo_trainer.py``.

    >>> from align_jax.losses import jitted
    >>> found = jitted("xpo", beta=0.5, alpha=0.125)(
    ...     [[[-10.0], [-12.0]]], reference=[[[-11.0], [-11.0]]], scores=[[1.0, 0.0]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [-1.1867]
    """

    beta: Beta = 0.1
    alpha: Annotated[
        float, Option("α: weight of the reference's samples' log-probability", low=0)
    ] = 1e-5
    form: Annotated[Literal["sigmoid", "ipo"], Option("the loss of the pairs: DPO's or IPO's")] = (
        "sigmoid"
    )

    reference: ClassVar[bool] = True
    opponent: ClassVar[str] = "reference"
    learns_opponent: ClassVar[bool] = True

    def losses(self, inputs: Inputs) -> Result:
        batch, scores = inputs.batch, inputs.of_batch("scores")
        ratios, half = inputs.policy.logps - inputs.of_reference("logps"), scores.shape[1] // 2
        own, other = ratios[:, :half], ratios[:, half : 2 * half]
        wins = scores[:, :half] >= scores[:, half : 2 * half]
        chosen, rejected = jnp.where(wins, own, other), jnp.where(wins, other, own)
        if self.form == "ipo":
            pairs = square(chosen - rejected - 0.5 / self.beta)
        else:
            pairs = -log_sigmoid(self.beta * (chosen - rejected))
        there = jnp.asarray(batch.lengths) > 0  # not those cut off, where these are not learned
        both = there[:, :half] & there[:, half : 2 * half]
        pairs = jnp.where(both, pairs, 0.0)
        exploration = self.alpha * inputs.policy.logps[:, half : 2 * half]
        margins, weight = self.beta * (chosen - rejected), group_weights(batch)
        compared = {
            "rewards/chosen": self.beta * chosen,
            "rewards/rejected": self.beta * rejected,
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).astype(jnp.float32),
        }
        others = {
            "loss/dpo": pairs,
            "loss/xpo": exploration,
            "rewards/win_rate": wins.astype(jnp.float32),
            "reward": scores[:, :half],
        }
        whole = jnp.where(both, weight[:, None], 0.0).reshape(-1)
        metrics = {name: summed(x.reshape(-1), whole) for name, x in compared.items()}
        metrics |= {name: summed(x.mean(axis=1), weight) for name, x in others.items()}
        return (pairs + exploration).mean(axis=1), metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class NashMd(Loss):
    """Nash-MD: a sample of the policy is reinforced by the probability with which it beats one of
    the mixture of policy and reference.

        -(p - ½) P + β Σ_t sg(a_t - b_t) a_t,    p = σ(score - the mixture's sample's score)

    The source gives p as the samples' scores; ½ is what a player against itself gets.

    References:
        Munos et al. 2023, arXiv 2312.00886, section 7 (the gradient with β its τ); TRL 1.10,
        ``nash_md_trainer.py``.

    >>> from align_jax.losses import jitted
    >>> found = jitted("nash_md", beta=0.5)(
    ...     [[[-1.0, -2.0]]], reference=[[[-1.5, -2.0]]], scores=[[0.75]])
    >>> found.losses.tolist()
    [0.5]
    """

    beta: Annotated[float, Option("β: weight of the KL to the reference", low=0)] = 0.1

    reference: ClassVar[bool] = True
    opponent: ClassVar[str] = "mixture"

    def losses(self, inputs: Inputs) -> Result:
        batch, a = inputs.batch, inputs.policy.token_logps
        gain = (inputs.of_batch("scores") - 0.5) * inputs.policy.logps
        log_ratio = jax.lax.stop_gradient(a - inputs.of_reference("token_logps"))
        penalty = self.beta * sum_by_slot(log_ratio * a, batch)
        parts = {
            "loss/score": gain,
            "kl": sum_by_slot(log_ratio, batch),
            "rewards/probabilities": inputs.of_batch("scores"),
            "reward": inputs.of_batch("scores"),  # as of every policy gradient
        }
        weight = group_weights(batch)
        metrics = {name: summed(x.mean(axis=1), weight) for name, x in parts.items()}
        return (penalty - gain).mean(axis=1), metrics
