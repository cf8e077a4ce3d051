# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters: what they are, where they go, and the trees of trained and frozen parameters.

An adapter's parameters (``lora_a``, ``lora_b``, and DoRA's ``lora_m``) stand beside the ``kernel``
they adapt, so the policy's tree is the frozen base with the trained leaves laid over it:
``merge(base, trainable)``.

    y = x W + scale * (x A) B

Beside A and B may stand what is trained whole: parameters of the base, and rows of its embedding
and its head, of tokens that are new.

References:
    Hu et al. 2021, LoRA (arXiv 2106.09685); Kalajdzievski 2023, rsLoRA (arXiv 2312.03732); Liu et
    al. 2024, DoRA (arXiv 2402.09353), equation 5.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from align_jax.models.quantize import Quantized
from align_jax.models.roles import Role

Tree = Mapping[str, Any]

ATTENTION_AND_MLP = "attention/.*|delta/.*|mlp/.*"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """An adapter on the linear maps whose names match.

    Attributes:
        rank: width of the bottleneck.
        alpha: the adapter's output is scaled by alpha / rank (rank-stabilized: alpha / sqrt(rank)).
        dropout: on the adapter's input, in training.
        targets: regular expression matched in full against "attention/query", "attention/key",
            "attention/value", "attention/output", "mlp/gate", "mlp/up", "mlp/down"; where an expert
            takes every token "shared/gate", "shared/up", "shared/down"; of latent attention
            "attention/query_a", "attention/query_b", "attention/key_value_a" and "_b"; of a layer
            with a state "delta/mixed", "delta/gates" (or "delta/query", "delta/key", "delta/value",
            "delta/output_gate", "delta/rate", "delta/fade"), "delta/output"; of inputs of a layer's
            own "token/gate", "token/up" and "token_inputs/projection"; of several residual streams
            "altup/router", "altup/prediction", "altup/correction", "streams/open1" and on,
            "streams/close1" and on, and "laurel/left", "laurel/right"; and "embed" (of a tied model
            the head too), "output".
        rank_stabilized: rsLoRA.
        dora: train each output's magnitude beside the direction.
        whole: paths of the base's parameters that are trained whole beside the adapter.
        replaced: paths of the base's parameters, not trained, in whose place others came with the
            adapter, for the policy and its reference.
        tokens: ids whose rows of the embedding (of a tied model the head's too) are trained.
        head_tokens: the same of a head that is not tied.
        untied: adapt embedding and head of a tied model apart: its config is then
            ``ModelConfig.untied``.
    """

    rank: int
    alpha: float = 16.0
    dropout: float = 0.0
    targets: str = ATTENTION_AND_MLP
    rank_stabilized: bool = False
    dora: bool = False
    whole: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    head_tokens: tuple[int, ...] = ()
    untied: bool = False

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
        ValueError: it matches none, or experts, which take no adapter; DoRA on the embedding, an
            adapter on it beside rows of it.
    """
    targets = {role.target: role.part for role in roles if role.target}
    matched = sorted(name for name in targets if lora.on(name))
    if refused := [name for name in matched if targets[name] == "expert"]:
        others = sorted({name.split("/")[0] for name, part in targets.items() if part == "linear"})
        raise ValueError(
            f"LoRA targets {lora.targets!r} match {', '.join(refused)}, but experts take no "
            f"adapter; adapt the rest of the layers: '{'|'.join(f'{part}/.*' for part in others)}'"
        )
    if lora.dora and "embed" in matched:
        raise ValueError(
            f"LoRA targets {lora.targets!r} match embed, which DoRA does not adapt; name the others"
        )
    if lora.tokens and "embed" in matched or lora.head_tokens and "output" in matched:
        raise ValueError(
            f"LoRA targets {lora.targets!r} match what has rows of its own (tokens, head_tokens): "
            "train the rows or adapt the whole"
        )
    if not matched:
        known = sorted(name for name, part in targets.items() if part != "expert")
        raise ValueError(f"LoRA targets {lora.targets!r} match none of {known}")


def fresh(key: jax.Array, shapes: Tree, base: Tree, lora: LoraConfig) -> dict[str, Any]:
    """Return an untrained adapter: A uniform in +-1/sqrt(inputs), B zero, magnitudes the base's
    column norms, rows the base's; on an embedding A zero, B normal, as PEFT has it.

    Args:
        key: random key.
        shapes: the adapted model's tree of shapes and types; the base lacks its heads.
        base: the base's parameters (read for DoRA's magnitudes and for rows only).
        lora: the adapter's configuration.
    """
    out = {}
    for index, (name, node) in enumerate(sorted(shapes.items())):
        if not isinstance(node, Mapping):
            continue
        own = jax.random.fold_in(key, index)
        if "lora_a" in node:
            inner = _pair(own, node, base[name])
        elif "rows" in node:
            inner = {"rows": _rows(base[name], lora).astype(node["rows"].dtype)}
        else:
            inner = fresh(own, node, base.get(name, {}), lora)
        if inner:
            out[name] = inner
    return out


def _rows(node: Tree, lora: LoraConfig) -> jax.Array:
    """Return the rows of an embedding or a head that are trained, as they are."""
    if "tokens" in node:
        return node["tokens"][jnp.asarray(lora.tokens)]
    return node["kernel"].T[jnp.asarray(lora.head_tokens)]


def with_rows(kernel: jax.Array, rows: jax.Array, ids: tuple[int, ...], axis: int) -> jax.Array:
    """Put trained rows in their places.

    Args:
        kernel: an embedding [V, D], or a head [D, V].
        rows: [number of ids, D], in any type.
        ids: the rows' tokens.
        axis: V's.
    """
    at = jnp.asarray(ids)
    rows = rows.astype(kernel.dtype)
    return kernel.at[at].set(rows) if axis == 0 else kernel.at[:, at].set(rows.T)


def _pair(key: jax.Array, shapes: Tree, base: Tree) -> dict[str, jax.Array]:
    a, b = shapes["lora_a"], shapes["lora_b"]
    if "tokens" in shapes:
        return {
            "lora_a": jnp.zeros(a.shape, a.dtype),
            "lora_b": jax.random.normal(key, b.shape, b.dtype),
        }
    layers = len(a.shape) + len(b.shape) - 2 - len(shapes["kernel"].shape)  # axes of them
    bound = 1 / math.sqrt(math.prod(a.shape[layers:-1]))
    pair = {
        "lora_a": jax.random.uniform(key, a.shape, a.dtype, -bound, bound),
        "lora_b": jnp.zeros(b.shape, b.dtype),
    }
    if "lora_m" in shapes:
        inputs = tuple(range(layers, a.ndim - 1))
        kernel = base["kernel"].astype(jnp.float32)
        pair["lora_m"] = jnp.sqrt(jnp.sum(jnp.square(kernel), axis=inputs)).astype(
            shapes["lora_m"].dtype
        )
    return pair


LEAVES = ("lora_a", "lora_b", "lora_m")


def fold(params: Tree, lora: LoraConfig) -> dict[str, Any]:
    """Merge an adapter into the kernels that it stands beside, and rows into their tables.

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
            kernel = "tokens" if "tokens" in node else "kernel"
            rest = {key: value for key, value in node.items() if key not in LEAVES}
            out[name] = rest | {kernel: _folded(node, kernel, lora.scale)}
        elif "rows" in node:
            out[name] = _with_rows(node, lora)
        else:
            out[name] = fold(node, lora)
    return out


