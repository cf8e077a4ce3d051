# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters: what they are, where they go, and the trees of trained and frozen parameters.

An adapter's parameters (``lora_a``, ``lora_b``, and DoRA's ``lora_m``) stand beside the ``kernel``
they adapt, so the policy's tree is the frozen base with the trained leaves laid over it:
``merge(base, trainable)``.

    y = x W + scale * (x A) B

References:
    Hu et al. 2021, LoRA (arXiv 2106.09685); Kalajdzievski 2023, rsLoRA (arXiv 2312.03732); Liu et
    al. 2024, DoRA (arXiv 2402.09353), equation 5.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from align_jax.models.quantize import Quantized
from align_jax.models.roles import Role

Tree = Mapping[str, Any]

ATTENTION_AND_MLP = "attention/.*|mlp/.*"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """An adapter on the linear maps whose names match.

    Attributes:
        rank: width of the bottleneck.
        alpha: the adapter's output is scaled by alpha / rank (rank-stabilized: alpha / sqrt(rank)).
        dropout: on the adapter's input, in training.
        targets: regular expression matched in full against "attention/query", "attention/key",
            "attention/value", "attention/output", "mlp/gate", "mlp/up", "mlp/down"; and where an
            expert takes every token "shared/gate", "shared/up", "shared/down"; of latent attention
            "attention/query_a", "attention/query_b", "attention/key_value_a" and "_b".
        rank_stabilized: rsLoRA.
        dora: train each output's magnitude beside the direction.
    """

    rank: int
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str = ATTENTION_AND_MLP
    rank_stabilized: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(
                f"LoRA rank must be at least 1, got {self.rank} (for a full fine-tune leave it out)"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout must be in [0, 1), got {self.dropout}")

    @property
    def scale(self) -> float:
        """The factor on the adapter's output."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def on(self, name: str) -> LoraConfig | None:
        """Return the adapter for the linear map of this name, or None."""
        return self if re.fullmatch(self.targets, name) else None


def merge(base: Tree, trainable: Tree) -> dict[str, Any]:
    """Lay one nested dict over another: the trainable leaves win, the rest is the base's.

    Raises:
        ValueError: a leaf on one side is a dict on the other.
    """
    out = dict(base)
    for key, value in trainable.items():
        inner = isinstance(value, Mapping)
        if key in base and inner != isinstance(base[key], Mapping):
            raise ValueError(
                f"cannot merge parameter trees: {key!r} is a leaf in one and a subtree in the other"
            )
        out[key] = merge(base.get(key, {}), value) if inner else value
    return out


def check_targets(lora: LoraConfig, roles: Iterable[Role]) -> None:
    """Check that an adapter's pattern matches linear maps of the model.

    Args:
        lora: the adapter's configuration.
        roles: of the model's parameters.

    Raises:
        ValueError: it matches none, or experts, which take no adapter.
    """
    targets = {role.target: role.part for role in roles if role.target}
    matched = sorted(name for name in targets if lora.on(name))
    if refused := [name for name in matched if targets[name] == "expert"]:
        raise ValueError(
            f"LoRA targets {lora.targets!r} match {', '.join(refused)}, but experts take no "
            "adapter; adapt the attention: 'attention/.*'"
        )
    if not matched:
        known = sorted(name for name, part in targets.items() if part != "expert")
        raise ValueError(f"LoRA targets {lora.targets!r} match none of {known}")


def fresh(key: jax.Array, shapes: Tree, base: Tree) -> dict[str, Any]:
    """Return an untrained adapter: A uniform in +-1/sqrt(inputs), B zero, magnitudes the base's
    column norms.

    Args:
        key: random key.
        shapes: the adapted model's tree of shapes and types; the base lacks its heads.
        base: the base's parameters (read for DoRA's magnitudes only).
    """
    out = {}
    for index, (name, node) in enumerate(sorted(shapes.items())):
        if not isinstance(node, Mapping):
            continue
        inner = (
            _pair(jax.random.fold_in(key, index), node, base[name])
            if "lora_a" in node
            else fresh(jax.random.fold_in(key, index), node, base.get(name, {}))
        )
        if inner:
            out[name] = inner
    return out


def _pair(key: jax.Array, shapes: Tree, base: Tree) -> dict[str, jax.Array]:
    a, b = shapes["lora_a"], shapes["lora_b"]
    bound = 1 / math.sqrt(math.prod(a.shape[1:-1]))  # axis 0 is the layers
    pair = {
        "lora_a": jax.random.uniform(key, a.shape, a.dtype, -bound, bound),
        "lora_b": jnp.zeros(b.shape, b.dtype),
    }
    if "lora_m" in shapes:
        inputs = tuple(range(1, a.ndim - 1))
        kernel = base["kernel"].astype(jnp.float32)
        pair["lora_m"] = jnp.sqrt(jnp.sum(jnp.square(kernel), axis=inputs)).astype(
            shapes["lora_m"].dtype
        )
    return pair


LEAVES = ("lora_a", "lora_b", "lora_m")


def fold(params: Tree, lora: LoraConfig) -> dict[str, Any]:
    """Merge an adapter into the kernels that it stands beside.

    W + scale * A B, with DoRA m * (W + scale * A B) / ||W + scale * A B||; in float32, one layer at
    a time, and back in the kernel's own type and place.  A quantized base becomes what it stands
    for: the adapter was trained on that.

    Args:
        params: the policy's tree: the base with the adapter's leaves laid over it.
        lora: the adapter's configuration.

    Returns:
        The tree without adapter leaves and without codes.
    """
    out = {}
    for name, node in params.items():
        if not isinstance(node, Mapping):
            out[name] = (
                jax.jit(lambda x: x.astype(x.dtype))(node) if isinstance(node, Quantized) else node
            )
        elif "lora_a" in node:
            rest = {key: value for key, value in node.items() if key not in LEAVES}
            out[name] = rest | {"kernel": _folded(node, lora.scale)}
        else:
            out[name] = fold(node, lora)
    return out


def _folded(node: Tree, scale: float) -> jax.Array:
    kernel = node["kernel"]

    def layer(leaves: Tree) -> jax.Array:
        stored = leaves["kernel"].astype(jnp.float32)
        down, up = leaves["lora_a"].astype(jnp.float32), leaves["lora_b"].astype(jnp.float32)
        merged = stored + scale * jnp.tensordot(down, up, axes=1, precision="highest")
        if "lora_m" in leaves:
            inputs = tuple(range(down.ndim - 1))
            norm = jnp.sqrt(jnp.sum(jnp.square(merged), axis=inputs))
            factor = leaves["lora_m"].astype(jnp.float32) / norm
            merged = merged * jnp.expand_dims(factor, inputs)
        return merged.astype(kernel.dtype)

    leaves = {key: node[key] for key in ("kernel", *LEAVES) if key in node}
    place = None if isinstance(kernel, Quantized) else kernel.sharding
    return jax.jit(lambda leaves: jax.lax.map(layer, leaves), out_shardings=place)(leaves)
