# SPDX-License-Identifier: Apache-2.0
"""The device's half of generation: prefill once, then a while loop that draws and decodes.

    prompts [G, T] ──prefill──► cache ──repeat──► N = G * samples rows
        ──► draw ─► decode ─► draw ─► ... until all done ──extend──► draw ─► decode ─► ...
                      └─ half of the rows done ──narrow──► draw ─► decode ─► ...

Compiled functions, `prefill`, `decode`, `narrow` and `extend`; their shapes are set by (G, T,
samples, M), the rows that go on and the padded length of what is added, and everything that differs
between requests (settings, keys, limits, stop tokens) is an array, so nothing recompiles.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from align_jax.inference.mixture import Mixture
from align_jax.inference.samplers import Settings, draw
from align_jax.models import cache as caches
from align_jax.models.model import Model, Params
from align_jax.parallel.sharding import is_axes, tree_shardings


class RowRequests(NamedTuple):
    """What the N rows were asked for."""

    keys: Key[Array, "N"]
    settings: Settings
    limits: Int[Array, "N"]  # tokens at most; 0 for a filler row
    stop_ids: Int[Array, "K"]  # end a completion and belong to it; -1 pads


class DecodeState(NamedTuple):
    """What the N rows have so far; M token slots a row."""

    tokens: Int[Array, "N M"]
    token_logps: Float[Array, "N M"]  # nats, under the model
    drawn_logps: Float[Array, "N M"]  # nats, under the distribution that was sampled from
    counts: Int[Array, "N"]  # tokens drawn
    done: Bool[Array, "N"]
    stopped: Bool[Array, "N"]  # by a stop token
    token: Int[Array, "N"]  # the last one drawn
    starts: Int[Array, "N"]  # tokens in the prompt
    step: Int[Array, ""]
    seen: Bool[Array, "N V"] | None
    cache: Any  # a mixture's: its two models'


def _append_token(
    logits: Float[Array, "N V"], requests: RowRequests, filters: frozenset[str], state: DecodeState
) -> DecodeState:
    """Draw a token for every row that is not done."""
    token, logps, drawn = draw(
        requests.keys, state.counts, logits, requests.settings, filters, state.seen
    )
    index = jnp.arange(token.shape[0])
    # out of range: dropped
    column = jnp.where(state.done, state.tokens.shape[1], state.counts)
    counts = jnp.where(state.done, state.counts, state.counts + 1)
    stopped = ~state.done & jnp.any(token[:, None] == requests.stop_ids[None, :], axis=1)
    seen = state.seen if state.seen is None else state.seen.at[index, token].set(True)
    return state._replace(
        tokens=state.tokens.at[index, column].set(token, mode="drop"),
        token_logps=state.token_logps.at[index, column].set(logps, mode="drop"),
        drawn_logps=state.drawn_logps.at[index, column].set(drawn, mode="drop"),
        counts=counts,
        done=state.done | stopped | (counts >= requests.limits),
        stopped=state.stopped | stopped,
        token=token,
        step=state.step + 1,
        seen=seen,
    )


def shardings(mesh: Mesh | AbstractMesh, state: DecodeState) -> DecodeState:
    """Return where each array lies: rows over the mesh's row axes, the cache's heads over
    ``tensor``.

    Args:
        mesh: the mesh.
        state: arrays or shapes.
    """

    def of_cache(cache: caches.Cache) -> Any:
        # each device holds all heads where the tensor axis does not divide them
        keys = (cache.held.keys, cache.held.wide_keys)
        divides = all(x is None or x.shape[3] % mesh.shape["tensor"] == 0 for x in keys)

        def lying(names: tuple[str | None, ...]) -> tuple[str | None, ...]:
            return tuple(None if name == "kv_heads" and not divides else name for name in names)

        return jax.tree.map(lying, caches.axes(cache), is_leaf=is_axes)

    axes = jax.tree.map(of_cache, state.cache, is_leaf=lambda x: isinstance(x, caches.Cache))

    def rows(x: Any) -> tuple[str | None, ...]:
        return ("rows", *(None,) * (x.ndim - 1)) if x.ndim else ()

    names = jax.tree.map(rows, state._replace(cache=None))._replace(cache=axes)
    return tree_shardings(mesh, names)


@functools.partial(
    jax.jit, static_argnames=("model", "samples", "slots", "filters", "dtype", "room")
)
def prefill(
    model: Model | Mixture,
    params: Params,
    tokens: Int[Array, "G T"],
    lengths: Int[Array, "G"],
    requests: RowRequests,
    *,
    samples: int,
    slots: int,
    filters: frozenset[str],
    dtype: Any,
    room: int = 0,
) -> DecodeState:
    """Prefill the prompts, give each its samples' rows, and draw the first token.

    Args:
        model: static.
        params: its parameters.
        tokens: prompts, padded on the right.
        lengths: real tokens of each, at least 1.
        requests: what the N = G * samples rows were asked for; a prompt's samples are consecutive.
        samples: rows that share a prompt's prefill.
        slots: M, room for new tokens in a row.
        filters: sampling settings in use by any row.
        dtype: of the cache.
        room: tokens that the cache has room for, if they are more than T + M.
    """
    index = jnp.arange(tokens.shape[1])
    real = index[None, :] < lengths[:, None]
    positions = jnp.where(real, index[None, :], 0)
    cache: Any = model.init_cache(tokens.shape[0], max(tokens.shape[1] + slots, room), dtype)
    hidden, cache = model.prefill(params, tokens, real.astype(jnp.int32), positions, cache)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    logits = model.unembed(params, last)  # [G, V]
    seen = None
    if "repetition_penalty" in filters:
        group = jnp.arange(tokens.shape[0])[:, None]
        seen = jnp.zeros(logits.shape, bool).at[group, tokens].max(real)
        seen = jnp.repeat(seen, samples, axis=0)
    starts, cache = jnp.repeat(lengths, samples), caches.repeat(cache, samples)
    state = _begun(requests, starts, slots, seen, cache)
    return _pinned(_append_token(jnp.repeat(logits, samples, axis=0), requests, filters, state))


def _begun(
    requests: RowRequests,
    starts: Int[Array, "N"],
    slots: int,
    seen: Bool[Array, "N V"] | None,
    cache: Any,
) -> DecodeState:
    """Return rows that have drawn nothing yet behind their first ``starts`` tokens."""
    n = starts.shape[0]

    def empty(dtype: Any) -> Array:
        return jnp.zeros((n, slots), dtype)

    return DecodeState(
        tokens=empty(jnp.int32),
        token_logps=empty(jnp.float32),
        drawn_logps=empty(jnp.float32),
        counts=jnp.zeros(n, jnp.int32),
        done=requests.limits <= 0,
        stopped=jnp.zeros(n, bool),
        token=jnp.zeros(n, jnp.int32),
        starts=starts,
        step=jnp.zeros((), jnp.int32),
        seen=seen,
        cache=cache,
    )


@functools.partial(
    jax.jit, static_argnames=("model", "slots", "filters"), donate_argnames=("state",)
)
def extend(
    model: Model | Mixture,
    params: Params,
    tokens: Int[Array, "N F"],
    lengths: Int[Array, "N"],
    requests: RowRequests,
    state: DecodeState,
    *,
    slots: int,
    filters: frozenset[str],
) -> DecodeState:
    """Go on where rows have ended: run further tokens against their cache, and draw the next one.

    Args:
        model, params, requests, slots, filters: as ``prefill`` takes them.
        tokens: what follows all that is in a row's cache, padded on the right; the first one is the
            last that was drawn.
        lengths: real tokens of each row; 0: it rests.
        state: the rows, of a cache that ``rewinds``, with room for all, and without penalties.
    """
    held = state.starts + state.counts - 1  # the last token drawn is not in the cache
    every = jnp.arange(tokens.shape[0])

    def rewound(cache: Any, length: Array) -> Any:
        return jax.tree.map(
            lambda one: caches.rewound(one, length),
            cache,
            is_leaf=lambda x: isinstance(x, caches.Cache),
        )

    def body(carry: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
        step, last, cache = carry
        hidden, cache = model.decode(params, tokens[every, step], held + step, cache)
        return step + 1, jnp.where((step < lengths)[:, None], hidden, last), cache

    hidden, cache = model.decode(params, tokens[:, 0], held, rewound(state.cache, held))
    first = (jnp.ones((), jnp.int32), hidden, cache)
    _, hidden, cache = jax.lax.while_loop(lambda x: x[0] < lengths.max(), body, first)
    begun = _begun(requests, held + lengths, slots, None, rewound(cache, held + lengths))
    return _pinned(_append_token(model.unembed(params, hidden), requests, filters, begun))


@jax.jit
def narrow(
    requests: RowRequests, state: DecodeState, rows: Int[Array, "n"]
) -> tuple[RowRequests, DecodeState]:
    """Keep some of the rows, that what is decoded further costs no more than they do."""

    def take(tree: Any) -> Any:
        return jax.tree.map(lambda x: x[rows] if x.ndim else x, tree)

    cache = caches.take(state.cache, rows)
    state = take(state._replace(cache=None))._replace(cache=cache)
    return take(requests)._replace(stop_ids=requests.stop_ids), _pinned(state)


def _pinned(state: DecodeState) -> DecodeState:
    """Pin where everything lies, under a context mesh: what `decode` is compiled for, and
    keeps."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return state
    return jax.lax.with_sharding_constraint(state, shardings(mesh, state))


@functools.partial(jax.jit, static_argnames=("model", "filters"), donate_argnames=("state",))
def decode(
    model: Model | Mixture,
    params: Params,
    requests: RowRequests,
    state: DecodeState,
    until: Int[Array, ""],
    few: Int[Array, ""],
    *,
    filters: frozenset[str],
) -> DecodeState:
    """Decode until no more than ``few`` rows are not done, or ``until`` tokens were drawn."""

    def running(state: DecodeState) -> Bool[Array, ""]:
        return (jnp.sum(~state.done) > few) & (state.step < until)

    def body(state: DecodeState) -> DecodeState:
        hidden, cache = model.decode(
            params, state.token, state.starts + state.counts - 1, state.cache
        )
        return _pinned(
            _append_token(
                model.unembed(params, hidden), requests, filters, state._replace(cache=cache)
            )
        )

    return jax.lax.while_loop(running, body, state)
