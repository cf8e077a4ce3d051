# SPDX-License-Identifier: Apache-2.0
"""The decoder: one Linen module for every family, handed out as pure functions.

    tokens -> embed -> L x block (scanned; rematerialized by policy) -> final norm -> hidden ->
    unembed | head

``build`` returns a Model; no module leaves this folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name, checkpoint_policies

from align_jax.models import attention as attentions
from align_jax.models import cache as caches
from align_jax.models import rope as ropes
from align_jax.models.cache import Cache
from align_jax.models.config import ModelConfig
from align_jax.models.heads import HEADS
from align_jax.models.layers import ACTIVATIONS, Linear, Norm, array, normal, parameter
from align_jax.models.lora import LoraConfig
from align_jax.models.moe import Experts, load_balancing
from align_jax.parallel.sharding import constrain

REMAT: Mapping[str, Any] = {
    "none": checkpoint_policies.everything_saveable,
    "full": checkpoint_policies.nothing_saveable,
    "dots": checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": checkpoint_policies.save_only_these_names("attention"),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """How a model is computed, beside what it is."""

    dtype: Any
    remat: str
    attention: str
    lora: LoraConfig | None
    heads: tuple[str, ...]
    unembed: bool
    dropout: float


class Attention(nn.Module):
    """Grouped-query attention over a row's segments, or over a cache."""

    config: ModelConfig
    options: Options

    @nn.compact
    def __call__(self, x, layer, shared, cache):
        c, dtype = self.config, self.options.dtype

        def linear(name, inputs, outputs, axes, bias):
            lora = self.options.lora and self.options.lora.on(f"attention/{name}")
            return Linear(inputs, outputs, axes, dtype, bias, c.init_std, lora, name=name)

        D, H, K, h = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
        q = linear("query", (D,), (H, h), ("embed", "heads", "head"), c.attention_bias)(x)
        k = linear("key", (D,), (K, h), ("embed", "kv_heads", "head"), c.attention_bias)(x)
        v = linear("value", (D,), (K, h), ("embed", "kv_heads", "head"), c.attention_bias)(x)
        if c.qk_norm:
            q, k = self._norm("query_norm", q, "heads"), self._norm("key_norm", k, "kv_heads")
        q, k = self._rotate(q, k, layer, shared)
        y, cache = self._attend(q, k, v, layer, shared, cache)
        y = checkpoint_name(y, "attention")
        return linear("output", (H, h), (D,), ("heads", "head", "embed"), c.output_bias)(y), cache

    def _norm(self, name, x, axis):
        c = self.config
        shape, axes = (
            ((c.head_dim,), ("norm",)) if c.qk_norm == "head" else (x.shape[-2:], (axis, "head"))
        )
        return Norm(shape, "rms", c.norm_eps, c.norm_offset, self.options.dtype, axes, name=name)(x)

    def _rotate(self, q, k, layer, shared):
        if not shared["ropes"]:
            return q, k
        cos, sin = shared["ropes"][0]
        if len(shared["ropes"]) > 1:
            cos, sin = (jnp.stack(parts)[layer["rope"]] for parts in zip(*shared["ropes"]))
        turned = ropes.rotate(q, cos, sin), ropes.rotate(k, cos, sin)
        if -1 not in self.config.layer_ropes:
            return turned
        return tuple(jnp.where(layer["rope"] >= 0, new, old) for new, old in zip(turned, (q, k)))

    def _attend(self, q, k, v, layer, shared, cache):
        c = self.config
        kinds = sorted(set(c.windows))
        numbers = {"scale": c.query_scale, "softcap": c.attention_softcap}
        if cache is not None and "slots" in shared:
            keys, values, y = _decode(
                q, k, v, layer["index"], kinds, layer["window"], shared, cache, numbers
            )
            return y, (keys, values)
        if cache is not None:
            start = (layer["index"], 0, 0, 0, 0)
            kept = (caches.taken(x, shared["held"]) if "held" in shared else x for x in (k, v))
            cache = tuple(
                jax.lax.dynamic_update_slice(whole, new[None].astype(whole.dtype), start)
                for whole, new in zip(cache, kept)
            )
        function = attentions.choose(self.options.attention)
        fields = {name: shared[name] for name in ("segment_ids", "positions", "prefix_ids")}
        branches = [
            lambda q, k, v, w=w: function(q, k, v, **fields, window=w or None, **numbers)
            for w in kinds
        ]
        y = (
            branches[0](q, k, v)
            if len(kinds) == 1
            else jax.lax.switch(layer["window"], branches, q, k, v)
        )
        return y, cache


