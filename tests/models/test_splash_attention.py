# SPDX-License-Identifier: Apache-2.0
"""Splash attention, run step by step on the CPU, equals plain attention: outputs and gradients, on
every mesh."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.models import attention, splash_attention
from align_jax.parallel.mesh import make_mesh

ROWS, HEADS, GROUPS, WIDTH = 2, 4, 2, 8
VALUES = 6  # width of a value: latent attention's is not a key's


def _inputs(length: int, shared: bool, rows: int = ROWS):
    """Rows of two packed segments (or a prompt with two responses) and some padding, with exact
    positions."""
    key = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(key[0], (rows, length, HEADS, WIDTH), jnp.float32)
    k = jax.random.normal(key[1], (rows, length, GROUPS, WIDTH), jnp.float32)
    v = jax.random.normal(key[2], (rows, length, GROUPS, VALUES), jnp.float32)
    cuts = [0, length // 3, 2 * length // 3, length - 5, length]
    segments = np.zeros((rows, length), np.int32)
    positions, prefixes = np.zeros_like(segments), np.zeros_like(segments)
    for number, (start, end) in enumerate(zip(cuts[:-2], cuts[1:-1])):
        segments[:, start:end] = number + 1
        positions[:, start:end] = np.arange(end - start) + (cuts[1] if shared and number else 0)
        prefixes[:, start:end] = 1 if shared and number else 0
    fields = {
        "segment_ids": jnp.asarray(segments),
        "prefix_ids": jnp.asarray(prefixes) if shared else None,
    }
    return (q, k, v), fields, jnp.asarray(positions)


def _both(length, shared=False, rows=ROWS, sinks=False, **numbers):
    arrays, fields, positions = _inputs(length, shared, rows)
    if sinks:
        arrays += (jnp.linspace(-1.0, 2.0, HEADS),)
    real = (fields["segment_ids"] > 0)[..., None, None]
    shape = (*arrays[0].shape[:-1], VALUES)
    cotangent = jnp.where(real, jax.random.normal(jax.random.key(9), shape), 0.0)

    def run(function, **more):
        def attend(q, k, v, sinks=None):
            out = function(q, k, v, sinks=sinks, **fields, **numbers, **more)
            return jnp.where(real, out, 0.0)

        out, pull = jax.vjp(attend, *arrays)
        return out, *pull(cotangent)

    expected = run(attention.xla, positions=positions)
    got = jax.jit(lambda: run(splash_attention.splash, interpret=True))()
    for name, a, b in zip(("out", "dq", "dk", "dv", "dsinks"), expected, got):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


def test_splash_equals_plain_attention():
    _both(200, window=40, softcap=5.0, scale=0.1)


def test_splash_equals_plain_attention_over_shared_prefixes():
    _both(128, shared=True, softcap=5.0, scale=0.1)


def test_splash_equals_plain_attention_with_sinks():
    _both(200, window=40, sinks=True, scale=0.1)


# interpreting is slow, so four devices and both kinds of mask in turn
@pytest.mark.parametrize(
    "sizes, length, shared",
    [({"fsdp": 2, "tensor": 2}, 128, False), ({"sequence": 2, "tensor": 2}, 256, True)],
)
def test_splash_is_the_same_on_every_mesh(sizes, length, shared):
    with jax.set_mesh(make_mesh(sizes, jax.devices()[:4])):
        _both(length, shared=shared, sinks=shared, scale=0.1)


def test_a_window_over_shared_prefixes_is_refused():
    arrays, fields, _ = _inputs(128, True)
    with pytest.raises(ValueError, match="no sliding window over shared prefixes"):
        splash_attention.splash(*arrays, **fields, window=8, interpret=True)


@pytest.mark.parametrize("shared", [False, True])
def test_attention_by_blocks_equals_plain_attention(shared):
    arrays, fields, positions = _inputs(72, shared)
    numbers = {"scale": 0.1, "softcap": 5.0, "window": 30, "positions": positions}
    numbers["sinks"] = jnp.linspace(-1.0, 2.0, HEADS)

    def gradients(function):
        def loss(*x):
            return jnp.sum(function(*x, **fields, **numbers) ** 2)

        return jax.grad(loss, (0, 1, 2))(*arrays)

    found = gradients(functools.partial(attention.blocks, block=32))
    for expected, got in zip(gradients(attention.xla), found):
        np.testing.assert_allclose(expected, got, atol=1e-5)


@pytest.mark.parametrize("name", attention.ATTENTION)
def test_a_window_counts_positions_where_responses_share_a_prompt(name):
    arrays, fields, positions = _inputs(40, shared=True)
    function = attention.ATTENTION[name]
    if name == "blocks":
        function = functools.partial(function, block=16)
    got = function(*arrays, **fields, positions=positions, window=9)
    # the prompt with its second response, which stands behind the first in the row, and alone
    segments = fields["segment_ids"][0]
    order = np.nonzero((segments == 1) | (segments == 3))[0]
    alone = attention.xla(
        *(x[:, order] for x in arrays),
        segment_ids=jnp.ones((ROWS, order.size), jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(order.size), (ROWS, order.size)),
        window=9,
    )
    np.testing.assert_allclose(got[:, order], alone, atol=1e-5)


def test_what_a_kernel_lacks_goes_by_blocks():
    arrays, fields, positions = _inputs(40, True)
    numbers = {"scale": 0.1, "positions": positions}
    arrays = tuple(x.astype(jnp.bfloat16) for x in arrays)
    sinks = {"sinks": jnp.linspace(-1.0, 2.0, HEADS)}
    lacking_of = [("splash", {"window": 9}), ("cudnn", {"softcap": 5.0}), ("cudnn", sinks)]
    for name, lacking in lacking_of:
        np.testing.assert_allclose(
            attention.ATTENTION[name](*arrays, **fields, **numbers, **lacking),
            attention.xla(*arrays, **fields, **numbers, **lacking),
            atol=1e-6,
        )
