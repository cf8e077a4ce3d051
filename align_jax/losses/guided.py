# SPDX-License-Identifier: Apache-2.0
"""DPO in which a third policy says what each token is worth."""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

from align_jax.losses.logprobs import sum_by_slot
from align_jax.losses.objective import Inputs, Loss, Result, group_weights, summed
from align_jax.losses.options import Option
from align_jax.losses.pairs import Beta, pair_metrics, pair_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tgdpo(Loss):
    """Token-level reward guided DPO: where a token is good, the policy may go further.

        -log σ(Σ_t β (1 + α r_t) x_w,t - Σ_t β (1 - α r_t) x_l,t - margin)

    x_t = a_t - b_t, and r_t = β (log π_g(y_t) - b_t) is the reward that the guide π_g implies, a
    policy trained on preferences (by DPO, say) from the same reference.  α = 0 is DPO.

    References:
        Zhu et al. 2025, arXiv 2506.14574, section 4 (the loss with f_w(r) = 1 + α r and f_l(r) =
        1 - α r); dvlab-research/TGDPO, commit dd88982, ``train/tgdpo/trainer.py``.

    >>> from align_jax.losses import jitted
    >>> found = jitted("tgdpo", beta=0.5)(policy=[[[-4.0], [-6.0]]], reference=[[[-5.0], [-5.0]]],
    ...                                   guide_token_logps=[[[-3.0], [-7.0]]])
    >>> [round(x, 4) for x in found.losses.tolist()]
    [0.2014]
    """

    beta: Beta = 0.1
    alpha: Annotated[float, Option("α: weight of the tokens' rewards", low=0)] = 0.5

    reference: ClassVar[bool] = True
    wants_guide: ClassVar[bool] = True

    def losses(self, inputs: Inputs) -> Result:
        batch, pair, weight = inputs.batch, pair_of(inputs), group_weights(inputs.batch)
        base = inputs.of_reference("token_logps")
        reward = self.beta * (inputs.of_batch("guide_token_logps") - base)
        reward = jax.lax.stop_gradient(jnp.where(batch.loss_mask, reward, 0.0))
        guided = sum_by_slot(reward * (inputs.policy.token_logps - base), batch)  # [B, 2]
        z = pair.chosen - pair.rejected + self.alpha * guided.sum(axis=1)
        chosen, rejected = sum_by_slot(reward, batch).T
        metrics = pair_metrics(inputs, pair, self.beta) | {
            "guide/chosen": summed(chosen, weight),
            "guide/rejected": summed(rejected, weight),
        }
        return -log_sigmoid(self.beta * z - pair.margin), metrics
