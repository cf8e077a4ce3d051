# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule over rows of segments, in chunks.

Each head keeps a state S [n, o] that a token first lets fade and then corrects towards its value:

    S_t = a_t S_(t-1) + b_t k_t (v_t - a_t S_(t-1)ᵀ k_t)ᵀ        y_t = S_tᵀ q_t

A token's past is its *path*: its segment, and before that the prompt that the segment shares.
Within a chunk all tokens' corrections solve one triangular system, whose entries off a token's path
are zero; between chunks go the last token's state and, where prompts are shared, that of the last
token's prompt.  So packed rows and shared prompts give what separate rows do, exactly.

References:
    Yang et al. 2024, Gated Delta Networks (arXiv 2412.06464), section 3; Yang et al. 2024, DeltaNet
    (arXiv 2406.06484), section 3.2 (the chunks).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

CHUNK = 64  # tokens


class Paths(NamedTuple):
    """What each token's state has seen: of chunks of C tokens and the Z states kept between
    them."""

    seen: Bool[Array, "N c C C"]  # the chunk's tokens on the path to each, itself included
    starts: Bool[Array, "N c C Z"]  # the kept state with which its path enters the chunk
    ends: Bool[Array, "N c Z C"]  # the chunk's tokens on the path to each state that is kept next
    kept: Bool[Array, "N c Z Z"]  # and which kept state each of these goes on from


class Past(NamedTuple):
    """Where each token's past lies in its row."""

    paths: Paths
    back: Int[Array, "s N T"]  # the first, second, ... token before each on its path; -1 = none
    last: Int[Array, "N s"]  # the last real token and those before it, the earliest first


def past(
    segment_ids: Int[Array, "N T"],
    prefix_ids: Int[Array, "N T"] | None,
    back: int,
    chunk: int = CHUNK,
) -> Past:
    """Return where each token's past lies.

    Args:
        segment_ids, prefix_ids: as in core.schema.Batch: ids from 0 to T.
        back: s, how many earlier tokens the convolution sees.
        chunk: C, a power of two; short rows have shorter ones.
    """
    rows, length = segment_ids.shape
    chunk = min(chunk, 1 << (length - 1).bit_length())
    index = jnp.arange(length, dtype=jnp.int32)[None]
    real = segment_ids > 0
    # not cummax: a window, whose axis the TPU's compiler cannot part into chunks
    last = jax.lax.associative_scan(jnp.maximum, jnp.where(real, index, 0), axis=1)
    # padding goes on in the segment before it, without effect, so that a row ends in its last
    # token's state
    segments = jnp.take_along_axis(segment_ids, last, axis=1)
    prefixes = None if prefix_ids is None else jnp.take_along_axis(prefix_ids, last, axis=1)
    before = jnp.where(segments == jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1], index - 1, -1)
    if prefixes is not None:
        every = jnp.arange(rows)[:, None]
        ends = jnp.full((rows, length + 1), -1, jnp.int32).at[every, segment_ids].max(index)
        prompt = jnp.where(prefixes > 0, jnp.take_along_axis(ends, prefixes, axis=1), -1)
        before = jnp.where(before < 0, prompt, before)
    steps = [jnp.where(real, before, -1)]
    end = jnp.max(jnp.where(real, index, -1), axis=1, keepdims=True)
    ended = [end]
    for _ in range(back - 1):
        steps.append(_taken(before, steps[-1]))
        ended.append(_taken(before, ended[-1]))
    paths = _paths(segments, prefixes, chunk)
    return Past(paths, jnp.stack(steps), jnp.concatenate(ended[::-1], axis=1))


def _taken(before: Int[Array, "N T"], at: Int[Array, "N t"]) -> Int[Array, "N t"]:
    return jnp.where(at >= 0, jnp.take_along_axis(before, jnp.maximum(at, 0), axis=1), -1)


