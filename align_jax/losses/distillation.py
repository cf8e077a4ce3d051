# SPDX-License-Identifier: Apache-2.0
"""Distillation: a student is drawn to a teacher's whole next-token distributions.

The teacher is the reference (``reference.path``): any model with the student's tokenizer.  Both
distributions are compared chunk by chunk (``logprobs.token_outputs``); neither is ever whole.
"""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from align_jax.core.schema import Batch
from align_jax.losses.advantages import discounted_sum
from align_jax.losses.logprobs import Divergence, sum_by_slot
from align_jax.losses.objective import Inputs, Loss, Result, summed, token_counts, token_weights
from align_jax.losses.options import Option
from align_jax.losses.policy_gradient import (
    TokenMeanLoss,
    rollout_log_ratio,
    rollout_metrics,
    token_mean,
)
from align_jax.losses.sampler import sampler_weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gkd(Loss):
    """Generalized knowledge distillation, mean over the global batch's tokens.

        D_β(q, p),    q the teacher's next-token distribution, p the student's

        β = 0: KL(q || p), plain distillation of logits    β = 1: KL(p || q), MiniLLM's direction
        between: β KL(q || m) + (1 - β) KL(p || m),  m = β q + (1 - β) p

    On a data set's answers it is supervised; a share λ of the prompts (``on_policy``) may get the
    student's own samples in their place, the others the teacher's (``seq_kd``).

    References:
        Agarwal et al. 2023, arXiv 2306.13649, equations 1 and 4, λ: algorithm 1; ``seq_kd``: Kim
        and Rush 2016, arXiv 1606.07947, section 3.2, the name: TRL 1.16; β = 0: Hinton et
        al. 2015, arXiv 1503.02531; β = 1: the direction of Gu et al. 2023, arXiv 2306.08543, whose
        whole gradient is ``minillm``.  With ``on_policy`` 1 it is what TRL 1.16's
        ``DistillationTrainer`` minimizes.

    >>> from align_jax.losses import jitted
    >>> logps = [[-1.0, -3.0]]
    >>> found = jitted("gkd")(logps, reference=logps, divergence=[[0.5, 0.25]])
    >>> found.losses.tolist()
    [0.375]
    """

    beta: Annotated[
        float, Option("β: 0 = KL(teacher || student), 1 = KL(student || teacher)", low=0, high=1)
    ] = 0.5
    temperature: Annotated[float, Option("both logits are divided by it", above=0)] = 1.0
    on_policy: Annotated[
        float,
        Option(
            "λ: share of the prompts that are learned on the student's own samples, the others on "
            "the data's answers",
            low=0,
            high=1,
        ),
    ] = 0.0
    seq_kd: Annotated[
        bool,
        Option(
            "the teacher's own samples are learned in the place of the data's answers",
            unless={"on_policy": (1,)},
        ),
    ] = False

    reference: ClassVar[bool] = True

    @property
    def own_share(self) -> float:
        return self.on_policy

    @property
    def teacher_answers(self) -> bool:
        return self.seq_kd

    @property
    def needs(self) -> tuple[str, ...]:
        return ("divergence",)

    @property
    def divergence(self) -> Divergence:
        return Divergence(self.beta, self.temperature)

    def weights(self, batch: Batch) -> Float[Array, "B"]:
        return token_weights(batch)

    def losses(self, inputs: Inputs) -> Result:
        batch, weight = inputs.batch, token_weights(inputs.batch)
        tokens = jnp.maximum(token_counts(batch).sum(axis=1), 1.0)
        losses = sum_by_slot(inputs.of_policy("divergence"), batch).sum(axis=1) / tokens
        nll = -inputs.policy.logps.sum(axis=1) / tokens
        return losses, {"divergence": summed(losses, weight), "nll": summed(nll, weight)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiniLlm(TokenMeanLoss):
    """MiniLLM: the reverse KL of whole responses, KL(p || q), on the student's own samples.

        KL_t(p || q) - min(w A, clip(w, 1 ± ε) A),    r_t = log q(y_t) - log p(y_t), no gradient
        A_t = A_reward + Σ_{s>t} γ^(s-t-1) r_s / Σ_{s>t} γ^(s-t-1)

    The first part, of whole distributions, is the token's own step; the second is what the token
    does to the steps behind it, their mean rather than their sum (``length_normalization``).
    Without ``single_step`` the sums begin at t and do all of it.  A_reward is 0 without rewards.
    Mean over the global batch's tokens.

    Samples may be drawn from p̃ = α q + (1 - α) p_old (``teacher_share``), which is harder to please
    with nonsense; w = p(y_t) / p̃(y_t) is then the importance ratio, clipped as ever.  The first
    part stays unweighed, as the authors' code has it.

    References:
        Gu et al. 2023, arXiv 2306.08543, equation 3, the single-step decomposition, teacher-mixed
        sampling and the length normalization of section 2.2; its fourth device, text beside the
        samples, is ``ptx_coef``.  microsoft/LMOps, ``minillm/losses.py``, ``_pg_loss``.

    >>> from align_jax.losses import jitted
    >>> logps = [[[-1.0, -2.0]]]
    >>> found = jitted("minillm")(logps, reference=[[[-1.0, -1.5]]], old_token_logps=logps,
    ...                           advantages=[[[0.0, 0.0]]], divergence=[[[0.25, 0.75]]])
    >>> found.losses.tolist()
    [0.25]
    """

    own = ("single_step", "length_normalization", "gamma", "epsilon", "teacher_share")
    single_step: Annotated[
        bool, Option("a token's own step is the KL of whole distributions, not a sample of it")
    ] = True
    length_normalization: Annotated[
        bool, Option("the mean of the later steps, which does not favor short responses")
    ] = True
    gamma: Annotated[float, Option("γ: discount per token", above=0, high=1)] = 1.0
    epsilon: Annotated[float, Option("ε: ratios are clipped to 1 ± this", above=0)] = 0.2
    teacher_share: Annotated[
        float,
        Option(
            "α: samples are drawn from α teacher + (1 - α) student (the paper's: 0.2); 0 = from "
            "the student alone",
            low=0,
            high=1,
        ),
    ] = 0.0

    reference: ClassVar[bool] = True

    @property
    def needs(self) -> tuple[str, ...]:
        return ("divergence",) if self.single_step else ()

    @property
    def decides(self) -> dict[str, str]:
        return {"scale": "group"}

    @property
    def own_share(self) -> float:
        return 1.0

    @property
    def reference_share(self) -> float:
        return self.teacher_share

    @property
    def divergence(self) -> Divergence:
        return Divergence(1.0)

    def later(self, inputs: Inputs) -> Float[Array, "N T"]:
        """Compute what is behind each token: the sum of r, or its mean."""
        batch = inputs.batch
        mask, slot = jnp.asarray(batch.loss_mask), jnp.asarray(batch.slot)
        r = inputs.of_reference("token_logps") - inputs.policy.token_logps
        r = jax.lax.stop_gradient(jnp.where(mask, r, 0.0))
        ones = mask.astype(jnp.float32)
        found, lengths = (discounted_sum(x, mask, slot, self.gamma) for x in (r, ones))
        if self.single_step:
            found, lengths = (found - r) / self.gamma, (lengths - ones) / self.gamma
        # at least one token, but for the last one, behind which there is none
        return found / jnp.maximum(lengths, 1.0) if self.length_normalization else found

    def losses(self, inputs: Inputs) -> Result:
        batch, drawn = inputs.batch, "sampler" if self.teacher_share else "old"
        ratio = jnp.exp(rollout_log_ratio(inputs, f"{drawn}_token_logps"))
        advantages = inputs.of_batch("advantages") + self.later(inputs)
        clipped = jnp.clip(ratio, 1.0 - self.epsilon, 1.0 + self.epsilon)
        losses = -sampler_weights(inputs) * jnp.minimum(ratio * advantages, clipped * advantages)
        log_ratio = inputs.policy.token_logps - inputs.of_reference("token_logps")
        parts = {
            "reverse_kl": jnp.where(batch.loss_mask, log_ratio, 0.0),
            "clip_ratio/region_mean": (clipped != ratio).astype(jnp.float32),
        }
        if self.single_step:
            parts["divergence"] = inputs.of_policy("divergence")
            losses += parts["divergence"]
        return token_mean(losses, batch), rollout_metrics(inputs, parts)
