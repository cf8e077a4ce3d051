# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule in chunks against the recurrence, token by token along each path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.models.delta_rule import gated_delta_rule, in_chunks, past, step, unit_lower_inverse

T, G, R, N, O = 40, 2, 2, 4, 3  # noqa: E741
# rows of three kinds, in chunks of 8: segments and the prompts that they share
SEGMENTS = [
    [0] * 5 + [1] * 35,  # padded on the left
    [1] * 3 + [2] * 22 + [3] * 10 + [0] * 5,
    # a prompt over a chunk and its end, responses in the same chunk and in later ones; the second
    # prompt ends with a chunk
    [1] * 10 + [2] * 3 + [3] * 9 + [4] * 2 + [5] * 8 + [6] * 1 + [7] * 4 + [0] * 3,
]
PREFIXES = [
    [0] * T,
    [0] * T,
    [0] * 10 + [1] * 3 + [1] * 9 + [1] * 2 + [0] * 8 + [5] * 1 + [5] * 4 + [0] * 3,
]


def inputs():
    keys = jax.random.split(jax.random.key(0), 5)
    q, k = (3 * jax.random.normal(key, (3, T, G, N)) for key in keys[:2])
    v = jax.random.normal(keys[2], (3, T, G, R, O))
    fade = -jnp.exp(jax.random.normal(keys[3], (3, T, G, R)) - 1)
    rate = jax.nn.sigmoid(2 * jax.random.normal(keys[4], (3, T, G, R)))
    real = (jnp.asarray(SEGMENTS) > 0)[..., None, None]
    return q, k, v, jnp.where(real, fade, 0), jnp.where(real, rate, 0)


def by_token(args, segments, prefixes):
    """Outputs, and the state behind each row's last token, one token after the other."""
    every = jnp.arange(3)

    def one(states, at):
        # a segment begins in the state of its prompt, 0 of none
        token, segment, prefix, first = at
        begin = jnp.where(first[:, None, None, None, None], states[every, prefix], 0)
        begin = jnp.where(first[:, None, None, None, None], begin, states[every, segment])
        y, state = step(*token, begin)
        real = (segment > 0)[:, None, None, None, None]
        state = jnp.where(real, state, states[every, segment])
        return states.at[every, segment].set(state), y

    first = segments != jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1]
    along = (tuple(args), segments, prefixes, first)
    along = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), along)
    states, y = jax.lax.scan(one, jnp.zeros((3, 8, G, R, N, O)), along)
    return jnp.moveaxis(y, 0, 1), states[every, jnp.max(segments, axis=1)]


@pytest.mark.parametrize("shared", [False, True])
def test_chunks_give_outputs_states_and_gradients_of_the_recurrence(shared):
    segments = jnp.asarray(SEGMENTS, jnp.int32)
    prefixes = jnp.asarray(PREFIXES, jnp.int32) if shared else None
    found = past(segments, prefixes, 3, chunk=8)
    read = prefixes if shared else jnp.zeros_like(segments)

    def loss(outputs):
        y, state = outputs
        real = (segments > 0)[..., None, None, None]
        weights = jnp.cos(jnp.arange(y.size)).reshape(y.shape)
        return jnp.sum(jnp.where(real, y * weights, 0)) + jnp.sum(jnp.sin(state))

    def chunks(args):
        *parts, fade, rate = args
        parts = [in_chunks(x, found.paths) for x in parts]
        outputs = gated_delta_rule(*parts, fade, rate, found.paths)
        return loss(outputs), outputs

    def tokens(args):
        outputs = by_token(args, segments, read)
        return loss(outputs), outputs

    both = [jax.jit(jax.grad(run, has_aux=True))(inputs()) for run in (chunks, tokens)]
    real = np.asarray(segments) > 0
    (gradients, (y, state)), (expected, (other, end)) = both
    np.testing.assert_allclose(np.asarray(y)[real], np.asarray(other)[real], atol=1e-5)
    np.testing.assert_allclose(state, end, atol=1e-5)
    for one, another in zip(gradients, expected):
        np.testing.assert_allclose(np.asarray(one)[real], np.asarray(another)[real], atol=1e-4)


def test_the_token_before_is_that_of_the_segment_or_of_the_prompt():
    found = past(jnp.asarray(SEGMENTS, jnp.int32), jnp.asarray(PREFIXES, jnp.int32), 3)
    back = np.asarray(found.back)
    assert back[:, 0, 5].tolist() == [-1, -1, -1] and back[:, 0, 7].tolist() == [6, 5, -1]
    assert back[:, 2, 13].tolist() == [9, 8, 7] and back[:, 2, 14].tolist() == [13, 9, 8]
    assert back[:, 2, 33].tolist() == [31, 30, 29]
    assert (back[:, 1, 35:] == -1).all()
    assert np.asarray(found.last).tolist() == [[37, 38, 39], [32, 33, 34], [34, 35, 36]]


def test_the_inverse_is_exact_where_powers_are_not():
    # keys all alike: the powers of this matrix reach 1e17
    lower = jnp.tril(jnp.ones((64, 64)), -1)
    inverse = jax.jit(unit_lower_inverse)(lower)
    np.testing.assert_allclose(inverse @ (lower + jnp.eye(64)), np.eye(64), atol=1e-5)
