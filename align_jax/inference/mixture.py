# SPDX-License-Identifier: Apache-2.0
"""Generation from a mixture of two models: both see the same tokens, each with a cache of its
own."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from align_jax.models.cache import Cache
from align_jax.models.config import ModelConfig
from align_jax.models.model import Model, Params

Both = tuple[Cache, Cache]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """What `decoding` asks of a model, of two: π(y) ∝ first(y)^(1 - weight) second(y)^weight, or
    π(y) = (1 - weight) first(y) + weight second(y).

    Parameters are those of both, below "first" and "second"; hidden states stand side by side.

    Attributes:
        first, second: the models, of one tokenizer.
        weight: the second one's.
        arithmetic: the second form.

    References:
        Munos et al. 2023, arXiv 2312.00886, section 6 (the one-step-at-a-time mixture policy);
        arithmetic: Gu et al. 2023, arXiv 2306.08543, section 2.2 (teacher-mixed sampling).
    """

    first: Model
    second: Model
    weight: float
    arithmetic: bool = False

    @property
    def config(self) -> ModelConfig:
        """The first model's."""
        return self.first.config

    def init_cache(self, rows: int, length: int, dtype: Any = None) -> Both:
        """Return two empty caches; see ``Model.init_cache``."""
        first, second = (one.init_cache(rows, length, dtype) for one in (self.first, self.second))
        return first, second

    def prefill(
        self,
        params: Params,
        tokens: Int[Array, "N T"],
        segment_ids: Int[Array, "N T"],
        positions: Int[Array, "N T"],
        cache: Both,
    ) -> tuple[Float[Array, "N T D"], Both]:
        """Run prompts through both; see ``Model.prefill``."""
        first, own = self.first.prefill(params["first"], tokens, segment_ids, positions, cache[0])
        second, other = self.second.prefill(
            params["second"], tokens, segment_ids, positions, cache[1]
        )
        return jnp.concatenate([first, second], axis=-1), (own, other)

    def decode(
        self, params: Params, token: Int[Array, "N"], position: Int[Array, "N"], cache: Both
    ) -> tuple[Float[Array, "N D"], Both]:
        """Run one further token a row through both; see ``Model.decode``."""
        first, own = self.first.decode(params["first"], token, position, cache[0])
        second, other = self.second.decode(params["second"], token, position, cache[1])
        return jnp.concatenate([first, second], axis=-1), (own, other)

    def unembed(self, params: Params, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Return the mixture's logits over the tokens that both have."""
        size = self.first.config.hidden_size
        first = self.first.unembed(params["first"], hidden[..., :size])
        second = self.second.unembed(params["second"], hidden[..., size:])
        both = min(first.shape[-1], second.shape[-1])
        weights = (1.0 - self.weight, self.weight)
        if self.arithmetic:
            first, second = (
                jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) + jnp.log(weight)
                for x, weight in zip((first, second), weights)
            )
            return jnp.logaddexp(first[..., :both], second[..., :both])
        return weights[0] * first[..., :both] + weights[1] * second[..., :both]
