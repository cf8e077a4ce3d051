# SPDX-License-Identifier: Apache-2.0
"""Scalar heads on the hidden states: rewards and values, computed in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from align_jax.models.layers import contract, normal, parameter, zeros
from align_jax.models.roles import Role

KERNEL = Role("head", inputs=1)


class Dense(nn.Module):
    """A linear map in float32.

    Attributes:
        inputs, outputs: sizes.
        axes: their logical names.
        std: standard deviation of the kernel as it is drawn.
    """

    inputs: int
    outputs: int
    axes: tuple[str, str]
    bias: bool
    std: float

    @nn.compact
    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        shape = (self.inputs, self.outputs)
        kernel = parameter(self, "kernel", normal(self.std), shape, self.axes, KERNEL)
        y = contract(x, kernel.astype(jnp.float32), 1)
        if self.bias:
            bias = parameter(self, "bias", zeros, shape[1:], self.axes[1:], KERNEL.vector())
            y = y + jnp.expand_dims(bias.astype(jnp.float32), tuple(range(y.ndim - 1)))
        return y


class Linear(nn.Module):
    """hidden -> scalar by one linear map.

    Drawn with standard deviation 1 / sqrt(D + 1), as Stiennon et al. 2020 (arXiv 2009.01325) do.
    """

    hidden_size: int
    bias: bool

    @nn.compact
    def __call__(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
        D = self.hidden_size
        out = Dense(D, 1, ("embed", "score"), self.bias, (D + 1) ** -0.5, name="out")
        return out(hidden.astype(jnp.float32))[..., 0]


class Mlp(nn.Module):
    """hidden -> scalar by three layers; no gradient flows into the decoder (HALOs' value head)."""

    hidden_size: int

    @nn.compact
    def __call__(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
        D, std = self.hidden_size, self.hidden_size**-0.5
        x = jax.lax.stop_gradient(hidden.astype(jnp.float32))
        x = jax.nn.relu(Dense(D, D, ("embed", "ffn"), True, std, name="first")(x))
        x = jax.nn.relu(Dense(D, D, ("ffn", "embed"), True, std, name="second")(x))
        return Dense(D, 1, ("embed", "score"), True, std, name="out")(x)[..., 0]


def score(hidden_size: int, name: str) -> nn.Module:
    """Make a reward model's head: a linear map without bias, as transformers' classifiers have."""
    return Linear(hidden_size, False, name=name)


def value(hidden_size: int, name: str) -> nn.Module:
    """Make a linear value head, with bias."""
    return Linear(hidden_size, True, name=name)


def value_mlp(hidden_size: int, name: str) -> nn.Module:
    """Make HALOs' value head."""
    return Mlp(hidden_size, name=name)


HEADS: Mapping[str, Callable[[int, str], nn.Module]] = {
    "score": score,
    "value": value,
    "value_mlp": value_mlp,
}
