# SPDX-License-Identifier: Apache-2.0
"""What a rollout is trained towards: advantages and returns, made once a rollout from scores and
log-probabilities.

The classes below declare the rollout options of the table's policy-gradient rows.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from align_jax.core.schema import Batch
from align_jax.losses import advantages as estimators
from align_jax.losses import baselines, process
from align_jax.losses.logprobs import spread_to_tokens, sum_by_slot
from align_jax.losses.objective import Metrics, summed
from align_jax.losses.options import Option, read
from align_jax.losses.sampler import SamplerOptions

_COMPARED = (
    "over the group's mean, over the group's others, over the batch's mean, of normalized rewards "
    "to go, over the group's mean and then normalized (REINFORCE++ with baseline), of each reward "
    "normalized by itself (GDPO), over the group's mean by length (OPO), over its mean at each "
    "token by variance (OTB), over the greedy sample's (ReMax), of any of k passing, or "
    "among the group's short or efficient ones (GFPO)"
)
_Method = Literal[
    "group",
    "leave_one_out",
    "batch",
    "global",
    "group_global",
    "decoupled",
    "length_weighted",
    "optimal_token",
    "greedy",
    "pass_at_k",
    "filtered",
]
GroupAdvantages = Annotated[_Method, Option(_COMPARED)]
# with a value head
Advantages = Annotated[Literal["gae", _Method], Option(f"of values, {_COMPARED}")]
# methods that compare a prompt's responses with each other: there must be several
COMPARE = (
    "group",
    "leave_one_out",
    "group_global",
    "decoupled",
    "length_weighted",
    "optimal_token",
    "pass_at_k",
    "filtered",
)
# ... and methods that look at the scores alone: no KL is in the reward
SCORES_ALONE = ("group", "decoupled", "pass_at_k", "filtered")
Gamma = Annotated[
    float, Option("γ: discount per token", low=0, high=1, only={"advantages": ("gae", "global")})
]
# methods that whiten as it is
WHITENED = ("global", "group_global")
WhitenAdvantages = Annotated[
    bool, Option("to mean 0 and variance 1 over all tokens", unless={"advantages": WHITENED})
]
Epochs = Annotated[int, Option("passes over a rollout", low=1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutOptions(SamplerOptions):
    """What the rollout source reads of an objective: how its samples are used."""

    epochs: Epochs = 1
    minibatches: Annotated[int, Option("optimizer steps a pass", low=1)] = 1
    missing_eos_penalty: Annotated[
        float,
        Option(
            "taken from the score of a response that did not end",
            unit="of reward",
            low=0,
            unless={"advantages": ("decoupled",)},
        ),
    ] = 0.0
    pass_k: Annotated[
        int,
        Option(
            "k: the responses of which one is to pass", low=1, only={"advantages": ("pass_at_k",)}
        ),
    ] = 2
    pass_score: Annotated[
        float,
        Option(
            "a response passes from this score on",
            unit="of reward",
            only={"advantages": ("pass_at_k",)},
        ),
    ] = 0.5
    keep_count: Annotated[
        int, Option("responses of a group that are kept", low=2, only={"advantages": ("filtered",)})
    ] = 2
    keep_by: Annotated[
        Literal["length", "efficiency"],
        Option(
            "the shortest are kept, or those of most score a token",
            only={"advantages": ("filtered",)},
        ),
    ] = "length"
    keep_hard: Annotated[
        int | None,
        Option(
            "responses that are kept of hard groups, with fewer and fewer, down to keep_count, of "
            "easier ones; None = keep_count of each",
            low=2,
            only={"advantages": ("filtered",)},
        ),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_hard is not None and self.keep_hard <= self.keep_count:
            raise ValueError(
                f"keep_hard = {self.keep_hard}: expected more than keep_count = {self.keep_count}, "
                "which is kept of easy groups"
            )


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
        method = self.values()["advantages"]
        if method in SCORES_ALONE and self.kl_coef:
            raise ValueError(
                f"kl_coef = {self.kl_coef} puts the KL into the reward, which advantages = "
                f"{method!r} do not look at: set kl_coef = 0"
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
            only={"advantages": ("group", "filtered")},
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


class Extras(NamedTuple):
    """What some methods look at beside the batch, made with the rollout.

    Attributes:
        each_score: [B, R, K] of K rewards, NaN where one said nothing; "decoupled".
        greedy_score: [B] of the most probable response to each prompt; "greedy".
        log_sum_sq: [N, T] log Σ p² of the distributions that were sampled; "optimal_token".
        steps: what the responses' steps are worth, where rewards stand at their ends;
            ``process.METHODS`` look at them.
    """

    each_score: Float[Any, "B R K"] | None = None
    greedy_score: Float[Any, "B"] | None = None
    log_sum_sq: Float[Any, "N T"] | None = None
    steps: process.Steps | None = None


# method -> the extra that it needs
EXTRAS = {"decoupled": "each_score", "greedy": "greedy_score", "optimal_token": "log_sum_sq"}


def _check(
    batch: Batch,
    reference_token_logps: Float[Array, "N T"] | None,
    advantages: str,
    kl_coef: float | Array,
    bootstrap: bool,
    extras: Extras,
) -> None:
    """Refuse what ``make_targets`` cannot work with."""
    read(Advantages).check("advantages", advantages)
    if batch.scores is None or batch.old_token_logps is None:
        raise ValueError("targets need batch.scores and batch.old_token_logps from the rollout")
    if advantages == "gae" and batch.old_values is None:
        raise ValueError("gae needs batch.old_values [N, T]; they are None")
    if bootstrap and batch.final_values is None:
        raise ValueError("to bootstrap needs batch.final_values [B, R]; they are None")
    if advantages in EXTRAS and getattr(extras, EXTRAS[advantages]) is None:
        raise ValueError(
            f"advantages {advantages!r} need extras.{EXTRAS[advantages]}; they are None"
        )
    if extras.steps is not None and advantages not in process.METHODS:
        raise ValueError(
            f"advantages {advantages!r} do not look at steps: extras.steps must be None; those "
            f"that do: {', '.join(process.METHODS)}"
        )
    if isinstance(kl_coef, (int, float)) and kl_coef == 0:
        return
    if reference_token_logps is None:
        raise ValueError(f"kl_coef {kl_coef} needs reference_token_logps; they are None")
    if advantages in SCORES_ALONE:
        raise ValueError(
            f"{advantages} advantages look at scores alone, with the KL in the loss (beta): "
            "kl_coef must be 0"
        )


def _gae(
    batch: Batch, rewards: Float[Array, "N T"], gamma: float, lam: float, bootstrap: bool
) -> tuple[Float[Array, "N T"], Float[Array, "N T"]]:
    """Compute generalized advantages and returns of a rollout with values."""
    mask, slot = jnp.asarray(batch.loss_mask), jnp.asarray(batch.slot)
    after = batch.final_values if bootstrap else None
    values = jnp.asarray(batch.old_values)
    return estimators.gae(rewards, values, mask, slot, gamma=gamma, lam=lam, final=after)


def _with_steps(
    each: Float[Array, "B R"], method: str, batch: Batch, extras: Extras, scale: str
) -> Float[Array, "N T"]:
    """Give each token its response's advantage, and what its step adds to it."""
    found = spread_to_tokens(each, batch)
    if extras.steps is not None:
        found += process.advantages(method, extras.steps, batch, scale=scale)
    return found


