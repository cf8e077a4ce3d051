# SPDX-License-Identifier: Apache-2.0
"""The decoder: one Linen module for every family, handed out as pure functions.

    tokens -> embed -> L x block (scanned; rematerialized by policy) -> final norm -> hidden ->
    unembed | head

``models.model`` wraps it; no module leaves this folder.
"""

from __future__ import annotations

import functools
import operator
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_policies
from jaxtyping import Array, Float, Int

from align_jax.models import cache as caches
from align_jax.models import rope as ropes
from align_jax.models.altup import AltUp, Ends, Laurel
from align_jax.models.cache import Cache, Held
from align_jax.models.config import ModelConfig
from align_jax.models.delta_attention import DeltaAttention
from align_jax.models.delta_rule import past
from align_jax.models.heads import HEADS
from align_jax.models.layers import (
    ACTIVATIONS,
    Linear,
    Norm,
    Options,
    array,
    contract,
    linear,
    normal,
    ones,
    parameter,
    rows_product,
)
from align_jax.models.lora import LoraConfig, with_rows
from align_jax.models.moe import Experts
from align_jax.models.roles import Role
from align_jax.models.self_attention import Attention, LatentAttention, Layer, Rows, States
from align_jax.models.stacks import Stack
from align_jax.parallel.sharding import constrain

Carried = Float[Array, "*P N T D"]  # the states, or several streams of them

REMAT: Mapping[str, Callable[..., Any]] = {
    "none": checkpoint_policies.everything_saveable,
    "full": checkpoint_policies.nothing_saveable,
    # of an adapted map the rounded sum, which makes its products in float32 needless
    "dots": checkpoint_policies.save_from_both_policies(
        checkpoint_policies.dots_with_no_batch_dims_saveable,
        checkpoint_policies.save_only_these_names("sum"),
    ),
    "attention": checkpoint_policies.save_only_these_names("attention"),
}


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
            return linear(c, self.options, f"{self.part}/{name}", D, F, axes, c.mlp_bias)(x)

        y = up("up")
        if c.gated:
            gate = up("gate")
            y = act(_largest(gate, c.sparsity) if c.sparsity else gate) * y
        else:
            y = act(y)
        return linear(c, self.options, f"{self.part}/down", F, D, ("ffn", "embed"), c.mlp_bias)(y)


def _largest(x: Float[Array, "N T F"], sparsity: float) -> Float[Array, "N T F"]:
    """Return by how much features exceed what so large a part of them would not, were they drawn
    from a normal distribution; else zero.  Computed in float32.

    References:
        You et al. 2025, Spark Transformer (arXiv 2506.06644), section 3.2 (statistical top-k).
    """
    y = x.astype(jnp.float32)
    mean, variance = (of(y, axis=-1, keepdims=True) for of in (jnp.mean, jnp.var))
    # the root of zero has no gradient
    deviation = jnp.sqrt(jnp.maximum(variance, jnp.finfo(jnp.float32).tiny))
    cut = mean + deviation * statistics.NormalDist().inv_cdf(sparsity)
    return jax.nn.relu(y - cut).astype(x.dtype)


