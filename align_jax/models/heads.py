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

    hidden_size: int
    bias: bool

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        std = (self.hidden_size + 1) ** -0.5
        return Dense(self.hidden_size, 1, ("embed", "score"), self.bias, std, name="out")(
            hidden.astype(jnp.float32)
        )[..., 0]


class Mlp(nn.Module):
    """hidden -> scalar by three layers; no gradient flows into the decoder (HALOs' value head)."""

    hidden_size: int

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        std = self.hidden_size**-0.5
        x = jax.lax.stop_gradient(hidden.astype(jnp.float32))
        x = jax.nn.relu(
            Dense(self.hidden_size, self.hidden_size, ("embed", "ffn"), True, std, name="first")(x)
        )
        x = jax.nn.relu(
            Dense(self.hidden_size, self.hidden_size, ("ffn", "embed"), True, std, name="second")(x)
        )
        return Dense(self.hidden_size, 1, ("embed", "score"), True, std, name="out")(x)[..., 0]


HEADS: Mapping[str, nn.Module] = {
    "score": lambda hidden_size, name: Linear(hidden_size, False, name=name),
    "value": lambda hidden_size, name: Linear(hidden_size, True, name=name),
    "value_mlp": lambda hidden_size, name: Mlp(hidden_size, name=name),
}
