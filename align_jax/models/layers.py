# SPDX-License-Identifier: Apache-2.0
"""The modules a block is made of: linear maps (with their adapters), norms, embeddings.

Parameters are stored in any float type and cast to the compute type where they are used; norms
compute in float32. Each parameter's logical axes and its role are declared where it is made, in a
box that ``Model`` takes off at once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from align_jax.models.config import ModelConfig
from align_jax.models.lora import LoraConfig, with_rows
from align_jax.models.quantize import Quantized, product
from align_jax.models.roles import Role

Init = Callable[[jax.Array, tuple[int, ...]], jax.Array]  # (key, shape) -> float32
Stored = jax.Array | Quantized  # what may stand in a tree of parameters
UNMOVED = 1e-6  # how far from 1 DoRA's factor may be for the rounding of a norm alone

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_fast": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


class Named(flax.struct.PyTreeNode, meta.AxisMetadata):
    """A parameter with its axes' names and its role, while the module is being initialized."""

    value: Any
    names: tuple[str | None, ...] = flax.struct.field(pytree_node=False)
    role: Role = flax.struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> Named:
        return self.replace(value=val)

    def add_axis(self, index: int, params: Mapping[str, Any]) -> Named:
        names = self.names[:index] + (params["name"],) + self.names[index:]
        role = dataclasses.replace(self.role, leading=self.role.leading + 1)
        return self.replace(names=names, role=role)

    def remove_axis(self, index: int, params: Mapping[str, Any]) -> Named:
        names = self.names[:index] + self.names[index + 1 :]
        role = dataclasses.replace(self.role, leading=self.role.leading - 1)
        return self.replace(names=names, role=role)


def normal(std: float) -> Init:
    """Return an initializer: normal with this standard deviation."""
    return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def parameter(
    module: nn.Module,
    name: str,
    init: Init,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    role: Role,
) -> Any:
    """Make or fetch a parameter.

    Fetching takes whatever stands in the tree (an array, or a quantized one that knows how to
    become an array); shapes are checked once, on import.
    """
    if module.is_initializing():
        return module.param(name, lambda key: Named(init(key, shape), axes, role))
    value: Any = module.get_variable("params", name)
    if value is None:
        raise KeyError(f"no parameter {'/'.join((*module.path, name))} in the tree given")
    return value


def array(value: Stored, dtype: jnp.dtype) -> jax.Array:
    """Return a stored parameter in the compute type."""
    return value.astype(dtype)


