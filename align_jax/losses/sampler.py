# SPDX-License-Identifier: Apache-2.0
"""The correction for samples that were not drawn from the policy as the trainer computes it.

A server has kernels, and perhaps number formats, of its own, and top-p draws from a part of the
distribution: the gradient is then one of samples from μ, not from π_old.

    ρ_t = π_old(t) / μ(t)          truncated or masked, it weighs the policy's loss
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from align_jax.core.metrics import Greatest, Least
from align_jax.core.schema import Batch
from align_jax.losses.advantages import RATIO_MAX
from align_jax.losses.logprobs import spread_to_tokens, sum_by_slot
from align_jax.losses.objective import Inputs, Metrics, token_counts
from align_jax.losses.options import Option, Options

Mode = Literal["auto", "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
LEAST_RATIO = 1e-8  # in logarithms; the ratio of what is masked is 0
_ON = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


class Correction(NamedTuple):
    """A correction that is made: how ratios of the trainer's to the sampler's probabilities are
    bounded."""

    mode: str  # one of the last four of Mode
    high: float | None = 3.0
    low: float | None = None

    @property
    def by_sequence(self) -> bool:
        """Whether ratios are of whole sequences."""
        return self.mode.startswith("sequence")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerOptions(Options):
    """How the difference between the sampler's and the trainer's probabilities is corrected."""

    sampler_correction: Annotated[
        Mode,
        Option(
            "ratios π_old / μ of tokens or sequences, cut to their bounds (truncated) or 0 beyond "
            "them (masked), weigh the policy's loss; auto = sequence_mask with a server, "
            "token_truncate with top_p, top_k, min_p or repetition_penalty, else none"
        ),
    ] = "auto"
    sampler_ratio_max: Annotated[
        float | None,
        Option(
            "the greatest of these ratios; None = any", above=0, only={"sampler_correction": _ON}
        ),
    ] = 3.0
    sampler_ratio_min: Annotated[
        float | None,
        Option("the least of these ratios; None = any", above=0, only={"sampler_correction": _ON}),
    ] = None

    def __post_init__(self) -> None:
        low, high = self.sampler_ratio_min, self.sampler_ratio_max
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"sampler_ratio_min = {low:g}: expected less than sampler_ratio_max = {high:g}"
            )
        if low is None and high is None and "truncate" in self.sampler_correction:
            raise ValueError(
                f"sampler_correction = {self.sampler_correction!r} cuts ratios to their bounds: "
                "set sampler_ratio_max or sampler_ratio_min"
            )


def correct(
    batch: Batch, correction: Correction
) -> tuple[Float[Array, "N T"] | Float[Array, "B R"], Metrics]:
    """Compute what weighs each token's policy loss, or each response's, and say how far the two are
    apart.

        ρ_t = π_old(t) / μ(t), or Π_t ρ_t for all tokens of a sequence
        truncate: clip(ρ, low, high)          mask: ρ where low ≤ ρ ≤ high, else 0

    Args:
        batch: a rollout with ``old_token_logps`` and ``sampler_token_logps``.
        correction: which one.

    Returns:
        Ratios: of sequences [B, R], of tokens [N, T] and 0 where the loss mask is false; and
        metrics by TRL's names.

    Raises:
        ValueError: one of the two is None.

    References:
        Truncated: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
        training"; masked: IcePop, arXiv 2510.18855; over sequences: Liu et al. 2025, "When speed
        kills stability"; the four modes and the metrics: TRL 1.16.0, ``grpo_trainer.py``.

    >>> from align_jax.losses.arrays import make_batch
    >>> batch, _ = make_batch(jnp.zeros((1, 3)), responses=1,
    ...                       old_token_logps=[[-1.0, -2.0, -1.0]],
    ...                       sampler_token_logps=[[-1.0, -4.0, -1.0]])
    >>> [correct(batch, Correction(mode))[0].tolist()[0] for mode in _ON]
    [[1.0, 3.0, 1.0], [1.0, 0.0, 1.0], [3.0], [0.0]]
    """
    if batch.old_token_logps is None or batch.sampler_token_logps is None:
        raise ValueError("a correction needs batch.old_token_logps and batch.sampler_token_logps")
    mask = jnp.asarray(batch.loss_mask)
    real = jnp.broadcast_to(jnp.asarray(batch.weight)[:, None] > 0, batch.lengths.shape)  # [B, R]
    counted = spread_to_tokens(real.astype(jnp.float32), batch) > 0
    gap = jnp.asarray(batch.old_token_logps) - jnp.asarray(batch.sampler_token_logps)
    gap = jnp.where(mask, gap, 0.0)
    by_sequence = correction.by_sequence
    log_ratio = sum_by_slot(gap, batch) if by_sequence else gap
    ratio = jnp.exp(jnp.clip(log_ratio, -RATIO_MAX, RATIO_MAX))
    bounded = jnp.clip(ratio, correction.low, correction.high)
    if correction.mode.endswith("mask"):
        bounded = jnp.where(bounded == ratio, ratio, 0.0)
    metrics = {
        **_spread("sampling/sampling_logp_difference", jnp.abs(gap), counted, ("mean", "max")),
        **_spread("sampling/importance_sampling_ratio", bounded, real if by_sequence else counted),
    }
    return bounded if by_sequence else jnp.where(mask, bounded, 0.0), metrics


def _spread(
    name: str, x: Array, counted: Array, kinds: Sequence[str] = ("min", "mean", "max")
) -> Metrics:
    """Report the least, the mean and the greatest of what is counted."""
    found = {
        "min": Least(jnp.where(counted, x, jnp.inf).min()),
        "mean": (jnp.where(counted, x, 0.0).sum(), counted.sum(dtype=jnp.float32)),
        "max": Greatest(jnp.where(counted, x, -jnp.inf).max()),
    }
    return {f"{name}/{kind}": found[kind] for kind in kinds}


def _of_sequences(ratio: Array, batch: Batch) -> bool:
    """Tell ratios of sequences [B, R] from those of tokens [N, T]."""
    return ratio.shape == batch.lengths.shape


def sampler_weights(inputs: Inputs) -> Array:
    """Return what weighs each token's policy loss, [N, T]; 1 where nothing is corrected."""
    if inputs.batch.sampler_ratio is None:
        return jnp.ones(())
    ratio = jnp.asarray(inputs.batch.sampler_ratio)
    return spread_to_tokens(ratio, inputs.batch) if _of_sequences(ratio, inputs.batch) else ratio


def response_weights(inputs: Inputs) -> Array:
    """Return what weighs each response's policy loss, [B, R]: the mean over its tokens; 1 where
    nothing is corrected."""
    if inputs.batch.sampler_ratio is None:
        return jnp.ones(())
    ratio = jnp.asarray(inputs.batch.sampler_ratio)
    if _of_sequences(ratio, inputs.batch):
        return ratio
    return sum_by_slot(ratio, inputs.batch) / jnp.maximum(token_counts(inputs.batch), 1.0)


def log_correction(inputs: Inputs) -> Array:
    """Return log π_old / μ of each response as it is corrected, [B, R]: of its sequence, or summed
    over its tokens; 0 where nothing is corrected."""
    if inputs.batch.sampler_ratio is None:
        return jnp.zeros(())
    batch, ratio = inputs.batch, jnp.asarray(inputs.batch.sampler_ratio)
    found = jnp.log(jnp.maximum(ratio, LEAST_RATIO))
    if _of_sequences(ratio, batch):
        return found
    return sum_by_slot(jnp.where(batch.loss_mask, found, 0.0), batch)
