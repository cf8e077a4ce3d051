# SPDX-License-Identifier: Apache-2.0
"""The decoder: one Linen module for every family, handed out as pure functions.

    tokens -> embed -> L x block (scanned; rematerialized by policy) -> final norm -> hidden ->
    unembed | head

``models.model`` wraps it; no module leaves this folder.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name, checkpoint_policies
from jaxtyping import Array, Bool, Float, Int

from align_jax.models import attention as attentions
from align_jax.models import cache as caches
from align_jax.models import rope as ropes
from align_jax.models.cache import Cache
from align_jax.models.config import ModelConfig
from align_jax.models.heads import HEADS
from align_jax.models.layers import ACTIVATIONS, Linear, Norm, array, contract, normal, parameter
from align_jax.models.lora import LoraConfig
from align_jax.models.moe import Experts
from align_jax.models.roles import Role
from align_jax.models.stacks import Stack
from align_jax.parallel.sharding import constrain

REMAT: Mapping[str, Callable[..., Any]] = {
    "none": checkpoint_policies.everything_saveable,
    "full": checkpoint_policies.nothing_saveable,
    "dots": checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": checkpoint_policies.save_only_these_names("attention"),
}

States = Float[Array, "N T D"]
Heads = Float[Array, "N T heads h"]
Queries = Float[Array, "N T H h"]
Keys = Float[Array, "N T K h"]  # and values
KeysAndValues = tuple[Float[Array, "L N C K h"], Float[Array, "L N C K h"]]


@dataclasses.dataclass(frozen=True)
class Options:
    """How a model is computed, beside what it is: see ``models.model.build``."""

    dtype: jnp.dtype
    remat: str
    attention: str
    lora: LoraConfig | None
    heads: tuple[str, ...]
    unembed: bool
    dropout: float


class Layer(NamedTuple):
    """What differs from layer to layer; the scan hands each its own."""

    number: Int[Array, "*L"]
    window: Int[Array, "*L"]  # among the distinct windows, sorted
    rope: Int[Array, "*L"]  # among the distinct rotary embeddings; -1 = none


class Rows(NamedTuple):
    """What all layers see of the rows; C slots of a cache."""

    segment_ids: Int[Array, "N T"]
    positions: Int[Array, "N T"]
    prefix_ids: Int[Array, "N T"] | None
    ropes: tuple[tuple[jax.Array, jax.Array], ...]  # cosines and sines of each rotary embedding
    held: Int[Array, "N C"] | None = None  # prefill of a ring: the token that each slot keeps
    slots: Int[Array, "N"] | None = None  # decoding: where this token's key and value go
    allowed: Bool[Array, "N C"] | None = None  # decoding: slots of the token's own segment
    distance: Int[Array, "N C"] | None = None  # decoding: tokens back to each slot


def _linear(
    config: ModelConfig,
    options: Options,
    target: str,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    axes: tuple[str, ...],
    bias: bool,
) -> Linear:
    """Make a linear map of the layers, with its adapter if it gets one; ``target``'s end is its
    name."""
    role = Role("linear", len(inputs), target=target)
    lora = options.lora.on(target) if options.lora is not None else None
    name = target.split("/")[-1]
    std, dtype = config.init_std, options.dtype
    return Linear(inputs, outputs, axes, dtype, role, bias, std, lora, name=name)


class Attention(nn.Module):
    """Grouped-query attention over a row's segments, or over a cache."""

    config: ModelConfig
    options: Options

    @nn.compact
    def __call__(
        self, x: States, layer: Layer, rows: Rows, cache: KeysAndValues | None
    ) -> tuple[States, KeysAndValues | None]:
        c = self.config
        D, H, K, h = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim

        def project(name: str, heads: int, axis: str) -> Heads:
            axes, target = ("embed", axis, "head"), f"attention/{name}"
            return _linear(c, self.options, target, (D,), (heads, h), axes, c.attention_bias)(x)

        q = project("query", H, "heads")
        k = project("key", K, "kv_heads")
        v = project("value", K, "kv_heads")
        if c.qk_norm_turned:
            q, k = self._rotate(q, k, layer, rows)
        if c.qk_norm:
            q, k = self._norm("query_norm", q, "heads"), self._norm("key_norm", k, "kv_heads")
        if not c.qk_norm_turned:
            q, k = self._rotate(q, k, layer, rows)
        y, cache = self._attend(q, k, v, layer, rows, cache)
        y = checkpoint_name(y, "attention")
        axes, target = ("heads", "head", "embed"), "attention/output"
        return _linear(c, self.options, target, (H, h), (D,), axes, c.output_bias)(y), cache

    def _norm(self, name: str, x: Heads, axis: str) -> Heads:
        c, shape = self.config, x.shape[-2:]
        axes: tuple[str, ...] = (axis, "head")
        if c.qk_norm == "head":
            shape, axes = (c.head_dim,), ("norm",)
        return Norm(shape, "rms", c.norm_eps, c.norm_offset, self.options.dtype, axes, name=name)(x)

    def _rotate(self, q: Queries, k: Keys, layer: Layer, rows: Rows) -> tuple[Queries, Keys]:
        if not rows.ropes:
            return q, k
        cos, sin = rows.ropes[0]
        if len(rows.ropes) > 1:
            cos, sin = (jnp.stack(tables)[layer.rope] for tables in zip(*rows.ropes))
        pairs = self.config.rope_interleaved
        turned = ropes.rotate(q, cos, sin, pairs), ropes.rotate(k, cos, sin, pairs)
        if -1 not in self.config.layer_ropes:
            return turned
        on = layer.rope >= 0
        return jnp.where(on, turned[0], q), jnp.where(on, turned[1], k)

    def _attend(
        self, q: Queries, k: Keys, v: Keys, layer: Layer, rows: Rows, cache: KeysAndValues | None
    ) -> tuple[Queries, KeysAndValues | None]:
        c = self.config
        kinds = sorted(set(c.windows))
        sinks = None
        if c.sinks:
            role, shape = Role("linear", matrix=False), (c.num_heads,)
            sinks = parameter(self, "sinks", normal(c.init_std), shape, ("heads",), role)
            sinks = array(sinks, jnp.dtype(jnp.float32))
        if cache is not None and rows.slots is not None:
            return _decode(q, k, v, sinks, layer, kinds, rows, cache, c)
        if cache is not None:
            keys, values = (x if rows.held is None else caches.taken(x, rows.held) for x in (k, v))
            cache = _stored(cache[0], keys, layer), _stored(cache[1], values, layer)
        function = attentions.implementation(self.options.attention)

        def branch(window: int) -> Callable[[Queries, Keys, Keys], Queries]:
            def attend(q: Queries, k: Keys, v: Keys) -> Queries:
                return function(
                    q,
                    k,
                    v,
                    segment_ids=rows.segment_ids,
                    positions=rows.positions,
                    prefix_ids=rows.prefix_ids,
                    window=window or None,
                    scale=c.query_scale,
                    softcap=c.attention_softcap,
                    sinks=sinks,
                )

            return attend

        if len(kinds) == 1:
            return branch(kinds[0])(q, k, v), cache
        return jax.lax.switch(layer.window, [branch(kind) for kind in kinds], q, k, v), cache