class Block(nn.Module):
    """One layer: the scanned body."""

    config: ModelConfig
    options: Options

    @nn.compact
    def __call__(
        self, carry: tuple[Carried, Held | None], layer: Layer, rows: Rows
    ) -> tuple[tuple[Carried, Held | None], dict[str, jax.Array]]:
        c = self.config
        x, cache = carry
        if c.streams:
            altup = AltUp(c, self.options, name="altup")
            streams = altup.predict(x)
            x = streams[c.streams.active]
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
            y, cache = self._mixer()(first, layer, rows, cache)
            y = dropped(norm("attention_out_norm", c.norm_outputs, y))
            y = y if c.residual_scale == 1 else y * c.residual_scale
        residual = x if c.parallel_residual else x + y
        if c.laurel_rank:
            residual = residual + Laurel(c, self.options, name="laurel")(first)
            residual = residual * jnp.asarray(2**-0.5, dtype)
        aux: dict[str, jax.Array] = {}
        with jax.named_scope("mlp"):
            z = first if c.shared_norm else norm("mlp_norm", c.norm_inputs, residual)
            if c.branch_norms:
                z, aux = self._branches(residual, z, rows, norm)
            elif c.num_experts:
                routed, aux = Experts(c, dtype, name="moe")(z, rows.segment_ids > 0)
                z = routed + self._shared(z) if c.shared_size else routed
            else:
                z = Mlp(c, self.options, name="mlp")(z)
            z = dropped(norm("mlp_out_norm", c.norm_outputs, z))
            z = z if c.residual_scale == 1 else z * c.residual_scale
        x = x + y + z if c.parallel_residual else residual + z
        if c.streams:
            return (self._corrected(altup, streams, x, layer), cache), aux
        return (self._ended(x, layer), cache), aux

    def _ended(self, x: States, layer: Layer) -> States:
        """Return what a layer leaves behind, given its two parts' sum."""
        if layer.inputs is not None:
            x = x + self._of_token(x, layer.inputs)
        if self.config.layer_scale:
            scale = parameter(self, "scale", ones, (1,), (None,), Role("norm", matrix=False))
            x = x * jax.lax.stop_gradient(array(scale, self.options.dtype))[None, None]
        return constrain(x, "rows", "length", "features")

    def _corrected(self, altup: AltUp, predicted: Carried, x: States, layer: Layer) -> Carried:
        """Return the same of several residual streams: a token's inputs go to all but the first."""
        streams = altup.correct(predicted, x)
        if layer.inputs is None:
            return streams
        more = self._of_token(altup.active(streams), layer.inputs)
        return jnp.concatenate([streams[:1], streams[1:] + more[None]])

    def _of_token(self, x: States, inputs: Float[Array, "N T e"]) -> States:
        return TokenInput(self.config, self.options, name="token")(x, inputs)

    def _mixer(self) -> Attention | LatentAttention | DeltaAttention:
        if self.config.delta:
            return DeltaAttention(self.config, self.options, name="delta")
        kind = LatentAttention if self.config.latent else Attention
        return kind(self.config, self.options, name="attention")

    def _branches(
        self, residual: States, x: States, rows: Rows, norm: Callable[[str, bool, States], States]
    ) -> tuple[States, dict[str, jax.Array]]:
        """Add a dense MLP of x and the residual's experts, each with norms of its own."""
        c = self.config
        experts = Experts(c, self.options.dtype, name="moe")
        given = norm("moe_norm", True, residual)
        routed, aux = experts(given, rows.segment_ids > 0, residual)
        dense = norm("shared_out_norm", True, self._shared(x))
        return dense + norm("moe_out_norm", True, routed), aux

    def _shared(self, x: States) -> States:
        c, o = self.config, self.options
        y = Mlp(c, o, "shared", name="shared")(x)
        if not c.shared_gate:
            return y
        role, init = Role("router", inputs=1), normal(c.init_std)
        gate = parameter(self, "shared_gate", init, (c.hidden_size, 1), ("embed", None), role)
        return y * jax.nn.sigmoid(contract(x, array(gate, o.dtype), 1))


class TokenInput(nn.Module):
    """What a layer adds for its own inputs of a token: they are gated by the states."""

    config: ModelConfig
    options: Options

    @nn.compact
    def __call__(self, x: States, inputs: Float[Array, "N T e"]) -> States:
        c, o = self.config, self.options
        D, E = (c.hidden_size,), (c.token_inputs,)
        y = linear(c, o, "token/gate", D, E, ("embed", "ffn"), False)(x)
        y = ACTIVATIONS[c.activation](y) * inputs
        y = linear(c, o, "token/up", E, D, ("ffn", "embed"), False)(y)
        return Norm(D, c.norm, c.norm_eps, c.norm_offset, o.dtype, name="norm")(y)