def _paths(segments: Int[Array, "N T"], prefixes: jax.Array | None, chunk: int) -> Paths:
    shared = prefixes is not None
    prefixes = jnp.zeros_like(segments) if prefixes is None else prefixes
    extra = -segments.shape[1] % chunk
    segment, prefix = (
        jnp.pad(x, ((0, 0), (0, extra)), mode="edge").reshape(x.shape[0], -1, chunk)
        for x in (segments, prefixes)
    )  # [N, c, C]

    def holds(node: tuple[jax.Array, jax.Array], other: jax.Array) -> jax.Array:
        """Tell whether a path to a node (its segment, its prompt) goes through a segment."""
        return (other > 0) & ((node[0] == other) | (node[1] == other))

    # kept before a chunk: the state of the token before it, and of that token's prompt
    at_start = [jnp.pad(x[:, :-1, -1:], ((0, 0), (1, 0), (0, 0))) for x in (segment, prefix)]

    def entry(node: tuple[jax.Array, jax.Array]) -> jax.Array:
        first, second = (holds(node, kept) for kept in at_start)
        return jnp.stack([first, second & ~first] if shared else [first], axis=-1)

    inside = jnp.tril(jnp.ones((chunk, chunk), bool))[None, None]
    seen = holds((segment[..., None], prefix[..., None]), segment[:, :, None]) & inside
    starts = entry((segment, prefix))
    ends, kept = seen[:, :, -1:], starts[:, :, -1:]
    if shared:
        prompt = prefix[:, :, -1:]
        none = jnp.zeros_like(prompt)
        ends = jnp.concatenate([ends, holds((prompt, none), segment)[:, :, None]], axis=2)
        kept = jnp.concatenate([kept, entry((prompt, none))], axis=2)
    return Paths(seen, starts, ends, kept)


def gated_delta_rule(
    q: Float[Array, "N c C g n"],
    k: Float[Array, "N c C g n"],
    v: Float[Array, "N c C g r o"],
    fade: Float[Array, "N T g r"],
    rate: Float[Array, "N T g r"],
    paths: Paths,
) -> tuple[Float[Array, "N T g r o"], Float[Array, "N g r n o"]]:
    """Return each token's output, and the state behind each row's last, in float32.

    Args:
        q, k: queries and keys of g heads, in chunks, of any length: they are normalized, and
            queries scaled by n^-1/2.
        v: r values a head, in chunks.
        fade: log a_t <= 0, in nats; 0 of padding.
        rate: b_t, in [0, 1]; 0 of padding.
        paths: what each token's state has seen.
    """
    length, exact = fade.shape[1], jnp.float32
    q, k, v = (x.astype(exact) for x in (q, k, v))
    fade, rate = (in_chunks(x.astype(exact), paths) for x in (fade, rate))
    q, k = _normalized(q) * q.shape[-1] ** -0.5, _normalized(k)
    ways = paths._replace(starts=paths.starts.astype(exact), kept=paths.kept.astype(exact))
    # faded since the path entered the chunk, and between each token and those on its path
    since = jnp.einsum("Ncij,Ncjgr->Ncgri", paths.seen.astype(exact), fade)
    between = jnp.where(
        paths.seen[:, :, None, None], since[..., :, None] - since[..., None, :], -jnp.inf
    )
    between = jnp.exp(between)  # [N, c, g, r, C, C]
    rate = jnp.moveaxis(rate, 2, -1)  # [N, c, g, r, C]
    likeness = jnp.einsum("Ncign,Ncjgn->Ncgij", k, k)[:, :, :, None]
    strict = jnp.tril(jnp.ones(paths.seen.shape[2:], exact), -1)
    system = rate[..., None] * likeness * between * strict[None, None, None, None]
    solved = unit_lower_inverse(system) * rate[..., None, :]
    attention = jnp.einsum("Ncign,Ncjgn->Ncgij", q, k)[:, :, :, None] * between
    enter = jnp.einsum("Ncgri,NciZ->NcgriZ", jnp.exp(since), ways.starts)
    total = jnp.einsum("NcZj,Ncjgr->NcgrZ", paths.ends.astype(exact), fade)
    leave = jnp.where(
        paths.ends[:, :, None, None], total[..., None] - since[..., None, :], -jnp.inf
    )
    keep = jnp.exp(total)[..., None] * ways.kept[:, :, None, None]  # [N, c, g, r, Z, Z]
    parts = (q, k, v, solved, attention, enter, jnp.exp(leave), keep)
    rows, groups, repeats = q.shape[0], q.shape[3], v.shape[4]
    kept = paths.ends.shape[2]
    empty = jnp.zeros((rows, kept, groups, repeats, q.shape[-1], v.shape[-1]), exact)
    states, y = jax.lax.scan(_chunk, empty, tuple(jnp.moveaxis(x, 1, 0) for x in parts))
    y = jnp.moveaxis(y, 0, 1).reshape(rows, -1, *y.shape[3:])
    return y[:, :length], states[:, 0]