def _stored(whole: jax.Array, new: Keys, layer: Layer) -> jax.Array:
    """Write a layer's keys or values into the first slots of a cache."""
    start = (layer.number, 0, 0, 0, 0)
    return jax.lax.dynamic_update_slice(whole, new[None].astype(whole.dtype), start)


def _decode(
    q: Queries,
    k: Keys,
    v: Keys,
    sinks: Float[Array, "H"] | None,
    layer: Layer,
    kinds: list[int],
    rows: Rows,
    cache: KeysAndValues,
    config: ModelConfig,
) -> tuple[Queries, KeysAndValues]:
    """Write one token a row into the cache and attend to the row's own segment in it."""
    keys, values = cache
    assert rows.allowed is not None and rows.distance is not None  # as rows.slots is
    at = (layer.number, jnp.arange(q.shape[0]), rows.slots)
    keys = keys.at[at].set(k[:, 0].astype(keys.dtype), mode="drop")
    values = values.at[at].set(v[:, 0].astype(values.dtype), mode="drop")
    allowed = rows.allowed
    if kinds != [0]:
        limits = jnp.asarray([w or np.iinfo(np.int32).max for w in kinds], jnp.int32)
        allowed = allowed & (rows.distance < limits[layer.window])
    mine = keys[layer.number].astype(q.dtype), values[layer.number].astype(q.dtype)
    scale, softcap = config.query_scale, config.attention_softcap
    y = attentions.weighted(q, *mine, allowed[:, None], scale=scale, softcap=softcap, sinks=sinks)
    return y, (keys, values)


