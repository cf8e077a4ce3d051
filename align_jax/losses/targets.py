# SPDX-License-Identifier: Apache-2.0
"""What a rollout is trained towards: advantages and returns, made once a rollout from scores and
log-probabilities.

The classes below declare the rollout options of the table's policy-gradient rows.
"""

import dataclasses
import functools
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from align_jax.core.schema import Batch
from align_jax.losses import advantages as estimators
from align_jax.losses.logprobs import spread_to_tokens, sum_by_slot
from align_jax.losses.objective import Metrics, summed
from align_jax.losses.options import Option, read
from align_jax.losses.sampler import SamplerOptions

Advantages = Annotated[
    Literal["gae", "group", "leave_one_out", "batch", "global"],
    Option(
        "of values, over the group's mean, over the group's others, over the batch's mean, or of "
        "normalized rewards to go"
    ),
]
# without a value head
GroupAdvantages = Annotated[
    Literal["group", "leave_one_out", "batch", "global"],
    Option(
        "over the group's mean, over the group's others, over the batch's mean, or of normalized "
        "rewards to go"
    ),
]
Gamma = Annotated[
    float, Option("γ: discount per token", low=0, high=1, only={"advantages": ("gae", "global")})
]
WhitenAdvantages = Annotated[bool, Option("to mean 0 and variance 1 over all tokens")]
Epochs = Annotated[int, Option("passes over a rollout", low=1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutOptions(SamplerOptions):
    """What the rollout source reads of an objective: how its samples are used."""

    epochs: Epochs = 1
    minibatches: Annotated[int, Option("optimizer steps a pass", low=1)] = 1
    missing_eos_penalty: Annotated[
        float,
        Option("taken from the score of a response that did not end", unit="of reward", low=0),
    ] = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class KlRolloutOptions(RolloutOptions):
    """Rewards less the KL to the reference."""

    kl_coef: Annotated[
        float,
        Option("of the KL in the reward; 0 = no reference is run", unit="of reward per nat", low=0),
    ] = 0.05
    kl_estimator: Annotated[
        Literal["k1", "k2", "k3"],
        Option("of the KL: l, l²/2 or e^(-l) - 1 + l of a log-ratio l", unless={"kl_coef": (0,)}),
    ] = "k1"
    kl_target: Annotated[
        float | None,
        Option(
            "the coefficient adapts towards this KL; None = it stays",
            unit="nats a response",
            above=0,
            unless={"kl_coef": (0,)},
        ),
    ] = None
    kl_horizon: Annotated[
        float,
        Option(
            "how slowly the coefficient adapts",
            unit="responses",
            above=0,
            unless={"kl_target": (None,)},
        ),
    ] = 10000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.values()["advantages"] == "group" and self.kl_coef:
            raise ValueError(
                f"kl_coef = {self.kl_coef} puts the KL into the reward, which advantages = 'group' "
                "do not look at: set kl_coef = 0"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PpoRollout(KlRolloutOptions):
    """PPO's generalized advantages."""

    own = ("advantages", "gamma", "lam", "bootstrap", "whiten_advantages", "whiten_rewards")
    advantages: Advantages = "gae"
    gamma: Gamma = 1.0
    lam: Annotated[
        float, Option("λ of the advantages", low=0, high=1, only={"advantages": ("gae",)})
    ] = 0.95
    bootstrap: Annotated[
        bool,
        Option(
            "behind a response that was cut off stands the value head's own value, not 0",
            only={"advantages": ("gae",)},
        ),
    ] = False
    whiten_advantages: WhitenAdvantages = True
    whiten_rewards: Annotated[
        bool, Option("token rewards to variance 1, their mean kept", only={"advantages": ("gae",)})
    ] = False
    epochs: Epochs = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoRollout(RolloutOptions):
    """GRPO's advantages in a group."""

    own = ("advantages", "scale")
    advantages: GroupAdvantages = "group"
    scale: Annotated[
        Literal["auto", "group", "batch", "none"],
        Option(
            "whose standard deviation scales the advantages; auto = the group's, none's for "
            "loss_type dr_grpo",
            only={"advantages": ("group",)},
        ),
    ] = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RlooRollout(KlRolloutOptions):
    """RLOO's advantages over the group's others."""

    own = ("advantages", "whiten_advantages")
    advantages: GroupAdvantages = "leave_one_out"
    whiten_advantages: WhitenAdvantages = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReinforceRollout(RlooRollout):
    """REINFORCE's advantages over the batch's mean."""

    advantages: GroupAdvantages = "batch"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReinforcePpRollout(KlRolloutOptions):
    """REINFORCE++'s discounted rewards to go, normalized over all tokens."""

    own = ("advantages", "gamma")
    advantages: GroupAdvantages = "global"
    gamma: Gamma = 1.0


def _check(
    batch: Batch,
    reference_token_logps: Float[Array, "N T"] | None,
    advantages: str,
    kl_coef: float | Array,
    bootstrap: bool,
) -> None:
    """Refuse what ``make_targets`` cannot work with."""
    read(Advantages).check("advantages", advantages)
    if batch.scores is None or batch.old_token_logps is None:
        raise ValueError("targets need batch.scores and batch.old_token_logps from the rollout")
    if advantages == "gae" and batch.old_values is None:
        raise ValueError("gae needs batch.old_values [N, T]; they are None")
    if bootstrap and batch.final_values is None:
        raise ValueError("to bootstrap needs batch.final_values [B, R]; they are None")
    if isinstance(kl_coef, (int, float)) and kl_coef == 0:
        return
    if reference_token_logps is None:
        raise ValueError(f"kl_coef {kl_coef} needs reference_token_logps; they are None")
    if advantages == "group":
        raise ValueError("group advantages have their KL in the loss (beta): kl_coef must be 0")


def make_targets(
    batch: Batch,
    *,
    reference_token_logps: Float[Array, "N T"] | None = None,
    advantages: str = "gae",
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: bool = False,
    whiten_advantages: bool = False,
    whiten_rewards: bool = False,
    kl_coef: float | Array = 0.0,
    kl_estimator: str = "k1",
    scale: str = "group",
) -> tuple[Batch, Metrics]:
    """Fill a rollout's ``advantages`` (and for "gae" its ``returns``).

        gae            token rewards (score on the last token, less the KL) and ``old_values``
        group          (s - mean of the group) / std: GRPO
        leave_one_out  s - KL less the mean of the group's others: RLOO
        batch          s - KL less the batch's mean: REINFORCE
        global         discounted token rewards to go, normalized over all tokens: REINFORCE++

    A response that bears no loss (cut off, and not kept) counts in the baselines with its score.
    Statistics are over this batch: hand in the whole global batch.

    Args:
        batch: a rollout with ``scores`` [B, R], and ``old_token_logps``; "gae" needs ``old_values``
            too, and to bootstrap ``final_values``.
        reference_token_logps: [N, T]; needed where ``kl_coef`` is not 0.
        advantages, gamma, lam, bootstrap, whiten_advantages, whiten_rewards, kl_estimator, scale:
            as declared.
        kl_coef: units of reward per nat, in the reward; "group" has its KL in the loss and takes
            none.

    Returns:
        The batch, and metrics: ``objective/{kl,non_score_reward,rlhf_reward,scores}``, sums over a
        response, averaged.

    Raises:
        ValueError: an unknown method, a field that it needs is None, or a KL where there can be
            none.
    """
    _check(batch, reference_token_logps, advantages, kl_coef, bootstrap)
    mask, slot = jnp.asarray(batch.loss_mask), jnp.asarray(batch.slot)
    weight, scores = jnp.asarray(batch.weight, jnp.float32), jnp.asarray(batch.scores, jnp.float32)
    token_weight = spread_to_tokens(jnp.broadcast_to(weight[:, None], scores.shape), batch)
    old = jnp.asarray(batch.old_token_logps, jnp.float32)
    base = old if reference_token_logps is None else reference_token_logps
    ratio = jnp.where(mask, old - base, 0.0)
    rewards = estimators.token_rewards(
        scores.reshape(mask.shape[0], -1),  # [B, R] -> [N, S]
        *(ratio, mask, slot),
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
    )
    penalties = kl_coef * sum_by_slot(estimators.kl_estimate(ratio, kl_estimator), batch)
    totals = scores - penalties  # [B, R]
    returns = None
    if advantages == "gae":
        if whiten_rewards:
            rewards = estimators.whiten(rewards, token_weight, shift_mean=False)
        values = jnp.asarray(batch.old_values)
        after = batch.final_values if bootstrap else None
        found, returns = estimators.gae(
            rewards, values, mask, slot, gamma=gamma, lam=lam, final=after
        )
    elif advantages == "global":
        rewards_to_go = estimators.discounted_sum(rewards, mask, slot, gamma)
        found = estimators.whiten(rewards_to_go, token_weight)
    else:
        responses = {
            "group": functools.partial(estimators.group_advantages, scores, scale=scale),
            "leave_one_out": functools.partial(estimators.leave_one_out, totals),
            "batch": functools.partial(estimators.batch_baseline, totals, weight),
        }
        found = spread_to_tokens(responses[advantages](), batch)
    if whiten_advantages:
        found = estimators.whiten(found, token_weight)
    parts = {
        "objective/kl": sum_by_slot(estimators.kl_estimate(ratio, kl_estimator), batch),
        "objective/scores": scores,
        "objective/rlhf_reward": totals,
        "objective/non_score_reward": totals - scores,
    }
    metrics = {name: summed(x.mean(axis=1), weight) for name, x in parts.items()}
    batch = batch._replace(advantages=jax.lax.stop_gradient(found), returns=returns)
    return batch, jax.tree.map(jax.lax.stop_gradient, metrics)
