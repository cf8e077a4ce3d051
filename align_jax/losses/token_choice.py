# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a rollout bear the policy's loss: those of the highest entropy.

The threshold is over the tokens of the whole global batch, so it is a statistic.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from align_jax.core.schema import Batch
from align_jax.losses.logprobs import spread_to_tokens
from align_jax.losses.objective import Inputs, StatisticsLoss, Tree
from align_jax.losses.options import Option


def counted_tokens(batch: Batch) -> Bool[Array, "N T"]:
    """Tell which tokens bear a loss: of responses, and of no filler."""
    real = jnp.asarray(batch.weight)[:, None] > 0
    real = jnp.broadcast_to(real.astype(jnp.float32), batch.lengths.shape)
    return spread_to_tokens(real, batch) > 0


def quantile(x: Float[Array, "..."], counted: Bool[Array, "..."], q: float) -> Float[Array, ""]:
    """Compute a quantile of what is counted, interpolated linearly between its neighbors.

    >>> x = jnp.array([3.0, 1.0, 9.0, 2.0])
    >>> quantile(x, x < 9, 0.75).item()
    2.5
    """
    ordered = jnp.sort(jnp.where(counted, x, jnp.inf).reshape(-1))
    rank = q * jnp.maximum(counted.sum(dtype=jnp.float32) - 1.0, 0.0)
    below = ordered[jnp.floor(rank).astype(jnp.int32)]
    above = ordered[jnp.ceil(rank).astype(jnp.int32)]
    share = rank - jnp.floor(rank)
    near_above = above - (above - below) * (1.0 - share)  # as torch.quantile rounds
    return jnp.where(share < 0.5, below + share * (above - below), near_above)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopEntropy(StatisticsLoss):
    """A loss of which some tokens may be left out: those whose next-token distribution has little
    entropy.

    A token counts where H_t ≥ τ, the quantile of the batch's entropies above which a share ρ lies.

    References:
        Wang et al. 2025, arXiv 2506.01939, section 5; the quantile: TRL 1.16.0,
        ``get_high_entropy_mask``.
    """

    top_entropy_quantile: Annotated[
        float,
        Option(
            "ρ: share of the tokens, those of the highest entropy, that alone bear the loss of "
            "tokens and the entropy bonus; 1 = all",
            low=0,
            high=1,
        ),
    ] = 1.0

    @property
    def uses_statistics(self) -> bool:
        return self.top_entropy_quantile < 1

    @property
    def needs(self) -> tuple[str, ...]:
        return ("entropy",) if self.uses_statistics else ()

    def batch_statistics(self, inputs: Inputs) -> dict[str, Array]:
        return {"entropy": inputs.of_policy("entropy"), "counted": counted_tokens(inputs.batch)}

    def reduce_statistics(
        self, found: Mapping[str, Array], weights: Float[Array, "M b"], running: Tree
    ) -> tuple[Tree, Tree]:
        """Say of each token whether it counts, and of which share of the tokens this is so."""
        entropy, counted = found["entropy"], found["counted"]
        least = quantile(entropy, counted, 1.0 - self.top_entropy_quantile)
        chosen = (counted & (entropy >= least)).astype(jnp.float32)  # [M, N, T]
        share = chosen.sum() / jnp.maximum(counted.sum(dtype=jnp.float32), 1.0)
        return {"chosen": chosen, "share": jnp.broadcast_to(share, weights.shape[:1])}, running

    def chosen(self, inputs: Inputs) -> Array:
        """Return 1.0 for the tokens that count, else 0.0, [N, T]; 1 where all do."""
        return inputs.stats["chosen"] if self.uses_statistics else jnp.ones(())
