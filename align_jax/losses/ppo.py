# SPDX-License-Identifier: Apache-2.0
"""PPO, and the terms that stand beside a policy gradient: an entropy bonus, and PPO-ptx's text.

As in ``policy_gradient``, w_t = exp(a_t - old_t) is a token's ratio and A its advantage.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from align_jax.core.schema import Batch
from align_jax.losses.objective import Inputs, Loss, Result, Tree, summed, token_weights
from align_jax.losses.options import Option
from align_jax.losses.policy_gradient import (
    TokenMeanLoss,
    rollout_log_ratio,
    rollout_metrics,
    token_mean,
)
from align_jax.losses.sampler import sampler_weights
from align_jax.losses.token_choice import TopEntropy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ppo(TopEntropy, TokenMeanLoss):
    """The PPO loss, mean over the global batch's tokens.

        max(-A w, -A clip(w, 1 - c, 1 + c))        where A < 0, at most -A dual_clip
        + vf_coef · ½ max((V - ret)², (clip(V, V_old ± c_v) - ret)²)

    The second clip keeps a token with A < 0 whose ratio has grown from making all of the gradient.
    Its entropy bonus and PPO-ptx's NLL are the terms that ``entropy_coef`` and ``ptx_coef`` add.

    References:
        Schulman et al. 2017, arXiv 1707.06347, equations 7 and 9; the value clip: Huang et al.
        2024, arXiv 2403.17031 (value function clipping); the dual clip: Ye et al. 2019, arXiv
        1912.09729, equation 2.

    >>> from align_jax.losses import jitted
    >>> found = jitted("ppo")(policy=[[-1.0, -2.0]], old_token_logps=[[-1.5, -2.0]],
    ...                       advantages=[[1.0, 1.0]], values=[[0.5, 0.0]],
    ...                       old_values=[[0.0, 0.0]], returns=[[1.0, 0.0]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [-1.084]
    """

    own = ("clip", "dual_clip", "value_clip", "vf_coef")
    clip: Annotated[float, Option("c: ratios are clipped to 1 ± c", low=0)] = 0.2
    dual_clip: Annotated[
        float | None, Option("where A < 0, the ratio counts at most so much; None = off", above=1)
    ] = None
    value_clip: Annotated[
        float,
        Option(
            "c_v: values are clipped to the old ones ± c_v",
            unit="of reward",
            low=0,
            unless={"vf_coef": (0,)},
        ),
    ] = 0.2
    vf_coef: Annotated[float, Option("weight of the value loss", low=0)] = 0.1

    @property
    def needs(self) -> tuple[str, ...]:
        return ("values", *super().needs)

    def losses(self, inputs: Inputs) -> Result:
        advantages, returns = inputs.of_batch("advantages"), inputs.of_batch("returns")
        values, old_values = inputs.of_policy("values"), inputs.of_batch("old_values")
        log_ratio = rollout_log_ratio(inputs)
        ratio = jnp.exp(log_ratio)
        plain = -advantages * ratio
        clipped = -advantages * jnp.clip(ratio, 1.0 - self.clip, 1.0 + self.clip)
        policy = jnp.maximum(plain, clipped)
        if self.dual_clip is not None:
            bounded = jnp.minimum(policy, -advantages * self.dual_clip)
            policy = jnp.where(advantages < 0, bounded, policy)
        near = jnp.clip(values, old_values - self.value_clip, old_values + self.value_clip)
        free, bound = jnp.square(values - returns), jnp.square(near - returns)
        parts = {
            "loss/policy_avg": self.chosen(inputs) * sampler_weights(inputs) * policy,
            "loss/value_avg": 0.5 * jnp.maximum(free, bound),
            "policy/clipfrac_avg": (clipped > plain).astype(jnp.float32),
            "policy/approxkl_avg": 0.5 * jnp.square(log_ratio),
            "val/ratio": ratio,
            "val/clipfrac_avg": (bound > free).astype(jnp.float32),
        }
        loss = parts["loss/policy_avg"] + self.vf_coef * parts["loss/value_avg"]
        return token_mean(loss, inputs.batch), rollout_metrics(inputs, parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entropy(TopEntropy, TokenMeanLoss):
    """Minus the entropy of the next-token distributions, mean over the global batch's tokens (of
    those that count, where ``top_entropy_quantile`` is below 1), nats.

        -f H,    f ← clip(f ± entropy_step, 0, 1), up after a batch with H ≤ entropy_target

    With a target f starts at 0, and a batch after one with H > entropy_target has no bonus, so that
    ``entropy_coef`` is the most that H counts; without one f is 1.

    References:
        The target: He et al. 2025, arXiv 2505.22312, section 3.2.5 (adaptive entropy control); TRL
        1.16.0, ``grpo_trainer.py``.

    >>> from align_jax.losses import jitted
    >>> jitted("entropy")(policy=[[[-1.0, -2.0]]], entropy=[[[0.5, 1.5]]]).losses.tolist()
    [-1.0]
    """

    own = ("entropy_target", "entropy_step")
    entropy_target: Annotated[
        float | None,
        Option(
            "the bonus grows while the entropy is no more than this, else shrinks and is left out; "
            "None = it stays",
            unit="nats a token",
            above=0,
        ),
    ] = None
    entropy_step: Annotated[
        float,
        Option(
            "share of entropy_coef by which the bonus grows or shrinks in a step",
            above=0,
            high=1,
            unless={"entropy_target": (None,)},
        ),
    ] = 0.005

    running: ClassVar[Mapping[str, float]] = {"factor": 0.0, "entropy": math.inf}

    @property
    def needs(self) -> tuple[str, ...]:
        return ("entropy",)

    @property
    def uses_statistics(self) -> bool:
        return super().uses_statistics or self.entropy_target is not None

    def reduce_statistics(
        self, found: Mapping[str, Array], weights: Float[Array, "M b"], running: Tree
    ) -> tuple[Tree, Tree]:
        """Add f of this step, which the batches before have decided, and move it."""
        stats, _ = super().reduce_statistics(found, weights, running)
        if self.entropy_target is None:
            return stats, running
        chosen, before = stats["chosen"], running["factor"]
        entropy = (chosen * found["entropy"]).sum() / jnp.maximum(chosen.sum(), 1.0)
        now = jnp.where(running["entropy"] <= self.entropy_target, before, 0.0)
        stats["factor"] = jnp.broadcast_to(now, weights.shape[:1])
        step = jnp.where(entropy <= self.entropy_target, self.entropy_step, -self.entropy_step)
        return stats, {"factor": jnp.clip(before + step, 0.0, 1.0), "entropy": entropy}

    def losses(self, inputs: Inputs) -> Result:
        entropy = inputs.of_policy("entropy")
        means = token_mean(entropy, inputs.batch)
        losses = -means
        if self.uses_statistics:
            some = token_mean(self.chosen(inputs) * entropy, inputs.batch)
            losses = -some / jnp.maximum(inputs.stats["share"], 1e-8)
        weight = self.weights(inputs.batch)
        metrics = {"entropy": summed(means, weight)}
        if self.entropy_target is not None:
            factor = inputs.stats["factor"]
            losses *= factor
            metrics["entropy_factor"] = factor * weight.sum(), weight.sum()
        return losses, metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ptx(Loss):
    """The NLL of ``batch.text``, mean over its tokens: the text that PPO-ptx mixes in.

    It stands beside the rollout in rows of its own, and is computed at temperature 1.  Each group
    of the rollout bears an equal share of it.

    References:
        Ouyang et al. 2022, arXiv 2203.02155, equation 2.

    >>> from align_jax.losses import jitted
    >>> found = jitted("ptx")(policy=[[-1.0, -2.0], [-3.0, -5.0]], text=[[-4.0, -2.0]])
    >>> found.losses.tolist(), found.weights.tolist(), float(found.loss)
    ([3.0, 3.0], [1.0, 1.0], 3.0)
    """

    text: ClassVar[bool] = True

    def weights(self, batch: Batch) -> Float[Array, "B"]:
        if batch.text is None:
            raise ValueError("ptx needs batch.text, the rows of text beside the rollout; got none")
        tokens = token_weights(batch.text).sum()
        return jnp.broadcast_to(tokens / batch.weight.size, batch.weight.shape)

    def losses(self, inputs: Inputs) -> Result:
        text = inputs.batch.text
        if text is None or inputs.text is None:
            raise ValueError("ptx needs the policy's outputs of batch.text, got none")
        weights = token_weights(text)
        nll = (weights * token_mean(-inputs.text.token_logps, text)).sum(), weights.sum()
        mean = nll[0] / jnp.maximum(nll[1], 1.0)
        return jnp.broadcast_to(mean, inputs.batch.weight.shape), {"ptx_nll": nll}
