# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts: top-k routing and dropless expert products over sorted tokens.

References:
    Jiang et al. 2024, Mixtral (arXiv 2401.04088); Fedus et al. 2021, Switch Transformers (arXiv
    2101.03961), equations 4 to 6 (load-balancing loss); Gale et al. 2022, MegaBlocks (arXiv
    2211.15841) (dropless).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from align_jax.models.config import ModelConfig
from align_jax.models.layers import (
    ACTIVATIONS,
    Init,
    array,
    contract,
    normal,
    ones,
    parameter,
    scaleless_norm,
    zeros,
)
from align_jax.models.roles import Role
from align_jax.parallel.mesh import ROWS
from align_jax.parallel.sharding import spec

Act = Callable[[jax.Array, jax.Array], jax.Array]  # (gate, up) -> hidden


class Kernels(NamedTuple):
    """The experts' weights."""

    gate: Float[Array, "E D F"]
    up: Float[Array, "E D F"]
    down: Float[Array, "E F D"]
    gate_bias: Float[Array, "E F"] | None = None
    up_bias: Float[Array, "E F"] | None = None
    down_bias: Float[Array, "E D"] | None = None


# which mesh axes split each of them where they are used
_SPLIT = (
    PartitionSpec("expert", None, "tensor"),
    PartitionSpec("expert", None, "tensor"),
    PartitionSpec("expert", "tensor", None),
    PartitionSpec("expert", "tensor"),
    PartitionSpec("expert", "tensor"),
    PartitionSpec("expert", None),
)