class TokenInputs(nn.Module):
    """The inputs of all layers, [L, N, T, e]: of each a row of a table of the token's own, and a
    linear map of its embedding, normalized.

    References:
        Gemma 3n's and 4's per-layer embeddings (transformers 5, ``Gemma3nTextModel``,
        ``Gemma4TextModel``).
    """

    config: ModelConfig
    options: Options

    @nn.compact
    def __call__(self, tokens: Int[Array, "N T"], x: States) -> Float[Array, "L N T e"]:
        c, o = self.config, self.options
        L, e, dtype = c.num_layers, c.token_inputs, o.dtype
        init, axes = normal(c.init_std), ("vocab", None, "embed")
        table = parameter(self, "table", init, (c.vocab_rows, L, e), axes, Role("embedding"))
        table = constrain(array(table, dtype), "vocab", None, None)
        if c.token_rows:
            tokens = jnp.where(tokens < c.token_rows, tokens, 0)
        own = jnp.take(table, tokens, axis=0) * jnp.asarray(e**0.5, dtype)
        shape, axes = ((c.hidden_size,), (L, e)), ("embed", None, "ffn")
        made = linear(c, o, "token_inputs/projection", *shape, axes, False)(x)
        made = made * jnp.asarray(c.hidden_size**-0.5, dtype)
        made = Norm((e,), c.norm, c.norm_eps, c.norm_offset, dtype, name="norm")(made)
        both = (made + own) * jnp.asarray(2**-0.5, dtype)
        return constrain(jnp.moveaxis(both, 2, 0), None, "rows", "length", None)


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
        self, carry: tuple[Carried, Held | None], layers: Layer, rows: Rows
    ) -> tuple[tuple[Carried, Held | None], dict[str, jax.Array]]:
        aux: dict[str, jax.Array] = {}
        for place, config in enumerate(self.configs):
            layer = jax.tree.map(operator.itemgetter(place), layers)
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
        self.embed = Embedding(c, o.dtype, o.lora)
        if c.token_inputs:
            self.token_inputs = TokenInputs(c, o)
        if c.streams:
            self.streams = Ends(c, o)
        self.drop = nn.Dropout(o.dropout)
        self.final_norm = Norm((c.hidden_size,), c.norm, c.norm_eps, c.norm_offset, o.dtype)
        if o.unembed and not c.tied:
            self.output = Linear(
                (c.hidden_size,),
                (c.vocab_rows,),
                ("embed", "vocab"),
                o.dtype,
                Role("output", inputs=1, target="output"),
                c.head_bias,
                init_std=c.init_std,
                lora=o.lora.on("output") if o.lora is not None else None,
                result=jnp.dtype(jnp.float32),
                tokens=o.lora.head_tokens if o.lora is not None else (),
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
        configs = tuple(c.of_kind(kind) for kind in stack.kinds)
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
        x, kept, _ = self._run(tokens, rows, cache.held)
        segment_ids = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (0, 0))
        positions = jax.lax.dynamic_update_slice(cache.positions, positions, (0, 0))
        return x, Cache(kept._replace(last=None), segment_ids, positions, end)

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
        x, kept, _ = self._run(token[:, None], rows, cache.held)
        return x[:, 0], Cache(kept, segment_ids, positions, cache.length + 1)

    def _rows(
        self, segment_ids: jax.Array, positions: jax.Array, prefix_ids: jax.Array | None
    ) -> Rows:
        c = self.config
        turned = tuple(ropes.tables(rope, positions, c.run_length) for rope in c.ropes)
        before = past(segment_ids, prefix_ids, c.delta.taps - 1) if c.delta else None
        return Rows(segment_ids, positions, prefix_ids, turned, before)

    def _run(
        self, tokens: Int[Array, "N T"], rows: Rows, cache: Held | None
    ) -> tuple[States, Any, dict[str, jax.Array]]:
        c = self.config
        kinds = sorted(set(c.windows))
        layer = Layer(
            jnp.asarray(c.places, jnp.int32),
            jnp.asarray([kinds.index(w) for w in c.windows], jnp.int32),
            jnp.asarray(c.layer_ropes, jnp.int32),
        )
        x = self.embed(tokens, rows.positions)
        if c.token_inputs:
            layer = layer._replace(inputs=self.token_inputs(tokens, x))
        if c.reused and rows.slots is None:
            cache = (cache or Held())._replace(last=self._last(tokens.shape))
        if self.options.dropout and self.has_rng("dropout"):
            x = self.drop(x, deterministic=False)
        if c.streams:
            x = self.streams.opened(x)
        aux: dict[str, jax.Array] = {}
        for stack, run in zip(c.stacks, self.stacks):
            own = jax.tree.map(functools.partial(_turns, stack), layer)
            (x, cache), sums = run((x, cache), own, rows)
            aux = _added(aux, {name: each.sum(axis=0) for name, each in sums.items()})
        if c.streams:
            x = self.streams.closed(x)
        with jax.named_scope("final_norm"):
            return constrain(self.final_norm(x), "rows", "length", "features"), cache, aux

    def _last(self, rows: tuple[int, ...]) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Return room for the keys and values that later layers reuse."""
        c, out = self.config, {}
        for kind in set(c.kinds):
            heads, *widths = (own := c.of_kind(kind)).cached
            keys, values = (jnp.zeros((*rows, heads, w), self.options.dtype) for w in widths)
            out[own.width] = (keys, values)
        return out

    def unembed(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Return float32 logits."""
        c = self.config
        with jax.named_scope("unembed"):
            hidden = hidden.astype(self.options.dtype)
            if c.tied:
                logits = self.embed.logits(hidden)
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