class Mlp(nn.Module):
    """The feed-forward part: gated or plain.

    Attributes:
        part: "mlp", or "shared" for the expert that every token passes.
    """

    config: ModelConfig
    options: Options
    part: str = "mlp"

    @nn.compact
    def __call__(self, x: States) -> States:
        c = self.config
        D, act = (c.hidden_size,), ACTIVATIONS[c.activation]
        F = (c.intermediate_size if self.part == "mlp" else c.shared_size,)

        def up(name: str) -> Float[Array, "N T F"]:
            axes = ("embed", "ffn")
            return _linear(c, self.options, f"{self.part}/{name}", D, F, axes, c.mlp_bias)(x)

        y = up("up")
        y = act(up("gate")) * y if c.gated else act(y)
        return _linear(c, self.options, f"{self.part}/down", F, D, ("ffn", "embed"), c.mlp_bias)(y)


class Block(nn.Module):
    """One layer: the scanned body."""

    config: ModelConfig
    options: Options

    @nn.compact
    def __call__(
        self, carry: tuple[States, KeysAndValues | None], layer: Layer, rows: Rows
    ) -> tuple[tuple[States, KeysAndValues | None], dict[str, jax.Array]]:
        c = self.config
        x, cache = carry
        shape, dtype = (c.hidden_size,), self.options.dtype

        def norm(name: str, on: bool, y: States) -> States:
            if not on:
                return y
            return Norm(shape, c.norm, c.norm_eps, c.norm_offset, dtype, name=name)(y)

        def dropped(y: States) -> States:
            if not self.options.dropout or not self.has_rng("dropout"):
                return y
            return nn.Dropout(self.options.dropout)(y, deterministic=False)

        with jax.named_scope("attention"):
            first = norm("attention_norm", c.norm_inputs, x)
            y, cache = Attention(c, self.options, name="attention")(first, layer, rows, cache)
            y = dropped(norm("attention_out_norm", c.norm_outputs, y))
            y = y if c.residual_scale == 1 else y * c.residual_scale
        residual = x if c.parallel_residual else x + y
        aux: dict[str, jax.Array] = {}
        with jax.named_scope("mlp"):
            z = first if c.shared_norm else norm("mlp_norm", c.norm_inputs, residual)
            if c.num_experts:
                routed, aux = Experts(c, dtype, name="moe")(z, rows.segment_ids > 0)
                z = routed + self._shared(z) if c.shared_size else routed
            else:
                z = Mlp(c, self.options, name="mlp")(z)
            z = dropped(norm("mlp_out_norm", c.norm_outputs, z))
            z = z if c.residual_scale == 1 else z * c.residual_scale
        x = x + y + z if c.parallel_residual else residual + z
        return (constrain(x, "rows", "length", "features"), cache), aux

    def _shared(self, x: States) -> States:
        c, o = self.config, self.options
        y = Mlp(c, o, "shared", name="shared")(x)
        if not c.shared_gate:
            return y
        role, init = Role("router", inputs=1), normal(c.init_std)
        gate = parameter(self, "shared_gate", init, (c.hidden_size, 1), ("embed", None), role)
        return y * jax.nn.sigmoid(contract(x, array(gate, o.dtype), 1))


class Pattern(nn.Module):
    """Layers of several kinds one after the other: the scanned body where their order repeats.

    Attributes:
        configs: what each of them is.
        block: ``Block``, or what rematerializes it.
    """

    configs: tuple[ModelConfig, ...]
    options: Options
    block: type[Block]

    @nn.compact
    def __call__(
        self, carry: tuple[States, KeysAndValues | None], layers: Layer, rows: Rows
    ) -> tuple[tuple[States, KeysAndValues | None], dict[str, jax.Array]]:
        aux: dict[str, jax.Array] = {}
        for place, config in enumerate(self.configs):
            layer = Layer(*(each[place] for each in layers))
            carry, sums = self.block(config, self.options, name=str(place))(carry, layer, rows)
            aux = _added(aux, sums)
        return carry, aux