def _decode(q, k, v, index, kinds, kind, shared, cache, numbers):
    """Write one token a row into the cache and attend to the row's own segment in it."""
    keys, values = cache
    rows = jnp.arange(q.shape[0])
    keys = keys.at[index, rows, shared["slots"]].set(k[:, 0].astype(keys.dtype), mode="drop")
    values = values.at[index, rows, shared["slots"]].set(v[:, 0].astype(values.dtype), mode="drop")
    allowed = shared["allowed"]
    if kinds != [0]:
        limits = jnp.asarray([w or np.iinfo(np.int32).max for w in kinds], jnp.int32)
        allowed = allowed & (shared["distance"] < limits[kind])
    y = attentions.weighted(
        q, keys[index].astype(q.dtype), values[index].astype(q.dtype), allowed[:, None], **numbers
    )
    return keys, values, y


class Mlp(nn.Module):
    """The feed-forward part: gated or plain."""

    config: ModelConfig
    options: Options

    @nn.compact
    def __call__(self, x):
        c = self.config

        def linear(name, inputs, outputs, axes):
            lora = self.options.lora and self.options.lora.on(f"mlp/{name}")
            return Linear(
                (inputs,),
                (outputs,),
                axes,
                self.options.dtype,
                c.mlp_bias,
                c.init_std,
                lora,
                name=name,
            )

        act = ACTIVATIONS[c.activation]
        y = linear("up", c.hidden_size, c.intermediate_size, ("embed", "ffn"))(x)
        if c.gated:
            y = act(linear("gate", c.hidden_size, c.intermediate_size, ("embed", "ffn"))(x)) * y
        else:
            y = act(y)
        return linear("down", c.intermediate_size, c.hidden_size, ("ffn", "embed"))(y)


class Block(nn.Module):
    """One layer: the scanned body.  carry = (x, cache); layer = this layer's numbers; shared = the
    rows' fields."""

    config: ModelConfig
    options: Options

    @nn.compact
    def __call__(self, carry, layer, shared):
        c = self.config
        x, cache = carry

        def norm(name, on, y):
            if not on:
                return y
            return Norm(
                (c.hidden_size,), c.norm, c.norm_eps, c.norm_offset, self.options.dtype, name=name
            )(y)

        def dropped(y):
            if not self.options.dropout or not self.has_rng("dropout"):
                return y
            return nn.Dropout(self.options.dropout)(y, deterministic=False)

        with jax.named_scope("attention"):
            y = norm("attention_norm", c.norm_inputs, x)
            y, cache = Attention(c, self.options, name="attention")(y, layer, shared, cache)
            y = dropped(norm("attention_out_norm", c.norm_outputs, y))
        residual = x if c.parallel_residual else x + y
        with jax.named_scope("mlp"):
            z, aux = norm("mlp_norm", c.norm_inputs, residual), {}
            if c.num_experts:
                z, aux = Experts(c, self.options.dtype, name="moe")(z, shared["segment_ids"] > 0)
            else:
                z = Mlp(c, self.options, name="mlp")(z)
            z = dropped(norm("mlp_out_norm", c.norm_outputs, z))
        x = x + y + z if c.parallel_residual else residual + z
        return (constrain(x, "rows", "length", "features"), cache), aux