def _chunk(
    states: Float[Array, "N Z g r n o"], parts: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    """Run one chunk from the kept states to the next."""
    q, k, v, solved, attention, enter, leave, keep = parts
    known = jnp.einsum("Nign,NZgrno,NgriZ->Nigro", k, states, enter)
    fresh = jnp.einsum("Ngrij,Njgro->Nigro", solved, v - known)
    y = jnp.einsum("Nign,NZgrno,NgriZ->Nigro", q, states, enter)
    y = y + jnp.einsum("Ngrij,Njgro->Nigro", attention, fresh)
    states = jnp.einsum("NgrZY,NYgrno->NZgrno", keep, states)
    return states + jnp.einsum("NgrZj,Njgn,Njgro->NZgrno", leave, k, fresh), y


def step(
    q: Float[Array, "N g n"],
    k: Float[Array, "N g n"],
    v: Float[Array, "N g r o"],
    fade: Float[Array, "N g r"],
    rate: Float[Array, "N g r"],
    state: Float[Array, "N g r n o"],
) -> tuple[Float[Array, "N g r o"], Float[Array, "N g r n o"]]:
    """Run one further token a row; as ``gated_delta_rule``."""
    q, k, v, fade, rate = (x.astype(jnp.float32) for x in (q, k, v, fade, rate))
    q, k = _normalized(q) * q.shape[-1] ** -0.5, _normalized(k)
    state = state * jnp.exp(fade)[..., None, None]
    fresh = rate[..., None] * (v - jnp.einsum("Ngn,Ngrno->Ngro", k, state))
    state = state + jnp.einsum("Ngn,Ngro->Ngrno", k, fresh)
    return jnp.einsum("Ngn,Ngrno->Ngro", q, state), state


def in_chunks(x: jax.Array, paths: Paths) -> jax.Array:
    """[N, T, ...] -> [N, c, C, ...], zeros behind T."""
    chunk = paths.seen.shape[2]
    extra = -x.shape[1] % chunk
    x = jnp.pad(x, ((0, 0), (0, extra), *((0, 0),) * (x.ndim - 2)))
    return x.reshape(x.shape[0], -1, chunk, *x.shape[2:])


def _normalized(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


@jax.custom_vjp
def unit_lower_inverse(lower: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """Return (I + L)^-1 of strictly lower triangular L; C is a power of two.

    By blocks of 1, 2, 4, ... on the diagonal, each inverted from its two halves: as exact as
    substitution, which powers of L are not, and nothing but products.
    """
    size = lower.shape[-1]
    at, ahead = jnp.arange(size), tuple(range(lower.ndim - 2))

    def twice_as_wide(inverse: jax.Array, width: jax.Array) -> tuple[jax.Array, None]:
        block = at // width
        below = (block[:, None] == block[None, :] + 1) & (block[:, None] % 2 == 1)
        part = jnp.where(jnp.expand_dims(below, ahead), lower, 0)
        return inverse - _product(_product(inverse, part), inverse), None

    # a loop, because the TPU's compiler takes seconds for each product that it is shown
    widths = 2 ** jnp.arange(size.bit_length() - 1, dtype=at.dtype)
    same = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape)
    inverse, _ = jax.lax.scan(twice_as_wide, same, widths)
    return inverse


def _product(one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.matmul(one, other, precision="high")


def _forward(lower: jax.Array) -> tuple[jax.Array, jax.Array]:
    inverse = unit_lower_inverse(lower)
    return inverse, inverse


def _backward(inverse: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    across = jnp.swapaxes(inverse, -1, -2)
    return (-_product(_product(across, gradient), across),)


unit_lower_inverse.defvjp(_forward, _backward)
