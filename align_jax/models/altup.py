# SPDX-License-Identifier: Apache-2.0
"""Several residual streams side by side, of which a layer computes one (alternating updates), and
the low-rank branch beside its attention.

    embedding -> opened -> [ predict -> the layer, of the active stream -> correct ] x L -> closed

References:
    Baykal et al. 2023, Alternating Updates for Efficient Transformers (arXiv 2301.13310); Menghani
    et al. 2024, LAuReL (arXiv 2411.07501), section 2.2; as Gemma 3n has them (transformers 5,
    ``Gemma3nTextAltUp``, ``Gemma3nTextLaurelBlock``).
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from align_jax.models.config import ModelConfig, Streams
from align_jax.models.layers import Norm, Options, array, linear, parameter, zeros
from align_jax.models.roles import Role
from align_jax.parallel.sharding import constrain

State = Float[Array, "N T D"]
Side = Float[Array, "P N T D"]  # P states side by side
LEAST = 1e-5  # mean square of a stream as it is scaled, at least
_AXES = (None, "rows", "length", "features")


def _streams(config: ModelConfig) -> Streams:
    assert config.streams is not None  # who has one alone makes no module of these
    return config.streams


def _norm(config: ModelConfig, options: Options) -> Norm:
    shape = (config.hidden_size,)
    return Norm(shape, config.norm, config.norm_eps, config.norm_offset, options.dtype)


class AltUp(nn.Module):
    """What a layer makes of the streams before and after it: mixtures whose factors follow from
    the active one, token by token.

        predicted_b = x_b + sum_a f_ba(x_active) x_a
        corrected_b = predicted_b + (1 + g_b(y)) (y - predicted_active)

    where y is what the layer makes of predicted_active.
    """

    config: ModelConfig
    options: Options

    def setup(self) -> None:
        c, o = self.config, self.options
        P, D = (_streams(c).count,), (c.hidden_size,)
        self.norm = _norm(c, o)
        few = (None, None)
        self.router = linear(c, o, "altup/router", D, P, ("embed", None), False, "router")
        squares = (P[0] * P[0],)
        self.prediction = linear(c, o, "altup/prediction", P, squares, few, False, "router")
        self.correction = linear(c, o, "altup/correction", P, P, few, False, "router")
        # without it in use, it is there all the same
        self.scale = parameter(self, "scale", zeros, D, ("norm",), Role("norm", matrix=False))

    def _routed(self, x: State) -> Float[Array, "N T P"]:
        """Return what the mixtures' factors are made from."""
        scaled = self.norm(x) * jnp.asarray(1 / self.config.hidden_size, self.options.dtype)
        return jnp.tanh(self.router(scaled).astype(jnp.float32)).astype(self.options.dtype)

    def predict(self, x: Side) -> Side:
        """Predict the streams behind the layer."""
        streams = _streams(self.config)
        factors = self.prediction(self._routed(x[streams.active]))
        factors = factors.reshape(*factors.shape[:-1], streams.count, streams.count)
        factors = jnp.moveaxis(factors, (-2, -1), (0, 1))  # [N, T, b, a] -> [b, a, N, T]
        # no product of matrices: those of each token are too small for one
        mixed = jnp.sum(factors[..., None] * x[None], axis=1)
        return constrain(x + mixed, *_AXES)

    def correct(self, predicted: Side, y: State) -> Side:
        """Correct them by what the layer made of the active one."""
        factors = 1 + jnp.moveaxis(self.correction(self._routed(y)), -1, 0)
        wrong = y - predicted[_streams(self.config).active]
        return constrain(predicted + factors[..., None] * wrong[None], *_AXES)

    def active(self, x: Side) -> State:
        """Return the active stream as a token's own inputs are gated by it."""
        streams = _streams(self.config)
        chosen = x[streams.active]
        if not streams.scaled:
            return chosen
        return chosen * array(self.scale, self.options.dtype)[None, None]


class Ends(nn.Module):
    """What makes the streams of the embedding, and one state of them: of each but the first a
    linear map, as large as the first."""

    config: ModelConfig
    options: Options

    def setup(self) -> None:
        c, o = self.config, self.options
        D, axes, further = (c.hidden_size,), ("embed", "ffn"), range(1, _streams(c).count)
        self.opening = [linear(c, o, f"streams/open{n}", D, D, axes, False) for n in further]
        self.closing = [linear(c, o, f"streams/close{n}", D, D, axes, False) for n in further]

    def opened(self, x: State) -> Side:
        """Return the streams before the first layer."""
        return constrain(jnp.stack([x, *(_as_large(of(x), x) for of in self.opening)]), *_AXES)

    def closed(self, x: Side) -> State:
        """Return the mean of the streams behind the last layer."""
        made = [_as_large(of(one), x[0]) for of, one in zip(self.closing, x[1:])]
        return constrain(jnp.mean(jnp.stack([x[0], *made]), axis=0), *_AXES[1:])


def _as_large(x: State, like: State) -> State:
    """Scale each state to the root mean square of another, computed in float32."""
    x32, like32 = x.astype(jnp.float32), like.astype(jnp.float32)
    own, wanted = (jnp.mean(jnp.square(y), axis=-1, keepdims=True) for y in (x32, like32))
    # the root of zero has no gradient
    wanted = jnp.maximum(wanted, jnp.finfo(jnp.float32).tiny)
    return (x32 * jnp.sqrt(wanted / jnp.maximum(own, LEAST))).astype(x.dtype)


class Laurel(nn.Module):
    """A learned residual: the states, and a map of low rank of them, normalized."""

    config: ModelConfig
    options: Options

    @nn.compact
    def __call__(self, x: State) -> State:
        c, o = self.config, self.options
        D, rank = (c.hidden_size,), (c.laurel_rank,)
        y = linear(c, o, "laurel/left", D, rank, ("embed", "latent"), False)(x)
        y = linear(c, o, "laurel/right", rank, D, ("latent", "embed"), False)(y)
        return x + _norm(c, o).copy(name="norm")(y)
