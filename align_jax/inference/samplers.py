# SPDX-License-Identifier: Apache-2.0
"""From logits to the next token: pure functions of one step's logits, each row by its own settings
and its own key.

A row's draw depends on its logits, its settings and ``fold_in(row key, position)`` alone, never on
its neighbors, so a request gets the same completion in any batch.  The settings are arrays, so
other values do not recompile; only which of them are in use (``filters``) is static, so that a
plain temperature never sorts the vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from align_jax.core.options import RolloutOptions

_COLDEST = 1e-5  # below it logits divided by a temperature leave float32's precision or range
_EXCLUDED = -1e30  # finite, so that a softmax over a row of excluded tokens is not NaN


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a request samples.

    Attributes:
        temperature: logits are divided by it; 0, or too near it to divide by, is greedy.
        top_k: keep the k most probable tokens (0: all).
        top_p: keep the fewest tokens whose probabilities sum to at least this (1: all).
        min_p: keep tokens at least this times as probable as the most probable (0: all).
        repetition_penalty: a token of the prompt or the completion so far has its positive logit
            divided, its negative logit multiplied by this (1: none).

    Raises:
        ValueError: a value out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        ranges = {
            "temperature": 0 <= self.temperature < math.inf,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": 0 < self.repetition_penalty < math.inf,
        }
        wrong = {name: getattr(self, name) for name, fits in ranges.items() if not fits}
        if wrong:
            raise ValueError(
                f"sampling settings out of range: {wrong}; expected temperature >= 0 and "
                "finite, top_k >= 0, 0 < top_p <= 1, 0 <= min_p <= 1, repetition_penalty > 0"
            )

    @classmethod
    def of(cls, options: RolloutOptions) -> Sampling:
        """Return how a rollout's samples are drawn."""
        return cls(*(getattr(options, field.name) for field in dataclasses.fields(cls)))

    @property
    def filters(self) -> frozenset[str]:
        """Which of the settings change anything."""
        neutral = Sampling()
        return frozenset(
            field.name
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(neutral, field.name)
        )


class Settings(NamedTuple):
    """The settings of N rows, as arrays."""

    temperature: Float[Any, "N"]
    top_k: Int[Any, "N"]
    top_p: Float[Any, "N"]
    min_p: Float[Any, "N"]
    repetition_penalty: Float[Any, "N"]


def stack(samplings: Sequence[Sampling]) -> tuple[Settings, frozenset[str]]:
    """Gather the rows' settings into arrays, and say which filters any of them uses."""
    columns = [
        np.array(
            [getattr(one, name) for one in samplings], np.int32 if name == "top_k" else np.float32
        )
        for name in Settings._fields
    ]
    columns[0][columns[0] < _COLDEST] = 0.0
    return Settings(*columns), frozenset().union(*(one.filters for one in samplings))


def row_keys(seeds: Int[np.ndarray, "N"], samples: Int[np.ndarray, "N"]) -> Key[Array, "N"]:
    """Return each row's key: of the request's seed and of the number of the sample among the
    request's samples."""

    def one(seed: Array, sample: Array) -> Array:
        return jax.random.fold_in(jax.random.key(seed), sample)

    return jax.vmap(one)(jnp.asarray(seeds, jnp.uint32), jnp.asarray(samples, jnp.uint32))


def penalize(
    logits: Float[Array, "N V"], seen: Bool[Array, "N V"], penalty: Float[Array, "N"]
) -> Float[Array, "N V"]:
    """Make seen tokens less likely: z / c where z > 0, z * c elsewhere.

    References:
        Keskar et al. 2019, arXiv 1909.05858, section 4.1; the sign rule as in transformers'
        ``RepetitionPenaltyLogitsProcessor``.
    """
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _keep(
    logits: Float[Array, "N V"], settings: Settings, filters: frozenset[str]
) -> Float[Array, "N V"]:
    """Exclude what top-k, top-p and min-p (in this order, each on what is left) do not keep."""
    vocabulary = logits.shape[-1]
    if filters & {"top_k", "top_p"}:
        ordered = -jnp.sort(-logits, axis=-1)  # descending
        k = jnp.where(settings.top_k > 0, jnp.minimum(settings.top_k, vocabulary), vocabulary)
        least = jnp.take_along_axis(ordered, k[:, None] - 1, axis=-1)
        ordered = jnp.where(ordered >= least, ordered, _EXCLUDED)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        within = (before < settings.top_p[:, None]) | (settings.top_p >= 1)[:, None]
        kept = within & (ordered > _EXCLUDED)
        kept = kept.at[:, 0].set(True)
        smallest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        # of equal ones as many as top-p asks for, the first ones, as the greedy choice does
        equal, wanted = logits == smallest, jnp.sum(kept & (ordered == smallest), axis=-1)
        taken = (logits > smallest) | equal & (jnp.cumsum(equal, axis=-1) <= wanted[:, None])
        # not by the sum alone: rounding cuts the tail of a row that keeps all
        neutral = (settings.top_p >= 1) & (k >= vocabulary)
        logits = jnp.where(taken | neutral[:, None], logits, _EXCLUDED)
    if "min_p" in filters:
        most = jnp.max(logits, axis=-1, keepdims=True)
        logits = jnp.where(logits >= most + jnp.log(settings.min_p)[:, None], logits, _EXCLUDED)
    return logits


