# SPDX-License-Identifier: Apache-2.0
"""A layer's attention to itself: projections, rotation, and what the cache of generation keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from align_jax.models import attention as attentions
from align_jax.models import cache as caches
from align_jax.models import decode_attention
from align_jax.models import rope as ropes
from align_jax.models.cache import Held
from align_jax.models.config import Latent, ModelConfig
from align_jax.models.delta_rule import Past
from align_jax.models.layers import Norm, Options, array, linear, normal, parameter, scaleless_norm
from align_jax.models.roles import Role

States = Float[Array, "N T D"]
Heads = Float[Array, "N T heads h"]
Queries = Float[Array, "N T H h"]
Keys = Float[Array, "N T K h"]
Values = Float[Array, "N T K v"]


class Layer(NamedTuple):
    """What differs from layer to layer; the scan hands each its own."""

    place: Int[Array, "*L"]  # in the cache: among those that keep what it keeps
    window: Int[Array, "*L"]  # among the distinct windows, sorted
    rope: Int[Array, "*L"]  # among the distinct rotary embeddings; -1 = none
    inputs: Float[Array, "*L N T e"] | None = None  # what each is given of a token, where it is


class Rows(NamedTuple):
    """What all layers see of the rows; C slots of a cache."""

    segment_ids: Int[Array, "N T"]
    positions: Int[Array, "N T"]
    prefix_ids: Int[Array, "N T"] | None
    ropes: tuple[tuple[jax.Array, jax.Array], ...]  # cosines and sines of each rotary embedding
    past: Past | None = None  # of layers that keep a state
    held: Int[Array, "N C"] | None = None  # prefill of a ring: the token that each slot keeps
    slots: Int[Array, "N"] | None = None  # decoding: where this token's key and value go
    allowed: Bool[Array, "N C"] | None = None  # decoding: slots of the token's own segment
    distance: Int[Array, "N C"] | None = None  # decoding: tokens back to each slot


class Attention(nn.Module):
    """Grouped-query attention over a row's segments, or over a cache."""

    config: ModelConfig
    options: Options

    @nn.compact
    def __call__(
        self, x: States, layer: Layer, rows: Rows, cache: Held | None
    ) -> tuple[States, Held | None]:
        c = self.config
        D, H, h = c.hidden_size, c.num_heads, c.head_dim

        def project(name: str, heads: int, width: int, axis: str) -> Heads:
            axes, target = ("embed", axis, "head"), f"attention/{name}"
            return linear(c, self.options, target, (D,), (heads, width), axes, c.attention_bias)(x)

        q, gate = project("query", H, c.query_dim, "heads"), None
        if c.attention_gate:
            q, gate = jnp.split(q, 2, axis=-1)
        new = None if c.reused else self._keys(project, layer, rows)
        q = self._turned("query", q, "heads", layer, rows)
        if c.query_growth:
            q = _grown(q, rows.positions, *c.query_growth)
        sinks = self._sinks() if c.sinks else None
        if cache is not None and rows.slots is not None:
            (k, v), allowed, cache = _extended(new, layer, rows, cache, c)
            numbers = {"scale": c.query_scale, "softcap": c.attention_softcap}
            y = decode_attention.attend(q, k, v, layer.place, allowed, sinks=sinks, **numbers)
        else:
            if new is None:
                assert cache is not None and cache.last is not None
                k, v = cache.last[c.width]
            else:
                k, v = new
                cache = cache and _filled(new, layer, rows, cache, c)
            y = _attended(q, k, v, sinks, layer, rows, c, self.options)
        y = checkpoint_name(y, "attention")
        y = y if gate is None else y * jax.nn.sigmoid(gate)
        axes, target = ("heads", "head", "embed"), "attention/output"
        return linear(c, self.options, target, (H, h), (D,), axes, c.output_bias)(y), cache

    def _keys(self, project: Callable[..., Heads], layer: Layer, rows: Rows) -> tuple[Keys, Values]:
        """Return a layer's own keys and values."""
        c = self.config
        k = project("key", c.num_kv_heads, c.head_dim, "kv_heads")
        if c.wide and c.wide.key_is_value:
            v = k
        else:
            v = project("value", c.num_kv_heads, c.head_dim, "kv_heads")
        if c.value_norm:
            v = scaleless_norm(v, c.norm_eps)
        return self._turned("key", k, "kv_heads", layer, rows), v

    def _turned(self, name: str, x: Heads, axis: str, layer: Layer, rows: Rows) -> Heads:
        """Return queries or keys rotated, and normalized before or after that."""
        c = self.config
        if c.qk_norm_turned:
            x = _rotated(x, layer, rows, c)
        if c.qk_norm:
            x = self._norm(f"{name}_norm", x, axis)
        return x if c.qk_norm_turned else _rotated(x, layer, rows, c)

    def _norm(self, name: str, x: Heads, axis: str) -> Heads:
        c, shape = self.config, x.shape[-2:]
        axes: tuple[str, ...] = (axis, "head")
        if c.qk_norm == "head":
            shape, axes = (c.head_dim,), ("norm",)
        return Norm(shape, "rms", c.norm_eps, c.norm_offset, self.options.dtype, axes, name=name)(x)

    def _sinks(self) -> Float[Array, "H"]:
        role, shape = Role("linear", matrix=False), (self.config.num_heads,)
        sinks = parameter(self, "sinks", normal(self.config.init_std), shape, ("heads",), role)
        return array(sinks, jnp.dtype(jnp.float32))


