# SPDX-License-Identifier: Apache-2.0
"""Distillation: a student is drawn to a teacher's whole next-token distributions.

The teacher is the reference (``reference.path``): any model with the student's tokenizer.  Both
distributions are compared chunk by chunk (``logprobs.token_outputs``); neither is ever whole.
"""

import dataclasses
from typing import Annotated, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from align_jax.core.schema import Batch
from align_jax.losses.logprobs import Divergence, sum_by_slot
from align_jax.losses.objective import Inputs, Loss, Result, summed, token_counts, token_weights
from align_jax.losses.options import Option


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gkd(Loss):
    """Generalized knowledge distillation, mean over the global batch's tokens.

        D_β(q, p),    q the teacher's next-token distribution, p the student's

        β = 0: KL(q || p), plain distillation of logits    β = 1: KL(p || q), MiniLLM's direction
        between: β KL(q || m) + (1 - β) KL(p || m),  m = β q + (1 - β) p

    On a data set's answers it is supervised; with ``config.rewards`` it learns on the student's own
    samples.

    References:
        Agarwal et al. 2023, arXiv 2306.13649, equations 1 and 4; β = 0: Hinton et al. 2015, arXiv
        1503.02531; β = 1: Gu et al. 2023, arXiv 2306.08543, without the policy gradient of its
        later steps.

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

    reference: ClassVar[bool] = True

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