def _with_rows(node: Tree, lora: LoraConfig) -> dict[str, Any]:
    name = "tokens" if "tokens" in node else "kernel"
    kernel, rest = node[name], {key: value for key, value in node.items() if key != "rows"}
    ids, axis = (lora.tokens, 0) if name == "tokens" else (lora.head_tokens, 1)
    put = jax.jit(with_rows, static_argnums=(2, 3), out_shardings=kernel.sharding)
    return rest | {name: put(kernel, node["rows"], ids, axis)}


def _folded(node: Tree, name: str, scale: float) -> jax.Array:
    kernel = node[name]
    stacked = node["lora_a"].ndim + node["lora_b"].ndim - 2 > kernel.ndim
    leaves = {key: node[key] for key in (name, *LEAVES) if key in node}
    place = None if isinstance(kernel, Quantized) else kernel.sharding
    return _folding(name, scale, stacked, kernel.dtype, place)(leaves)


@functools.lru_cache
def _folding(
    name: str, scale: float, stacked: bool, dtype: Any, place: Any
) -> Callable[[Tree], jax.Array]:
    """Make what folds the leaves of a module: compiled once for all modules of its shapes."""

    def layer(leaves: Tree) -> jax.Array:
        stored = leaves[name].astype(jnp.float32)
        down, up = leaves["lora_a"].astype(jnp.float32), leaves["lora_b"].astype(jnp.float32)
        merged = stored + scale * jnp.tensordot(down, up, axes=1, precision="highest")
        if "lora_m" in leaves:
            inputs = tuple(range(down.ndim - 1))
            norm = jnp.sqrt(jnp.sum(jnp.square(merged), axis=inputs))
            factor = leaves["lora_m"].astype(jnp.float32) / norm
            merged = merged * jnp.expand_dims(factor, inputs)
        return merged.astype(dtype)

    def every(leaves: Tree) -> jax.Array:
        return jax.lax.map(layer, leaves) if stacked else layer(leaves)

    return jax.jit(every, out_shardings=place)
