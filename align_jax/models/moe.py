# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts: top-k routing and dropless expert products over sorted tokens.

References:
    Jiang et al. 2024, Mixtral (arXiv 2401.04088); Fedus et al. 2021, Switch Transformers (arXiv 2101.03961), equations
    4 to 6 (load-balancing loss); Gale et al. 2022, MegaBlocks (arXiv 2211.15841) (dropless).
"""
from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from align_jax.models.config import ModelConfig
from align_jax.models.layers import ACTIVATIONS, array, normal, parameter


def route(logits: Float[Array, "X E"], count: int, normalise: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Choose each token's experts.

    Returns:
        probabilities float32 [X, E], the chosen experts' weights float32 [X, k], and the experts int32 [X, k].
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, experts = jax.lax.top_k(probabilities, count)
    if normalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return probabilities, weights, experts


def sorted_products(x: Float[Array, "X D"], weights: Float[Array, "X k"], experts: jax.Array,
                    gate: Float[Array, "E D F"], up: Float[Array, "E D F"], down: Float[Array, "E F D"],
                    act) -> Float[Array, "X D"]:
    """Return sum_k weight_k * expert_k(x): tokens sorted by expert, one grouped matrix product a projection.

    No token is dropped and none is computed twice: the work is that of k dense MLPs a token.
    """
    count = experts.shape[1]
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=gate.shape[0]).astype(jnp.int32)
    inputs = x[order // count]
    hidden = act(jax.lax.ragged_dot(inputs, gate, sizes)) * jax.lax.ragged_dot(inputs, up, sizes)
    outputs = jax.lax.ragged_dot(hidden, down, sizes)
    scaled = outputs * weights.reshape(-1)[order].astype(outputs.dtype)[:, None]
    return jnp.zeros_like(x).at[order // count].add(scaled)


class Experts(nn.Module):
    """The feed-forward part of a mixture: a router and E gated MLPs."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "N T D"], real: Bool[Array, "N T"]):
        c = self.config
        D, F, E, dtype = c.width, c.ffn_width, c.num_experts, self.dtype
        init = normal(c.init_std)
        router = array(parameter(self, "router", init, (D, E), ("embed", None)), dtype)
        gate, up = (array(parameter(self, name, init, (E, D, F), ("experts", "embed", "ffn")), dtype)
                    for name in ("gate", "up"))
        down = array(parameter(self, "down", init, (E, F, D), ("experts", "ffn", "embed")), dtype)
        flat = x.reshape(-1, D)
        probabilities, weights, experts = route(flat @ router, c.experts_per_token, c.normalise_experts)
        y = sorted_products(flat, weights, experts, gate, up, down, ACTIVATIONS[c.activation])
        return y.reshape(x.shape), balance(probabilities, experts, real.reshape(-1))


def balance(probabilities: Float[Array, "X E"], experts: jax.Array, real: Bool[Array, "X"]) -> dict[str, jax.Array]:
    """Return one layer's routing sums over real tokens: choices and probabilities by expert, and the token count."""
    mask = real.astype(jnp.float32)[:, None]
    chosen = jnp.sum(jax.nn.one_hot(experts, probabilities.shape[1], dtype=jnp.float32), axis=1)
    return {"chosen": jnp.sum(chosen * mask, axis=0), "probability": jnp.sum(probabilities * mask, axis=0),
            "tokens": jnp.sum(mask)}


def load_balancing(sums: dict[str, jax.Array]) -> jax.Array:
    """Return E sum_e f_e P_e over all layers' tokens, as transformers counts it (k where the load is even).

    Args:
        sums: ``balance`` of each layer, stacked: [L, E], [L, E], [L].
    """
    tokens = jnp.maximum(jnp.sum(sums["tokens"]), 1.0)
    share, probability = (jnp.sum(sums[name], axis=0) / tokens for name in ("chosen", "probability"))
    return share.shape[0] * jnp.sum(share * probability)
