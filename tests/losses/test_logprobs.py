# SPDX-License-Identifier: Apache-2.0
"""Token log-probabilities from hidden states, in every layout, without the logits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.core.schema import Batch
from align_jax.losses import logprobs

N, T, D, V = 4, 12, 8, 50


def make_batch(slots=1, budget=11):
    """Rows with ``slots`` responses each after a prompt of one token, [B, R] = [N, slots]."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (N, T)).astype(np.int32)
    mask, slot = np.zeros((N, T), bool), np.zeros((N, T), np.int32)
    width = T // slots
    for n in range(N):
        for s in range(slots):
            start = s * width + 1
            stop = start + rng.integers(1, width)
            mask[n, start:stop], slot[n, start:stop] = True, s
    indices = np.broadcast_to(np.arange(T, dtype=np.int32), (N, T))
    lengths = np.stack([(mask & (slot == s)).sum(1) for s in range(slots)], 1).astype(np.int32)
    index = np.sort(np.where(mask, indices, T), axis=1)[:, :budget].astype(np.int32)
    index = np.pad(index, ((0, 0), (0, max(budget - T, 0))), constant_values=T)
    batch = Batch(
        tokens=tokens,
        segment_ids=slot + 1,
        positions=indices,
        source_index=np.maximum(indices - 1, 0),
        loss_mask=mask,
        slot=slot,
        loss_index=index,
        lengths=lengths,
        weight=np.ones(N, np.float32),
        last_index=np.full((N, slots), 3, np.int32),
    )
    return jax.tree.map(jnp.asarray, batch)


def inputs(dtype=jnp.float32):
    rng = np.random.default_rng(1)
    return (
        jnp.asarray(rng.normal(size=(N, T, D)), dtype),
        jnp.asarray(rng.normal(size=(D, V)), jnp.float32),
    )


def head(matrix):
    return lambda x: jnp.einsum("...d,dv->...v", x.astype(jnp.float32), matrix)


