# SPDX-License-Identifier: Apache-2.0
"""A layer that keeps a state instead of keys and values: projections, a short causal convolution,
the gated delta rule, a gated norm.

References:
    Yang et al. 2024, Gated Delta Networks (arXiv 2412.06464), section 3.4; as Qwen3-Next has it,
    transformers 5, ``Qwen3NextGatedDeltaNet``.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from align_jax.models import cache as caches
from align_jax.models.cache import Held
from align_jax.models.config import Delta, ModelConfig
from align_jax.models.delta_rule import gated_delta_rule, in_chunks, step
from align_jax.models.layers import ACTIVATIONS, Norm, Options, linear, normal, ones, parameter
from align_jax.models.roles import Role
from align_jax.models.self_attention import Layer, Rows, States
from align_jax.parallel.sharding import constrain

Mixed = Float[Array, "N T g m"]  # a key head's query, key and r values, side by side
ByValue = Float[Array, "N T g r"]


class DeltaAttention(nn.Module):
    """The gated delta rule over a row's segments, or one token further from a cache."""

    config: ModelConfig
    options: Options

    @nn.compact
    def __call__(
        self, x: States, layer: Layer, rows: Rows, cache: Held | None
    ) -> tuple[States, Held | None]:
        c, o = self.config, self.options
        assert c.delta is not None  # who has none attends
        d = c.delta
        mixed, z, rate, fade = self._projected(x, d)
        real = (rows.segment_ids > 0)[..., None, None]
        rate = jnp.where(real, jax.nn.sigmoid(rate.astype(jnp.float32)), 0)
        fade = jnp.where(real, self._fade(fade, d), 0)
        kernel = self._kernel(d)
        if cache is not None and rows.slots is not None:
            y, cache = self._stepped(mixed, rate, fade, kernel, layer, cache)
        else:
            y, cache = self._run(mixed, rate, fade, kernel, layer, rows, cache)
        y = Norm((d.value_dim,), "rms", c.norm_eps, False, jnp.dtype(jnp.float32), name="norm")(y)
        y = y * jax.nn.silu(z.astype(jnp.float32))
        y = checkpoint_name(y.astype(o.dtype), "attention")
        y = y.reshape(*y.shape[:2], d.value_heads, d.value_dim)
        axes, shape = ("heads", "head", "embed"), (d.value_heads, d.value_dim)
        out = linear(c, o, "delta/output", shape, (c.hidden_size,), axes, False)
        return out(y), cache

    def _projected(self, x: States, d: Delta) -> tuple[Mixed, jax.Array, ByValue, ByValue]:
        """Return what is convolved, the gate [N, T, g, r, o], and what rate and fade come from."""
        c, o = self.config, self.options

        def project(name: str, *outputs: int) -> jax.Array:
            axes = ("embed", "heads", "head")[: 1 + len(outputs)]
            return linear(c, o, f"delta/{name}", (c.hidden_size,), outputs, axes, False)(x)

        g, r, n, width = d.key_heads, d.repeats, d.key_dim, d.value_dim
        ahead = x.shape[:2]
        if d.fused:
            mixed = project("mixed", g, d.width + r * width)
            mixed, z = jnp.split(mixed, [d.width], axis=-1)
            rate, fade = jnp.split(project("gates", g, 2 * r), 2, axis=-1)
        else:
            q, k = project("query", g, n), project("key", g, n)
            v = project("value", d.value_heads, width).reshape(*ahead, g, r * width)
            mixed, z = (
                jnp.concatenate([q, k, v], axis=-1),
                project("output_gate", d.value_heads, width),
            )
            rate, fade = project("rate", d.value_heads), project("fade", d.value_heads)
        by_value = (*ahead, g, r)
        return mixed, z.reshape(*by_value, width), rate.reshape(by_value), fade.reshape(by_value)

    def _fade(self, x: ByValue, d: Delta) -> ByValue:
        """Return the log of what is left of the state, in nats."""
        role, shape = Role("linear", matrix=False), (d.value_heads,)
        speed = parameter(self, "speed", _speeds, shape, ("heads",), role).astype(jnp.float32)
        shift = parameter(self, "shift", ones, shape, ("heads",), role).astype(jnp.float32)
        speed, shift = (y.reshape(1, 1, d.key_heads, d.repeats) for y in (speed, shift))
        return -jnp.exp(speed) * jax.nn.softplus(x.astype(jnp.float32) + shift)

    def _kernel(self, d: Delta) -> Float[Array, "s g m"]:
        """Return the convolution's weights, float32, the token's own last."""
        init, role = normal(self.config.init_std), Role("linear", matrix=False)

        def make(name: str, heads: int, width: int) -> jax.Array:
            axes, shape = (None, "heads", "head"), (d.taps, heads, width)
            kernel = parameter(self, f"{name}_taps", init, shape, axes, role)
            return kernel.astype(jnp.float32).reshape(d.taps, d.key_heads, -1)

        parts = [make(name, d.key_heads, d.key_dim) for name in ("query", "key")]
        return jnp.concatenate([*parts, make("value", d.value_heads, d.value_dim)], axis=-1)

    def _parted(self, y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return what is convolved as queries, keys [..., g, n] and values [..., g, r, o]."""
        assert self.config.delta is not None
        d = self.config.delta
        y = ACTIVATIONS[self.config.activation](y).astype(self.options.dtype)
        q, k, v = jnp.split(y, [d.key_dim, 2 * d.key_dim], axis=-1)
        return q, k, v.reshape(*v.shape[:-1], d.repeats, d.value_dim)

    def _run(
        self,
        mixed: Mixed,
        rate: ByValue,
        fade: ByValue,
        kernel: Float[Array, "s g m"],
        layer: Layer,
        rows: Rows,
        cache: Held | None,
    ) -> tuple[Float[Array, "N T g r o"], Held | None]:
        """Run whole rows, and keep their last states and inputs."""
        assert rows.past is not None
        # a state goes through the whole row, so that no device may have a stretch of it alone
        mixed, rate, fade = (constrain(x, "rows", None, "heads", None) for x in (mixed, rate, fade))
        weights = kernel[:, None, None]
        y = mixed.astype(jnp.float32) * weights[-1]
        for number, at in enumerate(rows.past.back):
            y = y + _earlier(mixed, at, number + 1, rows.prefix_ids) * weights[-2 - number]
        # chunks first: where queries, keys and values are parted before their tokens are, the TPU's
        # compiler makes one of them whole and another by chunks in one loop, and stops
        q, k, v = self._parted(in_chunks(y, rows.past.paths))
        y, states = gated_delta_rule(q, k, v, fade, rate, rows.past.paths)
        y = constrain(y, "rows", "length", "heads", None, None)
        if cache is None:
            return y, None
        assert cache.states is not None and cache.inputs is not None
        inputs = caches.taken(mixed, rows.past.last).astype(cache.inputs.dtype)
        return y, cache._replace(
            states=cache.states.at[layer.place].set(states),
            inputs=cache.inputs.at[layer.place].set(inputs),
        )

    def _stepped(
        self,
        mixed: Mixed,
        rate: ByValue,
        fade: ByValue,
        kernel: Float[Array, "s g m"],
        layer: Layer,
        cache: Held,
    ) -> tuple[Float[Array, "N 1 g r o"], Held]:
        """Run one token a row from the cache."""
        assert cache.states is not None and cache.inputs is not None
        inputs = cache.inputs[layer.place].astype(mixed.dtype)
        seen = jnp.concatenate([inputs, mixed], axis=1)  # [N, s, g, m]
        y = jnp.sum(seen.astype(jnp.float32) * kernel[None], axis=1)
        q, k, v = self._parted(y)
        y, states = step(q, k, v, fade[:, 0], rate[:, 0], cache.states[layer.place])
        return y[:, None], cache._replace(
            states=cache.states.at[layer.place].set(states),
            inputs=cache.inputs.at[layer.place].set(seen[:, 1:].astype(cache.inputs.dtype)),
        )


def _earlier(
    x: Mixed, at: Int[Array, "N T"], back: int, prefix_ids: jax.Array | None
) -> Float[Array, "N T g m"]:
    """Return x of the token before each, zero where there is none."""
    if prefix_ids is not None:
        return caches.taken(x, at).astype(jnp.float32)
    # a shift, where a token follows the one before it: gathers are slow on TPUs
    shifted = jnp.pad(x, ((0, 0), (back, 0), (0, 0), (0, 0)))[:, : x.shape[1]]
    return jnp.where((at >= 0)[..., None, None], shifted.astype(jnp.float32), 0)


def _speeds(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, 0.01, 16.0))