class Decoder(nn.Module):
    """Embedding, the scanned layers, the final norm, the output heads."""

    config: ModelConfig
    options: Options

    def setup(self):
        c, o = self.config, self.options
        block = Block
        if o.remat != "none":
            block = nn.remat(Block, policy=REMAT[o.remat], prevent_cse=False)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=c.num_layers,
            metadata_params={"name": "layers"},
        )(c, o)
        self.embed = Embedding(c, o.dtype)
        self.drop = nn.Dropout(o.dropout)
        self.final_norm = Norm((c.hidden_size,), c.norm, c.norm_eps, c.norm_offset, o.dtype)
        if o.unembed and not c.tied:
            self.output = Linear(
                (c.hidden_size,),
                (c.vocab_rows,),
                ("embed", "vocab"),
                o.dtype,
                False,
                c.init_std,
                result=jnp.float32,
            )
        self.scalars = {name: HEADS[name](c.hidden_size, name) for name in o.heads}

    def everything(self, tokens):
        """Touch every parameter: what initialization runs."""
        hidden, _ = self.hidden(tokens, jnp.ones_like(tokens), jnp.zeros_like(tokens))
        if self.options.unembed:
            self.unembed(hidden)
        for name in self.options.heads:
            self.head(name, hidden)

    def hidden(self, tokens, segment_ids, positions, prefix_ids=None):
        """Run whole rows."""
        shared = self._shared(segment_ids, positions, prefix_ids)
        x, _, aux = self._run(tokens, shared, None)
        return x, {"load_balancing": load_balancing(aux)} if aux else {}

    def prefill(self, tokens, segment_ids, positions, prefix_ids, cache):
        """Run whole rows and keep their keys and values."""
        shared = self._shared(segment_ids, positions, prefix_ids)
        length, size = tokens.shape[1], cache.segment_ids.shape[1]
        slot = jnp.arange(length, dtype=jnp.int32)[None]
        end = jnp.max(jnp.where(segment_ids > 0, slot + 1, 0), axis=1)
        fields = segment_ids, positions
        if length > size:
            shared["held"] = caches.held(end, size)
            fields = tuple(caches.taken(x, shared["held"]) for x in fields)
        x, (keys, values), _ = self._run(tokens, shared, (cache.keys, cache.values))
        fields = (
            jax.lax.dynamic_update_slice(old, new, (0, 0))
            for old, new in zip((cache.segment_ids, cache.positions), fields)
        )
        return x, Cache(keys, values, *fields, end)

    def decode(self, token, position, cache):
        """Run one token a row against the cache."""
        rows, size = jnp.arange(token.shape[0]), cache.segment_ids.shape[1]
        slots, last = cache.length, jnp.maximum(cache.length - 1, 0)
        if caches.is_ring(self.config.windows, size):
            slots, last = slots % size, last % size
        segment = cache.segment_ids[rows, last]
        segment_ids = cache.segment_ids.at[rows, slots].set(segment, mode="drop")
        positions = cache.positions.at[rows, slots].set(position, mode="drop")
        shared = self._shared(segment[:, None], position[:, None], None) | {
            "slots": slots,
            "allowed": segment_ids == segment[:, None],
            "distance": position[:, None] - positions,
        }
        x, (keys, values), _ = self._run(token[:, None], shared, (cache.keys, cache.values))
        return x[:, 0], Cache(keys, values, segment_ids, positions, cache.length + 1)

    def _shared(self, segment_ids, positions, prefix_ids):
        return {
            "segment_ids": segment_ids,
            "positions": positions,
            "prefix_ids": prefix_ids,
            "ropes": [ropes.tables(rope, positions) for rope in self.config.ropes],
        }

    def _run(self, tokens, shared, cache):
        c = self.config
        kinds = sorted(set(c.windows))
        layer = {
            "index": jnp.arange(c.num_layers, dtype=jnp.int32),
            "window": jnp.asarray([kinds.index(w) for w in c.windows], jnp.int32),
            "rope": jnp.asarray(c.layer_ropes, jnp.int32),
        }
        x = self.embed(tokens, shared["positions"])
        if self.options.dropout and self.has_rng("dropout"):
            x = self.drop(x, deterministic=False)
        (x, cache), aux = self.layers((x, cache), layer, shared)
        with jax.named_scope("final_norm"):
            return constrain(self.final_norm(x), "rows", "length", "features"), cache, aux

    def unembed(self, hidden):
        """Return float32 logits."""
        c = self.config
        with jax.named_scope("unembed"):
            hidden = hidden.astype(self.options.dtype)
            if c.tied:
                logits = jnp.einsum(
                    "...D,VD->...V", hidden, self.embed.table(), preferred_element_type=jnp.float32
                )
            else:
                logits = self.output(hidden)
            if c.final_softcap:
                logits = c.final_softcap * jnp.tanh(logits / c.final_softcap)
            if c.vocab_rows == c.vocab_size:
                return logits
            real = jnp.arange(c.vocab_rows) < c.vocab_size
            return jnp.where(
                jnp.expand_dims(real, tuple(range(logits.ndim - 1))),
                logits,
                jnp.finfo(jnp.float32).min,
            )

    def head(self, name, hidden):
        """Return a scalar head's output."""
        with jax.named_scope(name):
            return self.scalars[name](hidden)


class Embedding(nn.Module):
    """Token embeddings, with learned positions where the family has them."""

    config: ModelConfig
    dtype: Any

    def setup(self):
        c = self.config
        self.tokens = parameter(
            self, "tokens", normal(c.init_std), (c.vocab_rows, c.hidden_size), ("vocab", "embed")
        )
        if c.learned_positions:
            rows = c.max_positions + c.position_offset
            self.positions = parameter(
                self, "positions", normal(c.init_std), (rows, c.hidden_size), ("positions", "embed")
            )

    def table(self):
        """Return the embedding matrix [V, D] in the compute type."""
        return array(self.tokens, self.dtype)

    def __call__(self, tokens, positions):
        c = self.config
        with jax.named_scope("embed"):
            # Gathered over the width first, so that each device looks up its rows of the vocabulary
            # and one sum over the tensor axis puts them together; else the partitioner moves the
            # looked-up states between all devices.
            x = jnp.take(constrain(self.table(), "vocab", "features"), tokens, axis=0)
            if c.embed_scale != 1:
                x = x * jnp.asarray(c.embed_scale, self.dtype)
            if c.learned_positions:
                x = x + jnp.take(
                    array(self.positions, self.dtype), positions + c.position_offset, axis=0
                )
            return constrain(x, "rows", "length", "features")
