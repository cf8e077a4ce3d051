# SPDX-License-Identifier: Apache-2.0
"""Attention by blocks that follow the segments equals plain attention, and computes no more."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.models import attention, segment_attention
from align_jax.parallel.mesh import make_mesh

ROWS, HEADS, WIDTH, BLOCK = 2, 4, 8, 16
VALUES = 6  # width of a value: latent attention's is not a key's


def _fields(lengths, shared, length):
    """Rows of segments of these lengths, the second row's in reverse order; a prompt with two
    answers, and another with one, where they share."""
    segments = np.zeros((ROWS, length), np.int32)
    positions, prefixes = np.zeros_like(segments), np.zeros_like(segments)
    for row in range(ROWS):
        at = 0
        for number, size in enumerate(lengths[:: -1 if row else 1]):
            prompt = (0, 1, 1, 0, 4)[number] if shared else 0
            begin = int((segments[row] == prompt).sum()) if prompt else 0
            here = slice(at, at + size)
            segments[row, here], prefixes[row, here] = number + 1, prompt
            positions[row, here] = begin + np.arange(size)
            at += size
    return {
        "segment_ids": jnp.asarray(segments),
        "positions": jnp.asarray(positions),
        "prefix_ids": jnp.asarray(prefixes) if shared else None,
    }


CASES = {
    "one segment": (HEADS, [96], False, {}),
    "packed": (HEADS, [20, 3, 41, 17], False, {"softcap": 5.0}),
    "packed, a window": (2, [60, 30], False, {"window": 9}),
    "shared prefixes": (2, [21, 5, 13, 30, 11], True, {}),
    "shared prefixes, all that there is": (
        1,
        [50, 7, 18, 6, 9],
        True,
        {"window": 12, "softcap": 3.0},
    ),
    "packed, sinks": (2, [20, 3, 41, 17], False, {"sinks": True}),
    "shared prefixes, sinks and a window": (
        2,
        [21, 5, 13, 30, 11],
        True,
        {"window": 12, "sinks": True},
    ),
}


@functools.partial(jax.jit, static_argnums=(0, 3))
def _gradients(function, arrays, fields, numbers):
    """Return the output where there are tokens and the gradients."""
    real = (fields["segment_ids"] > 0)[..., None, None]

    def run(q, k, v, sinks=None):
        return jnp.where(real, function(q, k, v, sinks=sinks, **fields, **dict(numbers)), 0.0)

    out, pull = jax.vjp(run, *arrays)
    return out, *pull(jnp.where(real, jnp.sin(jnp.arange(out.size)).reshape(out.shape), 0.0))


def _compare(function, groups, lengths, shared, numbers, length=100):
    key = jax.random.split(jax.random.key(0), 3)
    heads = ((HEADS, WIDTH), (groups, WIDTH), (groups, VALUES))
    arrays = tuple(jax.random.normal(one, (ROWS, length, *shape)) for one, shape in zip(key, heads))
    fields = _fields(lengths, shared, length)
    numbers = {"scale": 0.3, **numbers}
    if numbers.pop("sinks", False):
        arrays += (jnp.linspace(-1.0, 2.0, HEADS),)
    numbers = tuple(numbers.items())
    expected = _gradients(attention.xla, arrays, fields, numbers)
    got = _gradients(function, arrays, fields, numbers)
    for name, a, b in zip(("out", "dq", "dk", "dv", "dsinks"), expected, got):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)


ATTEND = functools.partial(segment_attention.attend, block=BLOCK)


@pytest.mark.parametrize("name", CASES)
def test_segments_equal_plain_attention(name):
    _compare(ATTEND, *CASES[name])


def test_segments_are_the_same_on_a_mesh():
    with jax.set_mesh(make_mesh({"fsdp": 2, "tensor": 4}, jax.devices())):
        _compare(ATTEND, *CASES["shared prefixes, sinks and a window"])


def test_a_block_takes_the_keys_of_its_segments_and_prompts_alone():
    # a prompt of 2 blocks, answers of 3, 3 and 1, a packed segment of 2, and padding
    sizes, prompts = (32, 48, 48, 16, 32), (0, 1, 1, 1, 0)
    segments = np.repeat([1, 2, 3, 4, 5, 0], [*sizes, 32])[None]
    prefixes = np.repeat([*prompts, 0], [*sizes, 32])[None]
    positions = np.arange(segments.size)[None]
    fields = segment_attention._Fields(*(jnp.asarray(x) for x in (segments, positions, prefixes)))
    find = jax.jit(segment_attention._walk, static_argnums=(1, 2))
    walk = find(fields, None, BLOCK)
    row, blocks = jnp.asarray(0), jnp.arange(segments.size // BLOCK)
    steps = [int(segment_attention._steps(walk, row, at)[0]) for at in blocks]
    assert steps == [1, 2, *(3, 4, 5), *(3, 4, 5), 3, *(1, 2), *(0, 0)]
    taken = segment_attention._steps(walk, row, blocks[6])[1](jnp.arange(4))
    assert taken.tolist() == [0, 1, 5, 6]  # of the second answer's second block
    # a window of a block's length: one block before it, not the whole segment
    alone = segment_attention._Fields(jnp.ones((1, 80), jnp.int32), jnp.arange(80)[None], None)
    assert find(alone, BLOCK, BLOCK).own.tolist() == [[0, 0, 1, 2, 3]]