class LatentAttention(nn.Module):
    """Multi-head latent attention: each token's keys and values are made from its latent, and from
    one key that turns and all heads share; these two are all that a cache keeps.

    Decoding takes what makes keys and values to the query's side and to the output's, so that it
    attends to the latents themselves.

    References:
        DeepSeek-AI 2024, DeepSeek-V2 (arXiv 2405.04434), section 2.1 and appendix C.
    """

    config: ModelConfig
    options: Options

    @nn.compact
    def __call__(
        self, x: States, layer: Layer, rows: Rows, cache: Held | None
    ) -> tuple[States, Held | None]:
        c, o = self.config, self.options
        assert c.latent is not None  # who has none has the other attention
        D, H, rank, still, v = c.hidden_size, c.num_heads, c.latent.rank, c.still_dim, c.value_dim
        q = self._queries(x, c.latent)
        outputs, bias = (rank + c.latent.rope_dim,), c.attention_bias
        axes: tuple[str, ...] = ("embed", "latent")
        both = linear(c, o, "attention/key_value_a", (D,), outputs, axes, bias)(x)
        latent = self._norm("latent_norm", both[..., :rank])[:, :, None]
        turned = _rotated(q[..., still:], layer, rows, c)
        key = _rotated(both[:, :, None, rank:], layer, rows, c)
        q = jnp.concatenate([q[..., :still], turned], axis=-1)
        axes = ("embed", "heads", "head")
        expand = linear(c, o, "attention/key_value_b", (rank,), (H, still + v), axes, False)
        if cache is not None and rows.slots is not None:
            wholes, allowed, cache = _extended((latent, key), layer, rows, cache, c)
            latents, keys = (x[layer.place].astype(q.dtype) for x in wholes)
            kernel = expand.matrix()  # [rank, H, still + v]
            wide = q[..., :still].astype(kernel.dtype)
            inward = jnp.einsum("NTHs,cHs->NTHc", wide, kernel[..., :still]).astype(q.dtype)
            q = jnp.concatenate([inward, q[..., still:]], axis=-1)
            keys = jnp.concatenate([latents, keys], axis=-1)
            y = attentions.weighted(q, keys, latents, allowed[:, None], scale=c.query_scale)
            y = jnp.einsum("NTHc,cHv->NTHv", y.astype(kernel.dtype), kernel[..., still:])
            y = y.astype(o.dtype)
        else:
            cache = cache and _filled((latent, key), layer, rows, cache, c)
            made = expand(latent[:, :, 0])
            shared = jnp.broadcast_to(key, (*key.shape[:2], H, key.shape[-1]))
            k = jnp.concatenate([made[..., :still], shared], axis=-1)
            y = _attended(q, k, made[..., still:], None, layer, rows, c, o)
        y = checkpoint_name(y, "attention")
        axes, target = ("heads", "head", "embed"), "attention/output"
        return linear(c, o, target, (H, v), (D,), axes, c.output_bias)(y), cache

    def _queries(self, x: States, latent: Latent) -> Queries:
        c, o = self.config, self.options
        D, rank, outputs = c.hidden_size, latent.query_rank, (c.num_heads, c.head_dim)
        axes = ("embed", "heads", "head")
        if not rank:
            return linear(c, o, "attention/query", (D,), outputs, axes, False)(x)
        low, bias = ("embed", "latent"), c.attention_bias
        x = linear(c, o, "attention/query_a", (D,), (rank,), low, bias)(x)
        x = self._norm("query_norm", x)
        return linear(c, o, "attention/query_b", (rank,), outputs, axes, False)(x)

    def _norm(self, name: str, x: Float[Array, "N T r"]) -> Float[Array, "N T r"]:
        # the released code gives these norms no epsilon of the configuration
        return Norm(x.shape[-1:], "rms", 1e-6, False, self.options.dtype, name=name)(x)


