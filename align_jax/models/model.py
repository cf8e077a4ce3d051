# SPDX-License-Identifier: Apache-2.0
"""A model as the rest of the code sees it: pure functions over nested dicts.

model = build(config, compute_dtype="bfloat16", remat="full")
params = model.init(key)
hidden, aux = model.hidden(params, tokens, segment_ids, positions)
logits = model.unembed(params, hidden)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from align_jax.core.choose import choose
from align_jax.core.tree import flatten, unflatten
from align_jax.models import attention as attentions
from align_jax.models import cache as caches
from align_jax.models import lora as loras
from align_jax.models.cache import Cache, Held
from align_jax.models.config import ModelConfig
from align_jax.models.heads import HEADS
from align_jax.models.layers import Named, Options
from align_jax.models.transformer import REMAT, Decoder
from align_jax.parallel.sharding import spread

Params = Mapping[str, Any]
Aux = Mapping[str, Array]


# how a model is computed says nothing of its parameters: traced once for all that differ in it
_PLAINLY: dict[str, Any] = dict(
    dtype=jnp.dtype("float32"), remat="none", attention="xla", beside=None, dropout=0.0
)


@functools.lru_cache
def _boxed(config: ModelConfig, options: Options) -> dict[str, Named]:
    """Return every parameter by its path, in the box that says its shape, its axes and its role."""
    init = functools.partial(Decoder(config, options).init, method="everything")
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    tree = jax.eval_shape(init, jax.random.key(0), ids)["params"]
    return flatten(tree)


def _is_box(node: Any) -> bool:
    return isinstance(node, Named)


@dataclasses.dataclass(frozen=True)
class Model:
    """Pure functions of one decoder.

    Attributes:
        config: what it is.
        options: how it is computed.
    """

    config: ModelConfig
    options: Options

    @property
    def _module(self) -> Decoder:
        return Decoder(self.config, self.options)

    def _apply(self, params: Params, method: str, *args: Any, **keywords: Any) -> Any:
        return self._module.apply({"params": params}, *args, method=method, **keywords)

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> dict[str, Any]:
        """Return random parameters (normal, the config's initializer_range) as nested dicts.

        Args:
            key: random key.
            dtype: the parameters' type.
        """
        boxed = self._module.init(key, jnp.zeros((1, 1), jnp.int32), method="everything")["params"]
        return jax.tree.map(lambda box: box.value.astype(dtype), boxed, is_leaf=_is_box)

    def _each(self, read: Callable[[Named], Any]) -> dict[str, Any]:
        boxes = _boxed(self.config, dataclasses.replace(self.options, **_PLAINLY))
        return unflatten({path: read(box) for path, box in boxes.items()})

    def axes(self) -> dict[str, Any]:
        """Return the tree of tuples of logical axis names, parallel to the parameters."""
        return self._each(lambda box: box.names)

    def roles(self) -> dict[str, Any]:
        """Return the tree of ``Role``, parallel to the parameters."""
        return self._each(lambda box: box.role)

    def shapes(self, dtype: Any = jnp.float32) -> dict[str, Any]:
        """Return the parameters' shapes as a tree of jax.ShapeDtypeStruct."""
        dtype = jnp.dtype(dtype)
        return self._each(lambda box: jax.ShapeDtypeStruct(box.value.shape, dtype))

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "N T"],
        segment_ids: Int[Array, "N T"],
        positions: Int[Array, "N T"],
        prefix_ids: Int[Array, "N T"] | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Float[Array, "N T D"], Aux]:
        """Return the states after the final norm, in the compute type.

        Args:
            params: nested dict (the base, or the base with adapters laid over it).
            tokens, segment_ids, positions, prefix_ids: as in core.schema.Batch.
            dropout_key: turns on what dropout the options ask for.

        Returns:
            hidden; and of a mixture of experts the routing's sums (``moe.balance``) over all
            layers, else nothing.
        """
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        return self._apply(params, "hidden", tokens, segment_ids, positions, prefix_ids, rngs=rngs)

    def unembed(self, params: Params, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Return the logits, float32, soft cap included; lowest float32 for padded rows of the
        vocabulary."""
        return self._apply(params, "unembed", hidden)

    def unembedding(
        self, params: Params
    ) -> Callable[[Float[Array, "N c D"]], Float[Array, "N c V"]]:
        """Return ``unembed`` for a loop over chunks of all rows: its weights are gathered once for
        all its turns.

        Their gradient is added up in the parameters' type on each device and summed over the
        devices after the loop.
        """
        path, axes = (
            ("embed/tokens", ("vocab", "features"))
            if self.config.tied
            else ("output/kernel", ("features", "vocab"))
        )
        kernel = flatten(params)[path]
        copies = spread(kernel.astype(self.options.dtype), *axes).astype(kernel.dtype)
        if copies.shape[0] == 1:
            return lambda hidden: self.unembed(params, hidden)
        module = path.split("/")[0]
        rest = flatten({module: params[module]})
        one = jax.vmap(
            lambda kernel, hidden: self.unembed(unflatten({**rest, path: kernel}), hidden)
        )

        def unembed(hidden: Float[Array, "N c D"]) -> Float[Array, "N c V"]:
            logits = one(copies, hidden.reshape(copies.shape[0], -1, *hidden.shape[1:]))
            return logits.reshape(*hidden.shape[:-1], -1)

        return unembed

    def head(
        self, params: Params, name: str, hidden: Float[Array, "*batch D"]
    ) -> Float[Array, "*batch"]:
        """Return a scalar head's output ("score" or "value"), float32.

        Raises:
            KeyError: a head that the model was not built with.
        """
        if name not in self.options.heads:
            raise KeyError(f"the model was built with heads {self.options.heads}, not {name!r}")
        return self._apply(params, "head", name, hidden)

    def init_cache(self, rows: int, length: int, dtype: Any = None) -> Cache:
        """Return an empty cache for ``rows`` rows of up to ``length`` tokens (type: the compute
        type; of states float32).

        Where every layer has a window, it has no more slots than the longest of these.
        """
        c, dtype = self.config, dtype or self.options.dtype
        length = caches.slots(c.windows, length)

        def slots(kept: str, config: ModelConfig) -> Iterator[jax.Array]:
            heads, *widths = config.cached
            layers = c.kept[: c.num_layers - c.reused].count(kept)
            for width in widths:
                yield jnp.zeros((layers, rows, length, heads, width), dtype)

        keys, values = slots("", c)
        held = Held(keys, values)
        if c.wide:
            keys, values = slots("wide", c.of_kind(c.kinds[c.wide_layers[0]]))
            held = held._replace(wide_keys=keys, wide_values=values)
        if delta := c.delta:
            group = len(c.delta_layers), rows, delta.key_heads
            sizes = delta.repeats, delta.key_dim, delta.value_dim
            inputs = (*group[:2], delta.taps - 1, delta.key_heads, delta.width)
            held = held._replace(
                states=jnp.zeros((*group, *sizes), jnp.float32), inputs=jnp.zeros(inputs, dtype)
            )
        return Cache(
            held,
            jnp.zeros((rows, length), jnp.int32),
            jnp.zeros((rows, length), jnp.int32),
            jnp.zeros((rows,), jnp.int32),
        )

    def prefill(
        self,
        params: Params,
        tokens: Int[Array, "N T"],
        segment_ids: Int[Array, "N T"],
        positions: Int[Array, "N T"],
        cache: Cache,
        prefix_ids: Int[Array, "N T"] | None = None,
    ) -> tuple[Float[Array, "N T D"], Cache]:
        """Run prompts through the model and keep their keys and values in an empty cache.

        Rows may be padded on either side; a row's next slot is the one behind its last real token.

        Raises:
            ValueError: the cache is shorter than the prompts.
        """
        slots = cache.segment_ids.shape[1]
        if tokens.shape[1] > slots and not caches.is_ring(self.config.windows, slots):
            raise ValueError(f"prefill: {tokens.shape[1]} tokens do not fit a cache of {slots}")
        return self._apply(params, "prefill", tokens, segment_ids, positions, prefix_ids, cache)

    def decode(
        self, params: Params, token: Int[Array, "N"], position: Int[Array, "N"], cache: Cache
    ) -> tuple[Float[Array, "N D"], Cache]:
        """Run one further token a row, which continues the segment of the row's last token.

        Args:
            token: int32 [N].
            position: its rotary position, int32 [N].
            cache: what the row has seen; a row whose cache is full is left as it is (its result is
                then meaningless).
        """
        return self._apply(params, "decode", token, position, cache)

    def init_adapter(
        self, key: jax.Array, base: Params, dtype: Any = jnp.float32
    ) -> dict[str, Any]:
        """Return a fresh adapter for these base parameters: random A, zero B, and the base's
        magnitudes (DoRA) and rows.

        Raises:
            ValueError: the model was built without an adapter.
        """
        if self.options.lora is None:
            raise ValueError("the model was built without lora=LoraConfig(...)")
        return loras.fresh(key, self.shapes(dtype), base, self.options.lora)


class LoadedModel(NamedTuple):
    """A model with its parameters, as a checkpoint gives them."""

    model: Model
    params: Params

    @property
    def config(self) -> ModelConfig:
        """What the model is."""
        return self.model.config


def build(
    config: ModelConfig,
    *,
    compute_dtype: Any = "bfloat16",
    remat: str = "full",
    attention: str = "auto",
    lora: loras.LoraConfig | None = None,
    beside: loras.LoraConfig | None = None,
    heads: tuple[str, ...] = (),
    unembed: bool | None = None,
    dropout: float = 0.0,
) -> Model:
    """Return the pure functions of a decoder.

    Args:
        config: what the model is.
        compute_dtype: "bfloat16" or "float32"; parameters are cast where they are used.
        remat: what the backward pass finds saved: "none" (all saved), "dots" (matrix products
            without batch axes), "attention" (attention's outputs), "full" (each layer's input
            only).
        attention: a name from ``attention.ATTENTION``, or "auto".
        lora: the policy's adapter; None for the base alone.
        beside: of the base alone, its policy's adapter: products are rounded as there, so that
            without what the adapter adds both give the same bits.
        heads: scalar heads: "score" (a linear map, as transformers' sequence classification),
            "value" (linear, with bias), "value_mlp" (HALOs': three layers on hidden states without
            gradient).
        unembed: whether there is a language-model head; default: not beside a "score" head.
        dropout: on embeddings and on each residual branch; acts only where a ``dropout_key`` is
            given.

    Raises:
        ValueError: an unknown name; an adapter's targets match nothing.
    """
    choose(REMAT, remat, "remat policy")
    for head in heads:
        choose(HEADS, head, "head")
    attentions.implementation(attention)
    options = Options(
        dtype=jnp.dtype(compute_dtype),
        remat=remat,
        attention=attention,
        lora=None,
        beside=beside,
        heads=tuple(heads),
        unembed="score" not in heads if unembed is None else unembed,
        dropout=dropout,
    )
    if lora is not None:
        loras.check_targets(lora, flatten(Model(config, options).roles()).values())
        options = dataclasses.replace(options, lora=lora)
    return Model(config, options)