def adjust(
    logits: Float[Array, "N V"],
    settings: Settings,
    filters: frozenset[str],
    seen: Bool[Array, "N V"] | None = None,
) -> Float[Array, "N V"]:
    """Return the logits of the distribution that is sampled from.

    In transformers' order: repetition penalty, temperature, top-k, top-p, min-p.  Tokens with a tie
    at the border are kept, but for top-p, which keeps the fewest.  A greedy row (temperature 0)
    keeps its (penalized) logits as they are.

    Args:
        logits: float32 [N, V], of the next token; padded vocabulary entries at -1e30 or below.
        settings: of the rows.
        filters: the settings in use by any row, static.
        seen: tokens that occur in the prompt or the completion; needed for the repetition penalty.

    Raises:
        ValueError: a repetition penalty without ``seen``.
    """
    if "repetition_penalty" in filters:
        if seen is None:
            raise ValueError(
                "a repetition penalty needs `seen`, the tokens of the prompt and the completion so "
                "far"
            )
        logits = penalize(logits, seen, settings.repetition_penalty)
    greedy = (settings.temperature == 0)[:, None]
    if "temperature" in filters:
        logits = logits / jnp.where(greedy, 1.0, settings.temperature[:, None])
    if filters & {"top_k", "top_p", "min_p"}:
        logits = jnp.where(greedy, logits, _keep(logits, settings, filters))
    return logits


def _invert(uniform: Float[Array, "N"], weights: Float[Array, "N m"]) -> Int[Array, "N"]:
    """Return the first index whose cumulated weight exceeds a share of the total: the inverse
    distribution function."""
    cumulated = jnp.cumsum(weights, axis=-1)
    over = cumulated > (uniform * cumulated[:, -1])[:, None]
    # rounding may leave none
    return jnp.where(over[:, -1], jnp.argmax(over, axis=-1), jnp.argmax(weights, axis=-1))


def categorical(keys: Key[Array, "N"], logits: Float[Array, "N V"]) -> Int[Array, "N"]:
    """Draw from each row's softmax, by its own key: first a block of about √V tokens, then one of
    its tokens.

    Two random numbers a row, where adding Gumbel noise takes V of them (five times the time on a
    CPU at V = 2,048); in two stages, because one cumulated sum over a large vocabulary would round
    small probabilities away.
    """
    rows, vocabulary = logits.shape
    block = math.isqrt(vocabulary - 1) + 1
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.pad(weights, ((0, 0), (0, -vocabulary % block))).reshape(rows, -1, block)
    uniform = jax.vmap(functools.partial(jax.random.uniform, shape=(2,)))(keys)
    chosen = _invert(uniform[:, 0], weights.sum(axis=-1))
    inside = _invert(
        uniform[:, 1], jnp.take_along_axis(weights, chosen[:, None, None], axis=1)[:, 0]
    )
    return chosen * block + inside


def draw(
    keys: Key[Array, "N"],
    positions: Int[Array, "N"],
    logits: Float[Array, "N V"],
    settings: Settings,
    filters: frozenset[str],
    seen: Bool[Array, "N V"] | None = None,
) -> tuple[Int[Array, "N"], Float[Array, "N"], Float[Array, "N"]]:
    """Draw each row's next token.

    Args:
        keys: of the rows (`row_keys`).
        positions: the number of the token within its completion, folded into the key.
        logits: float32 [N, V].
        settings, filters, seen: as for `adjust`.

    Returns:
        The tokens; their log-probabilities under the model (the softmax of the logits as they came:
        what rescoring gives); and under the distribution that was sampled from (0 for greedy rows).
        Nats.
    """
    adjusted = adjust(logits, settings, filters, seen)
    keys = jax.vmap(jax.random.fold_in)(keys, positions.astype(jnp.uint32))
    tokens = categorical(keys, adjusted)
    greedy = settings.temperature == 0
    tokens = jnp.where(greedy, jnp.argmax(adjusted, axis=-1), tokens).astype(jnp.int32)

    def at_token(values: Array) -> Array:
        return jnp.take_along_axis(jax.nn.log_softmax(values, axis=-1), tokens[:, None], axis=-1)[
            :, 0
        ]

    return tokens, at_token(logits), jnp.where(greedy, 0.0, at_token(adjusted))