def _added(one: dict[str, jax.Array], other: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Add the routing's sums of layers with experts; others have none."""
    if not one or not other:
        return one or other
    return {name: one[name] + other[name] for name in one}


class Decoder(nn.Module):
    """Embedding, the scanned layers, the final norm, the output heads."""

    config: ModelConfig
    options: Options

    def setup(self) -> None:
        c, o = self.config, self.options
        self.stacks = [self._stack(stack) for stack in c.stacks]
        self.embed = Embedding(c, o.dtype)
        self.drop = nn.Dropout(o.dropout)
        self.final_norm = Norm((c.hidden_size,), c.norm, c.norm_eps, c.norm_offset, o.dtype)
        if o.unembed and not c.tied:
            self.output = Linear(
                (c.hidden_size,),
                (c.vocab_rows,),
                ("embed", "vocab"),
                o.dtype,
                Role("output", inputs=1),
                c.head_bias,
                init_std=c.init_std,
                result=jnp.dtype(jnp.float32),
            )
        self.scalars = {name: HEADS[name](c.hidden_size, name) for name in o.heads}

    def _stack(self, stack: Stack) -> nn.Module:
        c, o = self.config, self.options
        block = Block
        if o.remat != "none":
            block = nn.remat(Block, policy=REMAT[o.remat], prevent_cse=False)
        scan = functools.partial(
            nn.scan,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=stack.count,
            metadata_params={"name": "layers"},
        )
        configs = tuple(c.dense if kind == "dense" else c for kind in stack.kinds)
        if len(configs) == 1:
            return scan(block)(*configs, o, name=stack.name)
        return scan(Pattern)(configs, o, block, name=stack.name)

    def everything(self, tokens: Int[Array, "N T"]) -> None:
        """Touch every parameter: what initialization runs."""
        hidden, _ = self.hidden(tokens, jnp.ones_like(tokens), jnp.zeros_like(tokens))
        if self.options.unembed:
            self.unembed(hidden)
        for name in self.options.heads:
            self.head(name, hidden)

    def hidden(
        self,
        tokens: Int[Array, "N T"],
        segment_ids: Int[Array, "N T"],
        positions: Int[Array, "N T"],
        prefix_ids: Int[Array, "N T"] | None = None,
    ) -> tuple[States, dict[str, jax.Array]]:
        """Run whole rows."""
        rows = self._rows(segment_ids, positions, prefix_ids)
        x, _, aux = self._run(tokens, rows, None)
        return x, aux

    def prefill(
        self,
        tokens: Int[Array, "N T"],
        segment_ids: Int[Array, "N T"],
        positions: Int[Array, "N T"],
        prefix_ids: Int[Array, "N T"] | None,
        cache: Cache,
    ) -> tuple[States, Cache]:
        """Run whole rows and keep their keys and values."""
        rows = self._rows(segment_ids, positions, prefix_ids)
        length, size = tokens.shape[1], cache.segment_ids.shape[1]
        slot = jnp.arange(length, dtype=jnp.int32)[None]
        end = jnp.max(jnp.where(segment_ids > 0, slot + 1, 0), axis=1)
        if length > size:
            held = caches.held(end, size)
            rows = rows._replace(held=held)
            segment_ids, positions = caches.taken(segment_ids, held), caches.taken(positions, held)
        x, (keys, values), _ = self._run(tokens, rows, (cache.keys, cache.values))
        segment_ids = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (0, 0))
        positions = jax.lax.dynamic_update_slice(cache.positions, positions, (0, 0))
        return x, Cache(keys, values, segment_ids, positions, end)

    def decode(
        self, token: Int[Array, "N"], position: Int[Array, "N"], cache: Cache
    ) -> tuple[Float[Array, "N D"], Cache]:
        """Run one token a row against the cache."""
        every, size = jnp.arange(token.shape[0]), cache.segment_ids.shape[1]
        slots, last = cache.length, jnp.maximum(cache.length - 1, 0)
        if caches.is_ring(self.config.windows, size):
            slots, last = slots % size, last % size
        segment = cache.segment_ids[every, last]
        segment_ids = cache.segment_ids.at[every, slots].set(segment, mode="drop")
        positions = cache.positions.at[every, slots].set(position, mode="drop")
        rows = self._rows(segment[:, None], position[:, None], None)._replace(
            slots=slots,
            allowed=segment_ids == segment[:, None],
            distance=position[:, None] - positions,
        )
        x, (keys, values), _ = self._run(token[:, None], rows, (cache.keys, cache.values))
        return x[:, 0], Cache(keys, values, segment_ids, positions, cache.length + 1)

    def _rows(
        self, segment_ids: jax.Array, positions: jax.Array, prefix_ids: jax.Array | None
    ) -> Rows:
        c = self.config
        turned = tuple(ropes.tables(rope, positions, c.run_length) for rope in c.ropes)
        return Rows(segment_ids, positions, prefix_ids, turned)

    def _run(
        self, tokens: Int[Array, "N T"], rows: Rows, cache: KeysAndValues | None
    ) -> tuple[States, Any, dict[str, jax.Array]]:
        c = self.config
        kinds = sorted(set(c.windows))
        layer = Layer(
            jnp.arange(c.num_layers, dtype=jnp.int32),
            jnp.asarray([kinds.index(w) for w in c.windows], jnp.int32),
            jnp.asarray(c.layer_ropes, jnp.int32),
        )
        x = self.embed(tokens, rows.positions)
        if self.options.dropout and self.has_rng("dropout"):
            x = self.drop(x, deterministic=False)
        aux: dict[str, jax.Array] = {}
        for stack, run in zip(c.stacks, self.stacks):
            turns = (stack.count, len(stack.kinds)) if len(stack.kinds) > 1 else (stack.count,)
            own = Layer(*(each[stack.first : stack.end].reshape(turns) for each in layer))
            (x, cache), sums = run((x, cache), own, rows)
            aux = _added(aux, {name: each.sum(axis=0) for name, each in sums.items()})
        with jax.named_scope("final_norm"):
            return constrain(self.final_norm(x), "rows", "length", "features"), cache, aux

    def unembed(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
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
            if c.output_scale != 1:
                logits = logits * c.output_scale
            if c.final_softcap:
                logits = c.final_softcap * jnp.tanh(logits / c.final_softcap)
            if c.vocab_rows == c.vocab_size:
                return logits
            real = jnp.arange(c.vocab_rows) < c.vocab_size
            real = jnp.expand_dims(real, tuple(range(logits.ndim - 1)))
            return jnp.where(real, logits, jnp.finfo(jnp.float32).min)

    def head(self, name: str, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
        """Return a scalar head's output."""
        with jax.named_scope(name):
            return self.scalars[name](hidden)


class Embedding(nn.Module):
    """Token embeddings, with learned positions where the family has them."""

    config: ModelConfig
    dtype: jnp.dtype

    def setup(self) -> None:
        c, role = self.config, Role("embedding")
        init, shape = normal(c.init_std), (c.vocab_rows, c.hidden_size)
        self.tokens = parameter(self, "tokens", init, shape, ("vocab", "embed"), role)
        if c.learned_positions:
            shape = (c.max_positions + c.position_offset, c.hidden_size)
            self.positions = parameter(self, "positions", init, shape, ("positions", "embed"), role)

    def table(self) -> Float[Array, "V D"]:
        """Return the embedding matrix in the compute type."""
        return array(self.tokens, self.dtype)

    def __call__(self, tokens: Int[Array, "N T"], positions: Int[Array, "N T"]) -> States:
        c = self.config
        with jax.named_scope("embed"):
            # Gathered over the width first, so that each device looks up its rows of the vocabulary
            # and one sum over the tensor axis puts them together; else the partitioner moves the
            # looked-up states between all devices.
            x = jnp.take(constrain(self.table(), "vocab", "features"), tokens, axis=0)
            if c.embed_scale != 1:
                x = x * jnp.asarray(c.embed_scale, self.dtype)
            if c.learned_positions:
                table = array(self.positions, self.dtype)
                x = x + jnp.take(table, positions + c.position_offset, axis=0)
            return constrain(x, "rows", "length", "features")
