# SPDX-License-Identifier: Apache-2.0
"""Samplers: against transformers' processors, against the probabilities, and row by row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process

from align_jax.inference import samplers
from align_jax.inference.samplers import Sampling

PROCESSORS = {
    "temperature": logits_process.TemperatureLogitsWarper,
    "top_k": logits_process.TopKLogitsWarper,
    "top_p": logits_process.TopPLogitsWarper,
    "min_p": logits_process.MinPLogitsWarper,
    "repetition_penalty": logits_process.RepetitionPenaltyLogitsProcessor,
}
draw = functools.partial(jax.jit, static_argnames="filters")(samplers.draw)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 1.3, "temperature": 1.4, "top_k": 12, "top_p": 0.7, "min_p": 0.1},
    ],
)
def test_adjusted_distribution_is_transformers(options):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 40)).astype(np.float32) * 2
    tokens = rng.integers(0, 40, (6, 10))
    expected = torch.tensor(logits)
    for name in ("repetition_penalty", "temperature", "top_k", "top_p", "min_p"):
        if name in options:
            expected = PROCESSORS[name](options[name])(torch.tensor(tokens), expected)
    seen = np.zeros((6, 40), bool)
    np.put_along_axis(seen, tokens, True, axis=1)
    settings, filters = samplers.stack([Sampling(**options)] * 6)
    assert filters == frozenset(options)
    got = samplers.adjust(
        jnp.asarray(logits), jax.tree.map(jnp.asarray, settings), filters, jnp.asarray(seen)
    )
    np.testing.assert_allclose(jax.nn.softmax(got), torch.softmax(expected, -1), atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"top_p": 0.05}, {"top_p": 0.5}, {"top_k": 2}, {"top_k": 4, "top_p": 0.6}]
)
def test_as_many_of_equal_logits_are_kept_as_in_transformers(options):
    logits = np.float32([[0.0] * 10, [1, 1, 1, 0, 0, 0, 0, -1, -1, -1]])
    expected = torch.tensor(logits)
    for name, value in options.items():
        expected = PROCESSORS[name](value)(None, expected)
    settings, filters = samplers.stack([Sampling(**options)] * 2)
    got = samplers.adjust(jnp.asarray(logits), jax.tree.map(jnp.asarray, settings), filters, None)
    kept = np.asarray(got) > -1e29
    assert kept.sum(1).tolist() == torch.isfinite(expected).sum(1).tolist()
    assert kept[:, 0].all()  # the first ones, where a choice is to be made


def test_drawn_frequencies_pass_a_chi_square_test():
    logits = jnp.asarray([[1.0, 0.0, -1.0, 2.0, 0.5, -30.0]])
    probabilities = np.asarray(jax.nn.softmax(logits[0, :5]))
    settings, filters = samplers.stack([Sampling()])
    n = 4000
    keys = samplers.row_keys(np.full(n, 7), np.arange(n))
    wide = samplers.Settings(*(jnp.repeat(jnp.asarray(x), n) for x in settings))
    tokens, _, _ = draw(
        keys, jnp.zeros(n, jnp.int32), jnp.repeat(logits, n, 0), wide, filters=filters
    )
    counts = np.bincount(np.asarray(tokens), minlength=6)
    statistic = np.sum((counts[:5] - n * probabilities) ** 2 / (n * probabilities))
    assert counts[5] == 0 and statistic < 18.47  # the 0.999 quantile with 4 degrees of freedom


def test_excluded_and_rare_tokens_of_a_large_vocabulary_are_drawn_as_often_as_they_should():
    n, vocabulary = 20000, 5003
    logits = np.full(vocabulary, -1e30, np.float32)
    logits[[3, 700, 2500, 5002]] = np.log([0.5, 0.25, 0.2, 0.05])
    tokens = samplers.categorical(
        samplers.row_keys(np.arange(n, 2 * n), np.zeros(n, int)),
        jnp.broadcast_to(jnp.asarray(logits), (n, vocabulary)),
    )
    counts = np.bincount(np.asarray(tokens), minlength=vocabulary)
    expected = n * np.exp(logits.astype(np.float64))
    kept = expected > 0
    # 3 df
    assert (
        counts[~kept].sum() == 0
        and np.sum((counts[kept] - expected[kept]) ** 2 / expected[kept]) < 16.3
    )


def test_each_row_follows_its_own_settings_whatever_its_neighbors():
    rng = np.random.default_rng(1)
    rows = [
        Sampling(temperature=0.0),
        Sampling(top_k=1),
        Sampling(temperature=0.5, top_p=0.9),
        Sampling(min_p=0.3),
        Sampling(temperature=2.0),
    ]
    logits = jnp.asarray(rng.normal(size=(5, 30)).astype(np.float32))
    positions = jnp.arange(5)
    keys = samplers.row_keys(np.arange(5), np.zeros(5, int))
    settings, filters = samplers.stack(rows)
    tokens, logps, drawn = draw(keys, positions, logits, settings, filters=filters)
    assert list(tokens[:2]) == list(jnp.argmax(logits, -1)[:2])
    np.testing.assert_array_equal(drawn[:2], 0.0)
    np.testing.assert_allclose(
        logps,
        np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(tokens)[:, None], 1)[
            :, 0
        ],
        rtol=1e-6,
    )
    for i, one in enumerate(rows):
        alone, own = samplers.stack([one])
        got = draw(keys[i : i + 1], positions[i : i + 1], logits[i : i + 1], alone, filters=own)
        assert int(got[0][0]) == int(tokens[i])


def test_a_row_that_keeps_all_is_untouched_by_its_neighbors_filters():
    # so many tokens that the sum of their probabilities passes 1 by rounding before the last
    logits = jnp.asarray(2 * np.random.default_rng(0).normal(size=(4, 151_936)).astype(np.float32))
    settings, filters = samplers.stack([Sampling()] * 3 + [Sampling(top_p=0.9)])
    got = samplers.adjust(logits, jax.tree.map(jnp.asarray, settings), filters, None)
    np.testing.assert_array_equal(got[:3], logits[:3])
    assert 0 < (np.asarray(got[3]) > -1e29).sum() < 151_936


def test_a_temperature_too_small_to_divide_by_is_greedy():
    settings, filters = samplers.stack([Sampling(temperature=1e-7), Sampling(temperature=1e-4)])
    assert settings.temperature.tolist() == [0.0, np.float32(1e-4)]
    logits = jnp.asarray([[1.0, 3.0, 3.1]] * 2)
    keys = samplers.row_keys(np.arange(2), np.zeros(2, int))
    tokens, logps, _ = draw(keys, jnp.arange(2), logits, settings, filters=filters)
    assert tokens.tolist() == [2, 2] and np.isfinite(logps).all()


def test_keys_differ_by_seed_sample_and_position():
    logits = jnp.zeros((1, 1 << 20))
    settings, filters = samplers.stack([Sampling()])
    seen = {
        int(
            draw(
                samplers.row_keys(np.array([seed]), np.array([sample])),
                jnp.array([position]),
                logits,
                settings,
                filters=filters,
            )[0][0]
        )
        for seed in (0, 1)
        for sample in (0, 1)
        for position in (0, 1)
    }
    assert len(seen) == 8


@pytest.mark.parametrize(
    "name,value",
    [
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.5),
        ("repetition_penalty", 0.0),
    ],
)
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        Sampling(**{name: value})