class Linear(nn.Module):
    """y = x W + b over several axes at once, with an optional low-rank adapter beside the kernel.

    Attributes:
        inputs, outputs: the contracted axes' sizes and the new ones'.
        axes: logical names of (*inputs, *outputs).
        dtype: the compute type.
        role: the kernel's.
        lora: the adapter on this map, if any.
        exact: sum in float32 before rounding, as beside an adapter.
        result: type of y where it is not the compute type: logits are summed and kept in float32.
        tokens: outputs whose weights are trained in rows of their own.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: jnp.dtype
    role: Role
    bias: bool = False
    init_std: float = 0.02
    lora: LoraConfig | None = None
    exact: bool = False
    result: jnp.dtype | None = None
    tokens: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x: Float[Array, "*batch_and_inputs"]) -> Float[Array, "*batch_and_outputs"]:
        count = len(self.inputs)
        shape = self.inputs + self.outputs
        kernel = parameter(self, "kernel", normal(self.init_std), shape, self.axes, self.role)
        if self.tokens:
            shape, axes = (len(self.tokens), *self.inputs), ("rank", *self.axes[:count])
            rows = parameter(self, "rows", normal(self.init_std), shape, axes, Role("adapter"))
            kernel = with_rows(array(kernel, self.dtype), rows, self.tokens, 1)
        # what an adapter adds is small: it is summed with the product before both are rounded
        wide = self.exact or self.lora is not None
        sums = jnp.dtype(jnp.float32) if wide else self.result
        narrow = self.dtype if sums is not None else None
        if isinstance(kernel, Quantized):
            y = product(x, kernel, count, sums, narrow)
        else:
            y = contract(x, array(kernel, self.dtype), count, sums, narrow)
        if self.lora is not None:
            y = self._adapt(self.lora, x, y, kernel)
        elif wide:
            y = self._rounded(y)
        if self.bias:
            names = tuple("norm" if name == "embed" else name for name in self.axes[count:])
            bias = parameter(self, "bias", zeros, self.outputs, names, self.role.vector())
            y = y + _aligned(array(bias, y.dtype), y)
        return y

    def matrix(self) -> Float[Array, "*inputs_and_outputs"]:
        """Return the map as one kernel: in the compute type, with an adapter folded in float32, for
        what the adapter adds would be lost in narrower weights."""

        def stored(name: str, dtype: jnp.dtype) -> jax.Array:
            value: Stored = self.get_variable("params", name)
            return array(value, dtype)

        if self.lora is None:
            return stored("kernel", self.dtype)
        exact = jnp.dtype(jnp.float32)
        kernel, down, up = (stored(name, exact) for name in ("kernel", "lora_a", "lora_b"))
        whole = kernel + self.lora.scale * jnp.tensordot(down, up, axes=1)
        if self.lora.dora:
            norm = column_norm(kernel, down, up, self.lora.scale)
            whole = whole * _aligned(stored("lora_m", exact) / norm, whole)
        return whole

    def _adapt(self, lora: LoraConfig, x: jax.Array, y: jax.Array, kernel: Stored) -> jax.Array:
        """Add to a product in float32 what the adapter makes of x, and round the sum."""
        count = len(self.inputs)
        inward, outward = Role("adapter", inputs=count), Role("adapter", inputs=1)
        bound = 1 / math.sqrt(math.prod(self.inputs))
        shape, axes = (*self.inputs, lora.rank), (*self.axes[:count], "rank")
        down = parameter(self, "lora_a", uniform(bound), shape, axes, inward)
        shape, axes = (lora.rank, *self.outputs), ("rank", *self.axes[count:])
        up = parameter(self, "lora_b", zeros, shape, axes, outward)
        if lora.dropout and self.has_rng("dropout"):
            x = nn.Dropout(lora.dropout)(x, deterministic=False)
        inside = contract(x, array(down, self.dtype), count)
        y = y + lora.scale * contract(inside, array(up, self.dtype), 1, y.dtype, self.dtype)
        if not lora.dora:
            return self._rounded(y)
        axes = self.axes[count:]
        magnitude = parameter(self, "lora_m", ones, self.outputs, axes, outward.vector())
        # the norm is a constant for the gradient (Liu et al. 2024, DoRA, arXiv 2402.09353, section
        # 4.3)
        norm = column_norm(*jax.lax.stop_gradient((kernel, down, up)), lora.scale)
        factor = _aligned(magnitude.astype(jnp.float32) / norm, y)
        held = jax.lax.stop_gradient(factor)
        # one exactly, where it has not moved, in whatever order the squares were summed
        constant = jnp.where(jnp.abs(held - 1) < UNMOVED, 1.0, held)
        # nothing but its gradient, which is taken with the states that are kept in any case
        moved = (factor - held) * jax.lax.stop_gradient(self._rounded(y)).astype(y.dtype)
        return self._rounded(y * constant + moved)

    def _rounded(self, y: jax.Array) -> jax.Array:
        """Round sums to the result's type; a rematerialization policy keeps what is rounded."""
        return checkpoint_name(y.astype(self.result or self.dtype), "sum")