def _turns(stack: Stack, each: jax.Array) -> jax.Array:
    """Take a stack's layers of what differs from layer to layer: those of a turn side by side."""
    of_one = (len(stack.kinds),) if len(stack.kinds) > 1 else ()
    return each[stack.first : stack.end].reshape(stack.count, *of_one, *each.shape[1:])


class Embedding(nn.Module):
    """Token embeddings, with learned positions where the family has them, and with what of an
    adapter stands beside them."""

    config: ModelConfig
    dtype: jnp.dtype
    lora: LoraConfig | None = None

    def setup(self) -> None:
        c, role = self.config, Role("embedding")
        init, shape = normal(c.init_std), (c.vocab_rows, c.hidden_size)
        own = Role("embedding", target="embed")
        self.tokens = parameter(self, "tokens", init, shape, ("vocab", "embed"), own)
        self.adapted = self.lora is not None and self.lora.on("embed") is not None
        if self.lora is not None and self.adapted:
            shape, axes = (c.vocab_rows, self.lora.rank), ("vocab", "rank")
            self.down = parameter(self, "lora_a", init, shape, axes, Role("adapter"))
            shape, axes = (self.lora.rank, c.hidden_size), ("rank", "embed")
            self.up = parameter(self, "lora_b", init, shape, axes, Role("adapter", inputs=1))
        if self.lora is not None and self.lora.tokens:
            shape, axes = (len(self.lora.tokens), c.hidden_size), ("rank", "embed")
            self.rows = parameter(self, "rows", init, shape, axes, Role("adapter"))
        if c.learned_positions:
            shape = (c.max_positions + c.position_offset, c.hidden_size)
            self.positions = parameter(self, "positions", init, shape, ("positions", "embed"), role)

    def table(self) -> Float[Array, "V D"]:
        """Return the embedding matrix in the compute type, without an adapter."""
        table = array(self.tokens, self.dtype)
        if self.lora is None or not self.lora.tokens:
            return table
        return with_rows(table, self.rows, self.lora.tokens, 0)

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Return a tied head's float32 logits."""
        logits = rows_product(hidden, self.table())
        if self.lora is None or not self.adapted:
            return logits
        inside = contract(hidden, array(self.up, self.dtype).T, 1)
        return logits + self.lora.scale * rows_product(inside, array(self.down, self.dtype))

    def __call__(self, tokens: Int[Array, "N T"], positions: Int[Array, "N T"]) -> States:
        c = self.config
        with jax.named_scope("embed"):
            # Gathered over the width first, so that each device looks up its rows of the vocabulary
            # and one sum over the tensor axis puts them together; else the partitioner moves the
            # looked-up states between all devices.
            x = jnp.take(constrain(self.table(), "vocab", "features"), tokens, axis=0)
            if self.lora is not None and self.adapted:
                down = constrain(array(self.down, self.dtype), "vocab", None)
                inside, exact = jnp.take(down, tokens, axis=0), jnp.dtype(jnp.float32)
                delta = contract(inside, array(self.up, self.dtype), 1, exact, self.dtype)
                x = (x.astype(exact) + self.lora.scale * delta).astype(self.dtype)
            if c.embed_scale != 1:
                x = x * jnp.asarray(c.embed_scale, self.dtype)
            if c.learned_positions:
                table = array(self.positions, self.dtype)
                x = x + jnp.take(table, positions + c.position_offset, axis=0)
            return constrain(x, "rows", "length", "features")
