# SPDX-License-Identifier: Apache-2.0
"""Scalar heads on the hidden states: rewards and values, computed in float32."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from align_jax.models.layers import contract, normal, parameter, zeros


class Dense(nn.Module):
    """A linear map in float32."""

    inputs: int
    outputs: int
    axes: tuple[str, str]
    bias: bool
    std: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = parameter(self, "kernel", normal(self.std), (self.inputs, self.outputs), self.axes)
        y = contract(x, kernel.astype(jnp.float32), 1)
        if self.bias:
            bias = parameter(self, "bias", zeros, (self.outputs,), (self.axes[1],)).astype(
                jnp.float32
            )
            y = y + jnp.expand_dims(bias, tuple(range(y.ndim - 1)))
        return y


class Linear(nn.Module):
    """hidden -> scalar by one linear map.

    Drawn with standard deviation 1 / sqrt(D + 1), as Stiennon et al. 2020 (arXiv 2009.01325) do.
    """

    width: int
    bias: bool

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        std = (self.width + 1) ** -0.5
        return Dense(self.width, 1, ("embed", "score"), self.bias, std, name="out")(
            hidden.astype(jnp.float32)
        )[..., 0]


class Mlp(nn.Module):
    """hidden -> scalar by three layers; no gradient flows into the decoder (HALOs' value head)."""

    width: int

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        std = self.width**-0.5
        x = jax.lax.stop_gradient(hidden.astype(jnp.float32))
        x = jax.nn.relu(Dense(self.width, self.width, ("embed", "ffn"), True, std, name="first")(x))
        x = jax.nn.relu(
            Dense(self.width, self.width, ("ffn", "embed"), True, std, name="second")(x)
        )
        return Dense(self.width, 1, ("embed", "score"), True, std, name="out")(x)[..., 0]


HEADS: Mapping[str, nn.Module] = {
    "score": lambda width, name: Linear(width, False, name=name),
    "value": lambda width, name: Linear(width, True, name=name),
    "value_mlp": lambda width, name: Mlp(width, name=name),
}