def _of_responses(
    method: str,
    batch: Batch,
    totals: Float[Array, "B R"],
    extras: Extras,
    scale: str,
    reward_weights: Sequence[float],
    passing: Mapping[str, Any],
    keeping: Mapping[str, Any],
) -> Float[Array, "B R"]:
    """Compute the advantages of methods that give each response one.

    Args:
        method: a value of ``GroupAdvantages``.
        batch: the rollout.
        totals: [B, R] scores less the KL.
        extras, scale, reward_weights: as ``make_targets`` takes them.
        passing, keeping: options of ``baselines.pass_at_k`` and ``baselines.filtered``.
    """
    scores, weight = jnp.asarray(batch.scores, jnp.float32), jnp.asarray(batch.weight, jnp.float32)
    if method == "group":
        return estimators.group_advantages(scores, scale=scale)
    if method == "leave_one_out":
        return estimators.leave_one_out(totals)
    if method == "group_global":
        return estimators.group_advantages(totals, scale="none")
    if method == "decoupled":
        each = jnp.asarray(extras.each_score, jnp.float32)
        return baselines.decoupled(each, reward_weights, weight)
    if method == "length_weighted":
        return baselines.length_weighted(totals, jnp.asarray(batch.lengths))
    if method == "greedy":
        return totals - jnp.asarray(extras.greedy_score)[:, None]
    if method == "pass_at_k":
        return baselines.pass_at_k(scores, **passing)
    if method == "filtered":
        return baselines.filtered(scores, jnp.asarray(batch.lengths), **keeping)
    return estimators.batch_baseline(totals, weight)


def _describe(
    scores: Float[Array, "B R"],
    totals: Float[Array, "B R"],
    kl: Float[Array, "B R"],
    extras: Extras,
    weight: Float[Array, "B"],
) -> Metrics:
    """Average what the advantages are made of over the rollout."""
    if extras.steps is not None:
        of_steps = jnp.nan_to_num(extras.steps.rewards).sum(axis=2)
        scores, totals = scores + of_steps, totals + of_steps
    parts = {
        "objective/kl": kl,
        "objective/scores": scores,
        "objective/rlhf_reward": totals,
        "objective/non_score_reward": totals - scores,
    }
    if extras.greedy_score is not None:
        parts["objective/greedy_scores"] = jnp.asarray(extras.greedy_score)[:, None]
    found = {name: summed(x.mean(axis=1), weight) for name, x in parts.items()}
    return jax.tree.map(jax.lax.stop_gradient, found)