def route(
    logits: Float[Array, "N T E"],
    count: int,
    normalize: bool,
    bias: Float[Array, "E"] | None = None,
    groups: tuple[int, int] = (1, 1),
    sigmoid: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Choose each token's experts, by a softmax or by sigmoids.

    A bias corrects the choice alone (DeepSeek-AI 2024, arXiv 2412.19437, equation 16); of (n, k)
    ``groups`` of experts the k are chosen from whose best is highest, of sigmoids the best two.

    Returns:
        probabilities float32 [N, T, E], the chosen experts' weights float32 [N, T, k], and the
        experts int32 [N, T, k].
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    scores = jax.nn.sigmoid(logits.astype(jnp.float32)) if sigmoid else probabilities
    ranked = scores
    if bias is not None:
        ranked = scores + bias.astype(jnp.float32)[None, None]
    if groups[1] < groups[0]:
        ranked = _of_best_groups(ranked, *groups, of=2 if sigmoid else 1)
    _, experts = jax.lax.top_k(ranked, count)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if normalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return probabilities, weights, experts


def _of_best_groups(scores: Float[Array, "N T E"], groups: int, kept: int, of: int) -> jax.Array:
    """Put the scores outside the best groups out of reach; a group is as good as its best few."""
    grouped = scores.reshape(*scores.shape[:2], groups, -1)
    best, _ = jax.lax.top_k(grouped, min(of, grouped.shape[-1]))
    _, chosen = jax.lax.top_k(jnp.sum(best, axis=-1), kept)
    inside = jnp.any(jax.nn.one_hot(chosen, groups, dtype=jnp.bool_), axis=2)  # [N, T, groups]
    return jnp.where(inside[..., None], grouped, -jnp.inf).reshape(scores.shape)


def sorted_products(
    x: Float[Array, "X D"],
    weights: Float[Array, "X k"],
    experts: Int[Array, "X k"],
    kernels: Kernels,
    act: Act,
    first: jax.Array | int = 0,
) -> Float[Array, "X D"]:
    """Return sum_k weight_k * expert_k(x): tokens sorted by expert, one grouped matrix product a
    projection.

    No token is dropped: the work is that of k dense MLPs a token.

    Args:
        x: tokens.
        weights, experts: each token's chosen experts and their weights.
        kernels: of the experts at hand, ``first`` to ``first + E``; what others would add is left
            out.
        act: from gate and up to what ``down`` takes.
        first: number of the first expert at hand.
    """
    count, at_hand = experts.shape[1], kernels.gate.shape[0]
    flat = experts.reshape(-1) - first
    flat = jnp.where((flat >= 0) & (flat < at_hand), flat, at_hand)  # the others' sort behind ours
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=at_hand).astype(jnp.int32)
    inputs, whose = x[order // count], flat[order]

    def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        y = jax.lax.ragged_dot(x, kernel, sizes)
        return y if bias is None else y + jnp.take(bias, whose, axis=0, mode="clip")

    gate, up = (
        linear(inputs, kernels.gate, kernels.gate_bias),
        linear(inputs, kernels.up, kernels.up_bias),
    )
    outputs = linear(act(gate, up), kernels.down, kernels.down_bias)
    ours = jnp.arange(order.size) < jnp.sum(sizes)
    scaled = outputs * weights.reshape(-1)[order].astype(outputs.dtype)[:, None]
    return jnp.zeros_like(x).at[order // count].add(jnp.where(ours[:, None], scaled, 0))


def sharded_products(
    x: Float[Array, "N T D"],
    weights: Float[Array, "N T k"],
    experts: Int[Array, "N T k"],
    kernels: Kernels,
    act: Act,
) -> Float[Array, "N T D"]:
    """Return ``sorted_products`` under the ambient mesh: each device sorts its own tokens, nothing
    global is sorted.

    Devices along ``expert`` gather each other's tokens, compute what their own experts add, and
    give the sums back (all-gather, reduce-scatter); ``tensor`` splits F, ``fsdp`` the storage
    alone.  Without a mesh, or where rows do not divide it (a single prompt), the same products
    without the collectives.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def local(
        x: jax.Array,
        weights: jax.Array,
        experts: jax.Array,
        kernels: Kernels,
        first: jax.Array | int = 0,
    ) -> jax.Array:
        def flat(y: jax.Array) -> jax.Array:  # [N, T, ...] -> [X, ...]
            return y.reshape(-1, y.shape[-1])

        tokens = flat(x), flat(weights), flat(experts)
        return sorted_products(*tokens, kernels, act, first).reshape(x.shape)

    if (
        mesh.empty
        or mesh.size == 1
        or x.shape[0] % math.prod(mesh.shape[axis] for axis in ROWS)
        or x.shape[1] % mesh.shape["sequence"]
    ):
        return local(x, weights, experts, kernels)

    def body(x: jax.Array, weights: jax.Array, experts: jax.Array, *parts: Any) -> jax.Array:
        kernels = Kernels(*parts)
        if mesh.shape["tensor"] > 1 and kernels.down_bias is not None:
            # of the sums over ``tensor``, one part adds it
            once = jax.lax.axis_index("tensor") == 0
            kernels = kernels._replace(down_bias=jnp.where(once, kernels.down_bias, 0))
        if mesh.shape["expert"] == 1:
            y = local(x, weights, experts, kernels)
        else:
            first = jax.lax.axis_index("expert") * kernels[0].shape[0]
            x, weights, experts = (
                jax.lax.all_gather(y, "expert", tiled=True) for y in (x, weights, experts)
            )
            y = local(x, weights, experts, kernels, first)
        if mesh.shape["tensor"] > 1:
            y = jax.lax.psum(y, "tensor")
        if mesh.shape["expert"] == 1:
            return y
        return jax.lax.psum_scatter(y, "expert", tiled=True)

    tokens = spec(("rows", "length", None))
    split = (None if one is None else way for one, way in zip(kernels, _SPLIT))
    specs = (tokens, tokens, tokens, *split)
    run = jax.shard_map(body, in_specs=specs, out_specs=tokens, check_vma=False)
    return run(x, weights, experts, *kernels)


class Experts(nn.Module):
    """The feed-forward part of a mixture: a router and E gated MLPs."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "N T D"],
        real: Bool[Array, "N T"],
        seen: Float[Array, "N T D"] | None = None,
    ) -> tuple[Float[Array, "N T D"], dict[str, jax.Array]]:
        """Return the experts' sum and the routing's sums.

        Args:
            x: what the experts are given.
            real: which tokens are.
            seen: what the router is given, of a model with ``branch_norms``; None: x.
        """
        c = self.config
        D, E, dtype = c.hidden_size, c.num_experts, self.dtype
        init = normal(c.init_std)
        role = Role("router", inputs=1)
        router = array(parameter(self, "router", init, (D, E), ("embed", None), role), dtype)
        exact = jnp.dtype(jnp.float32)
        logits = contract(x if seen is None else self._scaled(seen), router, 1, exact)
        if c.expert_bias:
            shift = parameter(self, "router_bias", zeros, (E,), (None,), role.vector())
            logits = logits + array(shift, exact)[None, None]
        bias = None
        if c.routing != "softmax":
            bias = parameter(self, "bias", zeros, (E,), (None,), role.vector())
        probabilities, weights, experts = route(
            logits,
            c.experts_per_token,
            c.normalize_experts,
            bias,
            (c.expert_groups, c.groups_per_token),
            c.routing == "sigmoid",
        )
        if c.routed_scale != 1:
            weights = weights * c.routed_scale
        if c.branch_norms:
            factor = parameter(self, "expert_scale", ones, (E,), (None,), role.vector())
            weights = weights * array(factor, exact)[experts]
        y = sharded_products(x, weights, experts, self._kernels(), _gating(c))
        return y, balance(probabilities, experts, real)

    def _scaled(self, x: Float[Array, "N T D"]) -> Float[Array, "N T D"]:
        c, role = self.config, Role("router", matrix=False)
        scale = parameter(self, "router_scale", ones, (c.hidden_size,), ("norm",), role)
        scale = array(scale, self.dtype) * c.hidden_size**-0.5
        return scaleless_norm(x, c.norm_eps) * scale[None, None]

    def _kernels(self) -> Kernels:
        c, sizes = self.config, self.config.sizes
        letters = {"experts": "E", "embed": "D", "ffn": "F", "norm": "D"}

        def make(name: str, init: Init, role: Role, *axes: str) -> jax.Array:
            shape = tuple(sizes[letters[axis]] for axis in ("experts", *axes))
            return array(parameter(self, name, init, shape, ("experts", *axes), role), self.dtype)

        def kernel(name: str, *axes: str) -> jax.Array:
            # a target of adapters, so that asking for one is told that experts take none
            role = Role("expert", inputs=1, leading=1, target=f"mlp/{name}")
            return make(name, normal(c.init_std), role, *axes)

        weights = Kernels(
            kernel("gate", "embed", "ffn"),
            kernel("up", "embed", "ffn"),
            kernel("down", "ffn", "embed"),
        )
        if not c.expert_bias:
            return weights
        role = Role("expert", leading=1, matrix=False)
        return weights._replace(
            gate_bias=make("gate_bias", zeros, role, "ffn"),
            up_bias=make("up_bias", zeros, role, "ffn"),
            down_bias=make("down_bias", zeros, role, "norm"),
        )


def _gating(config: ModelConfig) -> Act:
    """Return how gate and up become one (gpt-oss clips both; OpenAI 2025, arXiv 2508.10925)."""
    act, limit = ACTIVATIONS[config.activation], config.glu_limit

    def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
        return act(gate) * up

    def clipped(gate: jax.Array, up: jax.Array) -> jax.Array:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return gate * jax.nn.sigmoid(config.glu_gain * gate) * (up + 1)

    return clipped if limit else gated


def balance(
    probabilities: Float[Array, "N T E"], experts: Int[Array, "N T k"], real: Bool[Array, "N T"]
) -> dict[str, jax.Array]:
    """Return one layer's routing sums over real tokens: choices and probabilities by expert, and
    the token count."""
    mask = real.astype(jnp.float32)[..., None]
    chosen = jnp.sum(jax.nn.one_hot(experts, probabilities.shape[-1], dtype=jnp.float32), axis=2)
    return {
        "chosen": jnp.sum(chosen * mask, axis=(0, 1)),
        "probability": jnp.sum(probabilities * mask, axis=(0, 1)),
        "tokens": jnp.sum(mask),
    }


def load_balancing(sums: Mapping[str, jax.Array], whole: Mapping[str, jax.Array]) -> jax.Array:
    """Return a part's share of E sum_e f_e P_e over all layers' tokens of the whole batch, as
    transformers counts it (k where the load is even).

    f is not differentiable, so the shares' gradients too add up to the whole's.

    Args:
        sums: ``balance`` of the part, all layers together: [E], [E], [].
        whole: of the batch that it is a part of.
    """
    tokens = jnp.maximum(whole["tokens"], 1.0)
    share, probability = whole["chosen"] / tokens, sums["probability"] / tokens
    return share.shape[0] * jnp.sum(share * probability)