def _aligned(vector: jax.Array, y: jax.Array) -> jax.Array:
    """Give a vector of the last axes the leading axes of y, each of length 1."""
    return jnp.expand_dims(vector, tuple(range(y.ndim - vector.ndim)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def contract(
    x: jax.Array,
    kernel: jax.Array,
    count: int,
    result: jnp.dtype | None = None,
    narrow: jnp.dtype | None = None,
) -> jax.Array:
    """Contract the last ``count`` axes of x with the first of the kernel; ``result`` is the sums'
    type if another, ``narrow`` their gradient's where they are rounded to it afterwards.

    Its gradients are those of the product; on a CPU the kernel's is written so that the narrower of
    the states and of their gradient is transposed.  The compiler would take the latter together
    with what made it, an activation's derivative for instance, element by element across its rows.
    """
    return jnp.tensordot(x, kernel, axes=count, preferred_element_type=result)


def _contract_forward(
    x: jax.Array, kernel: jax.Array, count: int, result: jnp.dtype | None, narrow: jnp.dtype | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # not the function itself: a rematerialization policy is to see the product
    y = jnp.tensordot(x, kernel, axes=count, preferred_element_type=result)
    return y, (x, kernel)


def _contract_backward(
    count: int,
    result: jnp.dtype | None,
    narrow: jnp.dtype | None,
    saved: tuple[jax.Array, jax.Array],
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    if narrow is not None:
        dy, result = dy.astype(narrow), None
    rows, outputs = tuple(range(x.ndim - count)), kernel.ndim - count
    inward = math.prod(kernel.shape[:count]) <= math.prod(kernel.shape[count:])
    product = functools.partial(jax.lax.dot_general, preferred_element_type=result)

    def states_first(x: jax.Array, dy: jax.Array) -> jax.Array:
        return product(x, dy, ((rows, rows), ((), ())))

    def gradient_first(x: jax.Array, dy: jax.Array) -> jax.Array:
        turned = product(dy, x, ((rows, rows), ((), ())))  # [*outputs, *inputs]
        return jnp.moveaxis(turned, range(outputs), range(-outputs, 0))

    over = tuple(range(len(rows), dy.ndim)), tuple(range(count, kernel.ndim))
    dx = product(dy, kernel, (over, ((), ())))
    on_cpu = states_first if inward else gradient_first
    d_kernel = jax.lax.platform_dependent(x, dy, cpu=on_cpu, default=gradient_first)
    return dx.astype(x.dtype), d_kernel.astype(kernel.dtype)


contract.defvjp(_contract_forward, _contract_backward)


@jax.custom_vjp
def rows_product(
    x: Float[Array, "*batch D"], table: Float[Array, "V D"]
) -> Float[Array, "*batch V"]:
    """Return x times each row of a table, summed and kept in float32; the gradient of these sums is
    rounded to the type of x, as ``contract`` rounds with ``narrow``."""
    return jnp.einsum("...d,vd->...v", x, table, preferred_element_type=jnp.float32)


def _rows_forward(x: jax.Array, table: jax.Array) -> tuple[jax.Array, tuple]:
    # not the function itself: a rematerialization policy is to see the product
    y = jnp.einsum("...d,vd->...v", x, table, preferred_element_type=jnp.float32)
    return y, (x, table)


def _rows_backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple:
    x, table = saved
    dy = dy.astype(x.dtype)
    return jnp.einsum("...v,vd->...d", dy, table), jnp.einsum("...v,...d->vd", dy, x)


rows_product.defvjp(_rows_forward, _rows_backward)


def column_norm(kernel: Stored, down: jax.Array, up: jax.Array, scale: float) -> jax.Array:
    """Return the norm over the inputs of W + scale * A B, float32 [*outputs], without making that
    matrix.

    ||W + s A B||² = ||W||² + 2 s <Aᵀ W, B> + s² <Aᵀ A B, B>, for each output; the products run over
    the inputs, the inner products over the rank.
    """
    kernel, down, up = (value.astype(jnp.float32) for value in (kernel, down, up))
    inputs = tuple(range(down.ndim - 1))
    seen = jnp.tensordot(down, kernel, axes=(inputs, inputs))  # A^T W [r, *outputs]
    gram = jnp.tensordot(down, down, axes=(inputs, inputs))  # A^T A [r, r]
    cross = jnp.sum((2 * scale * seen + scale**2 * jnp.tensordot(gram, up, axes=1)) * up, axis=0)
    return jnp.sqrt(
        jnp.maximum(jnp.sum(jnp.square(kernel), axis=inputs) + cross, jnp.finfo(jnp.float32).tiny)
    )


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Initialize with zeros."""
    return jnp.zeros(shape, jnp.float32)


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Initialize with ones."""
    return jnp.ones(shape, jnp.float32)


def uniform(bound: float) -> Init:
    """Return an initializer: uniform in [-bound, bound]."""
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def scaleless_norm(x: jax.Array, eps: float, over: tuple[int, ...] = (-1,)) -> jax.Array:
    """Return x over its root mean square along some axes, computed in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=over, keepdims=True) + eps)
    return y.astype(x.dtype)


class Norm(nn.Module):
    """RMS or layer norm over the last axes, in float32.

    Attributes:
        shape: the normalized axes' sizes.
        kind: "rms", "layer" (centered, with a bias) or "centered" (without).
        eps: added to the mean square.
        offset: the scale is stored minus one (Gemma).
        dtype: of the result.
        axes: logical names of ``shape``.
    """

    shape: tuple[int, ...]
    kind: str
    eps: float
    offset: bool
    dtype: jnp.dtype
    axes: tuple[str, ...] = ("norm",)

    @nn.compact
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        over, role = tuple(range(-len(self.shape), 0)), Role("norm", matrix=False)
        init = zeros if self.offset else ones
        scale = parameter(self, "scale", init, self.shape, self.axes, role).astype(jnp.float32)
        y = x.astype(jnp.float32)
        if self.kind != "rms":
            y = y - jnp.mean(y, axis=over, keepdims=True)
        y = scaleless_norm(y, self.eps, over)
        y = y * _aligned(scale + 1 if self.offset else scale, y)
        if self.kind == "layer":
            bias = parameter(self, "bias", zeros, self.shape, self.axes, role)
            y = y + _aligned(bias.astype(jnp.float32), y)
        return y.astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class Options:
    """How a model is computed, beside what it is: see ``models.model.build``."""

    dtype: jnp.dtype
    remat: str
    attention: str
    lora: LoraConfig | None
    beside: LoraConfig | None
    heads: tuple[str, ...]
    unembed: bool
    dropout: float


def linear(
    config: ModelConfig,
    options: Options,
    target: str,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    axes: tuple[str | None, ...],
    bias: bool,
    part: str = "linear",
) -> Linear:
    """Make a linear map of the layers, with its adapter if it gets one; ``target``'s end is its
    name, ``part`` its role's."""
    role = Role(part, len(inputs), target=target)
    lora, beside = (one.on(target) if one else None for one in (options.lora, options.beside))
    name = target.split("/")[-1]
    std, dtype, exact = config.init_std, options.dtype, beside is not None
    return Linear(inputs, outputs, axes, dtype, role, bias, std, lora, exact, name=name)