def direct(hidden, matrix, batch):
    """All logits at once, float64 NumPy."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(matrix, np.float64)
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = np.zeros((N, T))
    for n, t in zip(*np.nonzero(batch.loss_mask)):
        found[n, t] = logps[n, batch.source_index[n, t], batch.tokens[n, t]]
    return found, logps


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_equals_the_log_softmax_of_all_logits(slots, chunk):
    batch, (hidden, matrix) = make_batch(slots), inputs()
    found = logprobs.token_outputs(
        hidden, head(matrix), batch, needs=("entropy", "most_probable", "log_sum_sq"), chunk=chunk
    )
    expected, logps = direct(hidden, matrix, batch)
    np.testing.assert_allclose(found.token_logps, expected, rtol=1e-5, atol=1e-5)
    for s in range(slots):
        mine = np.where(batch.slot == s, expected, 0).sum(1)
        np.testing.assert_allclose(found.logps[:, s], mine, rtol=1e-5, atol=1e-5)
    p = np.exp(logps)
    for field, every in (
        ("entropy", -(p * logps).sum(-1)),
        ("log_sum_sq", np.log((p * p).sum(-1))),
    ):
        wanted = np.where(
            batch.loss_mask, np.take_along_axis(every, np.asarray(batch.source_index), 1), 0
        )
        np.testing.assert_allclose(getattr(found, field), wanted, rtol=1e-4, atol=1e-5)
    best = np.take_along_axis(logps.argmax(-1), np.asarray(batch.source_index), 1) == batch.tokens
    np.testing.assert_array_equal(found.most_probable, batch.loss_mask & best)


def test_kl_is_the_reference_to_the_policy():
    batch, (hidden, matrix) = make_batch(), inputs()
    found = logprobs.token_outputs(
        hidden, head(matrix), batch, needs=("kl",), reference=(0.5 * hidden, head(matrix)), chunk=4
    )
    _, policy = direct(hidden, matrix, batch)
    _, reference = direct(0.5 * hidden, matrix, batch)
    every = (np.exp(reference) * (reference - policy)).sum(-1)
    wanted = np.where(
        batch.loss_mask, np.take_along_axis(every, np.asarray(batch.source_index), 1), 0
    )
    np.testing.assert_allclose(found.kl, wanted, rtol=1e-4, atol=1e-5)
    same = logprobs.token_outputs(
        hidden, head(matrix), batch, needs=("kl",), reference=(hidden, head(matrix)), chunk=4
    )
    np.testing.assert_allclose(same.kl, 0.0, atol=1e-6)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def jensen_shannon(beta, temperature, xp, log_softmax, policy, reference):
    """Agarwal et al. 2306.13649, equation 1, of whole logits."""
    p, q = (log_softmax(logits / temperature) for logits in (policy, reference))
    if beta in (0.0, 1.0):
        a, b = (q, p) if beta == 0 else (p, q)
        return (xp.exp(a) * (a - b)).sum(-1)
    m = xp.log(beta * xp.exp(q) + (1 - beta) * xp.exp(p))
    return beta * (xp.exp(q) * (q - m)).sum(-1) + (1 - beta) * (xp.exp(p) * (p - m)).sum(-1)


@pytest.mark.parametrize("beta, temperature", [(0.0, 1.0), (1.0, 2.0), (0.5, 1.0), (0.1, 0.7)])
def test_divergence_and_its_gradient_are_those_of_whole_distributions(beta, temperature):
    batch, (hidden, matrix) = make_batch(), inputs()
    divergence = logprobs.Divergence(beta, temperature)

    def chunked(hidden, matrix):
        found = logprobs.token_outputs(
            hidden,
            head(matrix),
            batch,
            needs=("divergence",),
            reference=(0.5 * hidden, head(matrix)),
            divergence=divergence,
            chunk=4,
        )
        return found.divergence.sum(), found.divergence

    def at_once(hidden, matrix):
        reference = jax.lax.stop_gradient(head(matrix)(0.5 * hidden))
        every = jensen_shannon(
            beta, temperature, jnp, jax.nn.log_softmax, head(matrix)(hidden), reference
        )
        every = jnp.take_along_axis(every, batch.source_index, axis=1)
        return jnp.where(batch.loss_mask, every, 0.0).sum()

    (_, found), grads = jax.value_and_grad(chunked, (0, 1), has_aux=True)(hidden, matrix)
    _, policy = direct(hidden, matrix, batch)
    _, reference = direct(0.5 * hidden, matrix, batch)
    every = jensen_shannon(beta, temperature, np, log_softmax, policy, reference)
    wanted = np.take_along_axis(every, np.asarray(batch.source_index), 1)
    np.testing.assert_allclose(found, np.where(batch.loss_mask, wanted, 0), rtol=1e-4, atol=1e-5)
    for a, b in zip(grads, jax.grad(at_once, (0, 1))(hidden, matrix)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_gradient_equals_that_of_all_logits_at_once():
    batch, (hidden, matrix) = make_batch(2), inputs()
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(N, T)), jnp.float32)

    def chunked(hidden, matrix):
        found = logprobs.token_outputs(hidden, head(matrix), batch, needs=("entropy",), chunk=2)
        return (weights * (found.token_logps + 0.3 * found.entropy)).sum()

    def at_once(hidden, matrix):
        logps = jax.nn.log_softmax(head(matrix)(hidden))
        logps = jnp.take_along_axis(logps, batch.source_index[:, :, None], axis=1)
        token = jnp.take_along_axis(logps, batch.tokens[:, :, None], axis=2)[:, :, 0]
        entropy = -(jnp.exp(logps) * logps).sum(-1)
        return jnp.where(batch.loss_mask, weights * (token + 0.3 * entropy), 0.0).sum()

    for a, b in zip(
        jax.grad(chunked, (0, 1))(hidden, matrix), jax.grad(at_once, (0, 1))(hidden, matrix)
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_no_gradient_reaches_the_reference_or_the_alignment_weights():
    batch, (hidden, matrix) = make_batch(), inputs()

    def f(reference, hidden):
        found = logprobs.token_outputs(
            hidden,
            head(matrix),
            batch,
            needs=("kl", "log_sum_sq"),
            chunk=4,
            reference=(reference, head(matrix)),
        )
        return found.kl.sum(), found.log_sum_sq.sum()

    assert not jax.grad(lambda x: f(x, hidden)[0])(hidden).any()
    assert not jax.grad(lambda x: f(hidden, x)[1])(hidden).any()


def test_compiled_program_holds_one_chunk_of_logits():
    batch, (hidden, matrix) = make_batch(budget=T), inputs()
    grad = jax.grad(
        lambda h, m: logprobs.token_outputs(h, head(m), batch, chunk=3).token_logps.sum(), (0, 1)
    )
    text = jax.jit(grad).lower(hidden, matrix).compile().as_text()
    sizes = [
        np.prod([int(size) for size in shape.split(",")])
        for shape in re.findall(rf"f32\[([\d,]*{V})\]", text)
    ]
    assert max(sizes) == N * 3 * V  # [N, c, V]; not [N, P, V], nor stacked over the chunks


def test_the_head_is_not_applied_to_a_chunk_of_positions_that_no_row_uses():
    batch, (hidden, matrix) = make_batch(), inputs()
    longest, calls = int(batch.loss_mask.sum(1).max()), []

    def counted(x):
        jax.debug.callback(lambda: calls.append(1))
        return head(matrix)(x)

    index = jnp.pad(batch.loss_index, ((0, 0), (0, 13)), constant_values=T)
    logprobs.token_outputs(hidden, counted, batch._replace(loss_index=index), chunk=2)
    jax.effects_barrier()
    assert len(calls) == -(-longest // 2)  # of 12 chunks


def test_masked_vocabulary_and_bfloat16_hidden_states_are_finite_and_float32():
    batch, (hidden, matrix) = make_batch(), inputs(jnp.bfloat16)
    mask = jnp.where(jnp.arange(V) < V - 5, 0.0, -jnp.inf)[None, None]
    tokens = jnp.minimum(batch.tokens, V - 6)
    batch = batch._replace(tokens=tokens)

    def f(hidden):
        found = logprobs.token_outputs(
            hidden,
            lambda x: head(matrix)(x) + mask,
            batch,
            chunk=4,
            needs=("entropy", "log_sum_sq", "kl", "divergence"),
            reference=(hidden, lambda x: head(matrix)(x) + mask),
        )
        assert all(x.dtype == jnp.float32 for x in found if x is not None and x.dtype != jnp.int32)
        return found.token_logps.sum() + found.entropy.sum() + (found.kl + found.divergence).sum()

    value, grad = jax.value_and_grad(f)(hidden)
    assert np.isfinite(value) and np.isfinite(grad.astype(jnp.float32)).all()


def test_logits_rounded_to_bfloat16_would_cost_a_hundredth_of_a_nat():
    """HALOs casts logits to bf16 before the log-softmax; ours stay float32 whatever the hidden
    states are."""
    batch, (hidden, matrix) = make_batch(), inputs()
    ours = logprobs.token_outputs(hidden, head(4 * matrix), batch, chunk=4).token_logps
    rounded = logprobs.token_outputs(
        hidden,
        lambda x: head(4 * matrix)(x).astype(jnp.bfloat16).astype(jnp.float32),
        batch,
        chunk=4,
    ).token_logps
    exact, _ = direct(hidden, 4 * matrix, batch)
    assert np.abs(ours - exact).max() < 1e-4 < 1e-2 < np.abs(rounded - exact).max()


def test_heads_are_read_where_they_speak():
    batch = make_batch(2)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(N, T)), jnp.float32)
    np.testing.assert_array_equal(logprobs.at_last(x, batch), np.repeat(x[:, 3:4], 2, axis=1))
    shifted = np.where(batch.loss_mask, np.concatenate([x[:, :1], x[:, :-1]], axis=1), 0)
    np.testing.assert_array_equal(logprobs.at_sources(x, batch), shifted)
    sums = jnp.asarray(np.random.default_rng(1).normal(size=(N, 2)), jnp.float32)
    spread = logprobs.spread_to_tokens(sums, batch)
    np.testing.assert_allclose(
        logprobs.sum_by_slot(spread, batch), sums * batch.lengths.astype(jnp.float32), rtol=1e-5
    )
    with pytest.raises(ValueError, match="last_index"):
        logprobs.at_last(x, batch._replace(last_index=None))


def test_mistakes_are_named():
    batch, (hidden, matrix) = make_batch(), inputs()
    with pytest.raises(ValueError, match="cannot compute"):
        logprobs.token_outputs(hidden, head(matrix), batch, needs=("entrop",), chunk=4)
    with pytest.raises(ValueError, match="the reference's hidden"):
        logprobs.token_outputs(hidden, head(matrix), batch, needs=("kl",), chunk=4)
    with pytest.raises(ValueError, match="chunk"):
        logprobs.token_outputs(hidden, head(matrix), batch, chunk=0)
