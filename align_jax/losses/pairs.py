# SPDX-License-Identifier: Apache-2.0
"""What all paired objectives have in common: log-ratios, their transforms, weights and metrics.

A paired loss is a small function of a ``Pair``; ``paired`` makes an objective of it, which has the
options that all share.  So a new paired objective is one function of a line or two.

    Inputs ──ld_alpha──► P, R [B] ──► x = P - R ──f_divergence──► Pair ──loss──► [B] ──wpo──► [B]
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import log_sigmoid
from jaxtyping import Array, Float

from align_jax.core.schema import Batch, Outputs
from align_jax.losses.logprobs import sum_by_slot
from align_jax.losses.objective import (
    Inputs,
    Loss,
    Metrics,
    Result,
    group_weights,
    summed,
    token_counts,
)
from align_jax.losses.options import Option

EXP_MAX = 80.0  # exp of more would leave float32

Beta = Annotated[
    float,
    Option(
        "scale of log-ratios (or log-probabilities) in the loss: the smaller, the further the "
        "policy moves",
        unit="per nat",
        above=0,
    ),
]
LabelSmoothing = Annotated[
    float, Option("share of the labels that is taken to be flipped", low=0, below=0.5)
]
LdAlpha = Annotated[
    float | None,
    Option(
        "weight of the tokens beyond the shorter response's length (arXiv 2409.06411); None = 1",
        low=0,
        high=1,
    ),
]
Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


class Pair(NamedTuple):
    """A batch of pairs, [B] float32 each, nats and tokens.

    The log-ratios are transformed by the f-divergence; where there is no reference they are the
    policy's log-probabilities.
    """

    chosen: Float[Array, "B"]  # x_w
    rejected: Float[Array, "B"]  # x_l
    chosen_length: Float[Array, "B"]  # n_w, at least 1
    rejected_length: Float[Array, "B"]  # n_l, at least 1
    policy_chosen: Float[Array, "B"]  # P_w
    policy_rejected: Float[Array, "B"]  # P_l
    reference_chosen: Float[Array, "B"]  # R_w
    reference_rejected: Float[Array, "B"]  # R_l
    margin: Float[Array, "B"]  # in units of reward (beta · nats)


def make_pair(policy: Any, reference: Any = None, lengths: Any = None, margin: Any = None) -> Pair:
    """Make a Pair of sequence log-probabilities.

    Args:
        policy: [B, 2] float, nats, chosen first.
        reference: the same; None: no reference.
        lengths: [B, 2] tokens; None: 1 each.
        margin: [B], in units of reward; None: 0.
    """
    policy = jnp.asarray(policy, jnp.float32)
    reference = jnp.zeros_like(policy) if reference is None else jnp.asarray(reference, jnp.float32)
    counts = jnp.ones_like(policy) if lengths is None else jnp.asarray(lengths).astype(jnp.float32)
    x, counts = policy - reference, jnp.maximum(counts, 1.0)
    offsets = jnp.zeros_like(policy[:, 0]) if margin is None else jnp.asarray(margin, jnp.float32)
    return Pair(
        *(x[:, 0], x[:, 1]),
        *(counts[:, 0], counts[:, 1]),
        *(policy[:, 0], policy[:, 1]),
        *(reference[:, 0], reference[:, 1]),
        margin=offsets,
    )


def example_pair(margin: float = 0.0) -> Pair:
    """Make the docstrings' two pairs: log-ratios (1, -1) and (0.5, 0.5), lengths (4, 6) and (3,
    2)."""
    return make_pair(
        [[-10.0, -12.0], [-8.0, -7.0]],
        [[-11.0, -11.0], [-8.5, -7.5]],
        [[4, 6], [3, 2]],
        [margin, margin],
    )


def transform(
    x: Float[Array, "B"], f_divergence: Divergence = "reverse_kl", alpha: float = 0.5
) -> Float[Array, "B"]:
    """Apply f' of a divergence to log-ratios, before the difference.

        reverse_kl: x                      forward_kl: 1 - e^(-x)
        js: log 2 + log σ(x)               alpha: (e^((α-1) x) - 1) / (α - 1)

    Exponents are cut at 80, where float32 would overflow.  α = 1 is the reverse KL.

    References:
        Wang et al. 2023, arXiv 2309.16240, table 1.  The alpha divergence in the form of TRL
        1.16.0, ``dpo_trainer.py``.
    """
    if f_divergence == "forward_kl":
        return 1.0 - jnp.exp(jnp.minimum(-x, EXP_MAX))
    if f_divergence == "js":
        return np.log(2.0).item() + log_sigmoid(x)
    if f_divergence == "alpha" and abs(alpha - 1.0) >= 1e-6:
        return jnp.expm1(jnp.minimum((alpha - 1.0) * x, EXP_MAX)) / (alpha - 1.0)
    return x


def shared_length_logps(
    token_logps: Float[Array, "N T"], batch: Batch, alpha: float
) -> Float[Array, "B R"]:
    """Sum log-probabilities, those beyond the shorter response's length weighed by α.

        P = Σ_{t ≤ k} a_t + α Σ_{t > k} a_t,    k = min(n_w, n_l)

    References:
        Liu et al. 2024, arXiv 2409.06411 (LD-DPO), the modified likelihood.
    """
    shared = jnp.broadcast_to(batch.lengths.min(axis=1, keepdims=True), batch.lengths.shape)
    slots = batch.lengths.size // token_logps.shape[0]
    belongs = batch.slot[:, :, None] == jnp.arange(slots)[None, None]  # [N, T, S]
    belongs &= batch.loss_mask[:, :, None]
    # a token's place in its response, from 1
    order = jnp.where(belongs, jnp.cumsum(belongs.astype(jnp.int32), axis=1), 0).sum(axis=2)
    limit = jnp.take_along_axis(shared.reshape(-1, slots), batch.slot, axis=1)
    return sum_by_slot(jnp.where(order <= limit, token_logps, alpha * token_logps), batch)


def on_policy_weights(policy: Outputs, batch: Batch) -> Float[Array, "B"]:
    """Weigh pairs by how likely the policy is to write them: WPO.

        w = u_w u_l,    u = exp(mean_t [a_t - log Σ_v p_v²]),    no gradient

    References:
        Zhou et al. 2024, arXiv 2406.11827, equation 2 and section 3.2 (sampled alignment).
    """
    aligned = sum_by_slot(policy.token_logps - policy.log_sum_sq, batch)
    mean = aligned / jnp.maximum(token_counts(batch), 1.0)
    return jax.lax.stop_gradient(jnp.exp(mean.sum(axis=1)))


def pair_of(inputs: Inputs, ld_alpha: float | None = None, *, reference_free: bool = False) -> Pair:
    """Make the Pair of a batch: what a paired loss is a function of.

    Raises:
        ValueError: the groups are not pairs.
    """
    batch = inputs.batch
    if batch.lengths.shape[1] != 2:
        raise ValueError(
            "a paired objective expects groups of R = 2 responses, got R = "
            f"{batch.lengths.shape[1]}"
        )

    def sums(outputs: Outputs | None) -> Float[Array, "B 2"] | None:
        if outputs is None or ld_alpha is None:
            return outputs and outputs.logps
        return shared_length_logps(outputs.token_logps, batch, ld_alpha)

    reference = None if reference_free else inputs.reference
    return make_pair(sums(inputs.policy), sums(reference), batch.lengths, batch.margin)


def pair_metrics(
    inputs: Inputs, pair: Pair, beta: float = 1.0, *, per_token: bool = False
) -> Metrics:
    """Report rewards and log-probabilities of pairs; accuracy counts strictly greater.

    Args:
        inputs: where the weights, the log-probabilities and the entropy come from.
        pair: where the rewards come from, β (P - R) whatever the divergence, so that curves of
            different objectives compare.
        beta: units of reward per nat.
        per_token: rewards are divided by the lengths.
    """
    policy, weight = inputs.policy, group_weights(inputs.batch)
    chosen = beta * (pair.policy_chosen - pair.reference_chosen)
    rejected = beta * (pair.policy_rejected - pair.reference_rejected)
    if per_token:
        chosen, rejected = chosen / pair.chosen_length, rejected / pair.rejected_length
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
        "logps/chosen": policy.logps[:, 0],
        "logps/rejected": policy.logps[:, 1],
    }
    metrics = {name: summed(value, weight) for name, value in values.items()}
    if policy.entropy is not None:
        total = (sum_by_slot(policy.entropy, inputs.batch) * weight[:, None]).sum()
        metrics["entropy"] = total, (token_counts(inputs.batch) * weight[:, None]).sum()
    return metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paired(Loss):
    """A paired loss, with the options that all of them have."""

    ld_alpha: LdAlpha = None
    wpo: Annotated[
        bool, Option("weigh pairs by how likely the policy is to write them (arXiv 2406.11827)")
    ] = False

    function: ClassVar[Callable[..., Float[Array, "B"]]]  # (pair, **own options) -> losses
    own: ClassVar[tuple[str, ...]] = ()  # the function's options
    scale: ClassVar[str] = "beta"  # of them, the one that multiplies the rewards reported
    per_token: ClassVar[bool] = False  # report rewards per token

    @property
    def needs(self) -> tuple[str, ...]:
        return ("log_sum_sq",) if self.wpo else ()

    def pair(self, inputs: Inputs) -> Pair:
        """Make what the loss is a function of."""
        return pair_of(inputs, self.ld_alpha)

    def losses(self, inputs: Inputs) -> Result:
        pair = self.pair(inputs)
        losses = type(self).function(pair, **{name: getattr(self, name) for name in self.own})
        if self.wpo:
            losses = losses * on_policy_weights(inputs.policy, inputs.batch)
        beta = getattr(self, self.scale, 1.0)
        return losses, pair_metrics(inputs, pair, beta, per_token=self.per_token)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferencePaired(Paired):
    """A paired loss of log-ratios to the reference."""

    reference_free: Annotated[
        bool, Option("the log-ratios are the policy's log-probabilities: no reference")
    ] = False

    reference: ClassVar[bool] = True

    @property
    def uses_reference(self) -> bool:
        return not self.reference_free

    def pair(self, inputs: Inputs) -> Pair:
        return pair_of(inputs, self.ld_alpha, reference_free=self.reference_free)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DivergencePaired(ReferencePaired):
    """A paired loss of the difference of the two log-ratios, which a divergence may transform."""

    f_divergence: Annotated[
        Divergence, Option("whose derivative transforms the log-ratios (arXiv 2309.16240)")
    ] = "reverse_kl"
    f_alpha: Annotated[
        float,
        Option("α of the alpha divergence; 1 = reverse_kl", only={"f_divergence": ("alpha",)}),
    ] = 0.5

    def pair(self, inputs: Inputs) -> Pair:
        pair = super().pair(inputs)
        return pair._replace(
            chosen=transform(pair.chosen, self.f_divergence, self.f_alpha),
            rejected=transform(pair.rejected, self.f_divergence, self.f_alpha),
        )


def paired(
    function: Callable[..., Float[Array, "B"]],
    kind: type[Paired] = DivergencePaired,
    *,
    scale: str = "beta",
    per_token: bool = False,
    wants_margin: bool = False,
) -> type[Paired]:
    """Make an objective of a paired loss: a class whose fields are its options.

    Args:
        function: ``function(pair, *, **options) -> [B]``; its options are declared in its
            annotations.
        kind: which options it shares with others.
        scale: the option that multiplies the rewards reported; 1 where it has none of this name.
        per_token: report log-ratios per token as rewards.
        wants_margin: pairs without margins teach it nothing.
    """
    own = [
        (name, parameter.annotation, parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    namespace = {
        "__doc__": function.__doc__,
        "__module__": function.__module__,
        "function": staticmethod(function),
        "own": tuple(name for name, *_ in own),
        "scale": scale,
        "per_token": per_token,
        "wants_margin": wants_margin,
    }
    return dataclasses.make_dataclass(
        function.__name__, own, bases=(kind,), namespace=namespace, frozen=True, kw_only=True
    )