def make_targets(
    batch: Batch,
    *,
    reference_token_logps: Float[Array, "N T"] | None = None,
    extras: Extras | None = None,
    reward_weights: Sequence[float] = (),
    advantages: str = "gae",
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: bool = False,
    whiten_advantages: bool = False,
    whiten_rewards: bool = False,
    kl_coef: float | Array = 0.0,
    kl_estimator: str = "k1",
    scale: str = "group",
    pass_k: int = 2,
    pass_score: float = 0.5,
    keep_count: int = 2,
    keep_by: str = "length",
    keep_hard: int | None = None,
) -> tuple[Batch, Metrics]:
    """Fill a rollout's ``advantages`` (and of one with values its ``returns``).

        gae              token rewards (score on the last token, less the KL) and ``old_values``
        group            (s - mean of the group) / std: GRPO
        leave_one_out    s - KL less the mean of the group's others: RLOO
        batch            s - KL less the batch's mean: REINFORCE
        global           discounted token rewards to go, normalized over all tokens: REINFORCE++
        group_global     s - KL less the group's mean, normalized over all tokens: REINFORCE++ with
                         baseline (Hu 2025, arXiv 2501.03262 v9, section 3.3)
        decoupled        each reward normalized by itself, then their sum: GDPO
        length_weighted  s - KL less the group's mean weighed by length: OPO
        optimal_token    token rewards to go less a mean at each place: optimal token baseline
        greedy           s - KL less the greedy sample's score: ReMax (Li et al. 2023, arXiv
                         2310.10505, the ReMax estimator)
        pass_at_k        what a response adds to any of k passing
        filtered         as group, among a group's short or efficient responses alone: GFPO

    Rewards at the ends of steps (``extras.steps``) are token rewards, and what they say is added to
    the advantages of whole responses: see ``process``.  A response that bears no loss (cut off, and
    not kept) counts in the baselines with its score.
    Statistics are over this batch: hand in the whole global batch.

    Args:
        batch: a rollout with ``scores`` [B, R], and ``old_token_logps``; "gae" needs ``old_values``
            too, and to bootstrap ``final_values``.
        reference_token_logps: [N, T]; needed where ``kl_coef`` is not 0.
        extras: what some methods need besides (``EXTRAS``).
        reward_weights: of the rewards in ``extras.each_score``.
        advantages, gamma, lam, bootstrap, whiten_advantages, whiten_rewards, kl_estimator, scale,
            pass_k, pass_score, keep_count, keep_by, keep_hard: as declared.
        kl_coef: units of reward per nat, in the reward; what looks at scores alone has its KL in
            the loss and takes none.

    Returns:
        The batch, and metrics: ``objective/{kl,non_score_reward,rlhf_reward,scores}``, sums over a
        response, averaged.  Beside values but without "gae", ``returns`` are the rewards to go.

    Raises:
        ValueError: an unknown method, a field that it needs is None, or a KL where there can be
            none.
    """
    extras = extras or Extras()
    _check(batch, reference_token_logps, advantages, kl_coef, bootstrap, extras)
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
    rewards = rewards + (0.0 if extras.steps is None else extras.steps.at_ends)
    kl = sum_by_slot(estimators.kl_estimate(ratio, kl_estimator), batch)
    totals = scores - kl_coef * kl  # [B, R]
    if advantages != "gae":
        togo = estimators.discounted_sum(rewards, mask, slot, gamma)
        returns = None if batch.old_values is None else togo
        if advantages == "global":
            found = togo
        elif advantages == "optimal_token":
            found = baselines.optimal_token(togo, old, jnp.asarray(extras.log_sum_sq), batch)
        else:
            passing = {"k": pass_k, "pass_score": pass_score}
            keeping = {"count": keep_count, "by": keep_by, "scale": scale, "hard": keep_hard}
            of_responses = _of_responses(
                advantages, batch, totals, extras, scale, reward_weights, passing, keeping
            )
            found = _with_steps(of_responses, advantages, batch, extras, scale)
    else:
        if whiten_rewards:
            rewards = estimators.whiten(rewards, token_weight, shift_mean=False)
        found, returns = _gae(batch, rewards, gamma, lam, bootstrap)
    if whiten_advantages or advantages in WHITENED:
        found = estimators.whiten(found, token_weight)
    batch = batch._replace(advantages=jax.lax.stop_gradient(found), returns=returns)
    return batch, _describe(scores, totals, kl, extras, weight)
