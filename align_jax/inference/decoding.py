# SPDX-License-Identifier: Apache-2.0
"""The device's half of generation: prefill once, then a while loop that draws and decodes.

    prompts [G, T] ──prefill──► cache ──repeat──► N = G * samples rows ──► draw ─► decode ─► draw ─► ... until all done

Two compiled functions, `start` and `advance`; their shapes are set by (G, T, samples, M) alone, and
everything that differs between requests (settings, keys, limits, stop tokens) is an array, so
nothing recompiles.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from align_jax.inference.samplers import Settings, draw
from align_jax.models import cache as caches
from align_jax.models.cache import Cache
from align_jax.models.model import Model
from align_jax.parallel.sharding import tree_shardings


class Rows(NamedTuple):
    """What the N rows were asked for."""

    keys: Key[Array, "N"]
    settings: Settings
    limits: Int[Array, "N"]  # tokens at most; 0 for a filler row
    stop_ids: Int[Array, "K"]  # end a completion and belong to it; -1 pads


class Progress(NamedTuple):
    """What the N rows have so far; M token slots a row."""

    tokens: Int[Array, "N M"]
    token_logps: Float[Array, "N M"]  # nats, under the model
    drawn_logps: Float[Array, "N M"]  # nats, under the distribution that was sampled from
    count: Int[Array, "N"]
    done: Bool[Array, "N"]
    stopped: Bool[Array, "N"]  # by a stop token
    token: Int[Array, "N"]  # the last one drawn
    starts: Int[Array, "N"]  # tokens in the prompt
    step: Int[Array, ""]
    seen: Bool[Array, "N V"] | None
    cache: Any


def _take(
    logits: Float[Array, "N V"], rows: Rows, filters: frozenset[str], progress: Progress
) -> Progress:
    """Draw a token for every row that is not done."""
    token, logps, drawn = draw(
        rows.keys, progress.count, logits, rows.settings, filters, progress.seen
    )
    index = jnp.arange(token.shape[0])
    # out of range: dropped
    column = jnp.where(progress.done, progress.tokens.shape[1], progress.count)
    count = jnp.where(progress.done, progress.count, progress.count + 1)
    stopped = ~progress.done & jnp.any(token[:, None] == rows.stop_ids[None, :], axis=1)
    seen = progress.seen if progress.seen is None else progress.seen.at[index, token].set(True)
    return progress._replace(
        tokens=progress.tokens.at[index, column].set(token, mode="drop"),
        token_logps=progress.token_logps.at[index, column].set(logps, mode="drop"),
        drawn_logps=progress.drawn_logps.at[index, column].set(drawn, mode="drop"),
        count=count,
        done=progress.done | stopped | (count >= rows.limits),
        stopped=progress.stopped | stopped,
        token=token,
        step=progress.step + 1,
        seen=seen,
    )


def shardings(mesh: Mesh | AbstractMesh, progress: Progress) -> Progress:
    """Return where each array of a Progress lies: rows over the mesh's row axes, the cache's heads
    over ``tensor``.

    Args:
        mesh: the mesh.
        progress: arrays or shapes.
    """
    # else each device holds them all
    heads = progress.cache.keys.shape[3] % mesh.shape["tensor"] == 0
    axes = Cache(
        *(
            tuple(None if name == "kv_heads" and not heads else name for name in names)
            for names in caches.AXES
        )
    )

    def rows(x):
        return ("rows", *(None,) * (x.ndim - 1)) if x.ndim else ()

    names = jax.tree.map(rows, progress._replace(cache=None))._replace(cache=axes)
    return tree_shardings(mesh, names)


@functools.partial(jax.jit, static_argnames=("model", "samples", "slots", "filters", "dtype"))
def start(
    model: Model,
    params: Any,
    tokens: Int[Array, "G T"],
    lengths: Int[Array, "G"],
    rows: Rows,
    *,
    samples: int,
    slots: int,
    filters: frozenset[str],
    dtype: Any,
) -> Progress:
    """Prefill the prompts, give each its samples' rows, and draw the first token.

    Args:
        model: static.
        params: its parameters.
        tokens: prompts, padded on the right.
        lengths: real tokens of each, at least 1.
        rows: what the N = G * samples rows were asked for; a prompt's samples are consecutive.
        samples: rows that share a prompt's prefill.
        slots: M, room for new tokens in a row.
        filters: sampling settings in use by any row.
        dtype: of the cache.
    """
    index = jnp.arange(tokens.shape[1])
    real = index[None, :] < lengths[:, None]
    positions = jnp.where(real, index[None, :], 0)
    cache = model.init_cache(tokens.shape[0], tokens.shape[1] + slots, dtype)
    hidden, cache = model.prefill(params, tokens, real.astype(jnp.int32), positions, cache)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    logits = model.unembed(params, last)  # [G, V]
    seen = None
    if "repetition_penalty" in filters:
        group = jnp.arange(tokens.shape[0])[:, None]
        seen = jnp.zeros(logits.shape, bool).at[group, tokens].max(real)
        seen = jnp.repeat(seen, samples, axis=0)
    n = tokens.shape[0] * samples

    def empty(dtype):
        return jnp.zeros((n, slots), dtype)

    progress = Progress(
        tokens=empty(jnp.int32),
        token_logps=empty(jnp.float32),
        drawn_logps=empty(jnp.float32),
        count=jnp.zeros(n, jnp.int32),
        done=rows.limits <= 0,
        stopped=jnp.zeros(n, bool),
        token=jnp.zeros(n, jnp.int32),
        starts=jnp.repeat(lengths, samples),
        step=jnp.zeros((), jnp.int32),
        seen=seen,
        cache=caches.repeat(cache, samples),
    )
    return _placed(_take(jnp.repeat(logits, samples, axis=0), rows, filters, progress))


def _placed(progress: Progress) -> Progress:
    """Pin where everything lies, under an ambient mesh: what `advance` is compiled for, and
    keeps."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return progress
    return jax.lax.with_sharding_constraint(progress, shardings(mesh, progress))


@functools.partial(jax.jit, static_argnames=("model", "filters"), donate_argnames=("progress",))
def advance(
    model: Model,
    params: Any,
    rows: Rows,
    progress: Progress,
    until: Int[Array, ""],
    *,
    filters: frozenset[str],
) -> Progress:
    """Decode until every row is done or ``until`` tokens were drawn."""

    def running(progress: Progress) -> Bool[Array, ""]:
        return ~jnp.all(progress.done) & (progress.step < until)

    def body(progress: Progress) -> Progress:
        hidden, cache = model.decode(
            params, progress.token, progress.starts + progress.count - 1, progress.cache
        )
        return _placed(
            _take(model.unembed(params, hidden), rows, filters, progress._replace(cache=cache))
        )

    return jax.lax.while_loop(running, body, progress)