def _rotated(x: Heads, layer: Layer, rows: Rows, config: ModelConfig) -> Heads:
    """Turn queries or keys by the layer's rotary embedding, if it has one."""
    used = sorted(set(config.layer_ropes) - {-1})
    if not rows.ropes or not used:
        return x
    cos, sin = rows.ropes[used[0]]
    if len(used) > 1:
        cos, sin = (jnp.stack(tables)[layer.rope] for tables in zip(*rows.ropes))
    turned = ropes.rotate(x, cos, sin, config.rope_interleaved)
    return turned if -1 not in config.layer_ropes else jnp.where(layer.rope >= 0, turned, x)


def _grown(q: Queries, positions: Int[Array, "N T"], rate: float, length: int) -> Queries:
    """Scale queries by how many lengths lie behind them, by a factor of their own type."""
    factor = 1 + rate * jnp.log1p((positions // length).astype(jnp.float32))
    return q * factor[:, :, None, None].astype(q.dtype)


def _attended(
    q: Queries,
    k: Keys,
    v: Values,
    sinks: Float[Array, "H"] | None,
    layer: Layer,
    rows: Rows,
    config: ModelConfig,
    options: Options,
) -> Float[Array, "N T H v"]:
    """Attend over whole rows, with the layer's window."""
    function = attentions.implementation(options.attention)
    kinds = sorted(set(config.windows))

    def branch(window: int) -> Callable[[Queries, Keys, Values], Float[Array, "N T H v"]]:
        def attend(q: Queries, k: Keys, v: Values) -> Float[Array, "N T H v"]:
            return function(
                q,
                k,
                v,
                segment_ids=rows.segment_ids,
                positions=rows.positions,
                prefix_ids=rows.prefix_ids,
                window=window or None,
                scale=config.query_scale,
                softcap=config.attention_softcap,
                sinks=sinks,
            )

        return attend

    if len(kinds) == 1:
        return branch(kinds[0])(q, k, v)
    return jax.lax.switch(layer.window, [branch(kind) for kind in kinds], q, k, v)


def _slots(config: ModelConfig) -> tuple[str, str]:
    """Return the cache's fields that hold the keys and the values of layers of this kind."""
    return ("wide_keys", "wide_values") if config.wide else ("keys", "values")


def _filled(
    new: tuple[Keys, Values], layer: Layer, rows: Rows, cache: Held, config: ModelConfig
) -> Held:
    """Write a layer's keys and values of whole rows into the first slots of a cache, and where
    later layers reuse them."""
    changes: dict[str, Any] = {}
    if cache.last is not None:
        changes["last"] = {**cache.last, config.width: new}
    start = (layer.place, 0, 0, 0, 0)
    for name, x in zip(_slots(config), new):
        if (whole := getattr(cache, name)) is not None:
            x = x if rows.held is None else caches.taken(x, rows.held)
            filled = jax.lax.dynamic_update_slice(whole, x[None].astype(whole.dtype), start)
            changes[name] = filled
    return cache._replace(**changes)


def _extended(
    new: tuple[Keys, Values] | None, layer: Layer, rows: Rows, cache: Held, config: ModelConfig
) -> tuple[tuple[jax.Array, jax.Array], Bool[Array, "N C"], Held]:
    """Write one token a row into the cache, unless the layer reuses what an earlier one has
    written.

    Returns:
        The keys and values of all layers of its kind, which slots the token attends to (its own
        segment's, within the window), and the cache.
    """
    assert rows.slots is not None and rows.allowed is not None and rows.distance is not None
    at = (layer.place, jnp.arange(rows.slots.shape[0]), rows.slots)
    names, changes = _slots(config), dict[str, Any]()
    for name, x in zip(names, new or ()):
        whole = getattr(cache, name)
        changes[name] = whole.at[at].set(x[:, 0].astype(whole.dtype), mode="drop")
    cache = cache._replace(**changes)
    allowed = rows.allowed
    kinds = sorted(set(config.windows))
    if kinds != [0]:
        limits = jnp.asarray([w or np.iinfo(np.int32).max for w in kinds], jnp.int32)
        limit = limits[layer.window] if len(kinds) > 1 else limits[0]
        allowed = allowed & (rows.distance < limit)
    keys, values = (getattr(cache, name) for name in names)
    return (keys, values), allowed, cache
