# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings that depend on a length are chosen once, by the run's: sampled and rescored,
alone and packed, trained and read again."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from align_jax.core import config as configs
from align_jax.data.tokenizer import byte_tokenizer
from align_jax.inference.generate import Generator, Request
from align_jax.inference.samplers import Sampling
from align_jax.interop import hf
from align_jax.models.model import build
from align_jax.models.rope import frequencies
from align_jax.runs import setup
from align_jax.runs.weights import load_model

ORIGINAL = 12
FIELDS = dict(
    model_type="phi3",
    vocab_size=272,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=48,
    original_max_position_embeddings=ORIGINAL,
    pad_token_id=0,
    initializer_range=0.4,
    rope_scaling={
        "type": "longrope",
        "short_factor": [1.0, 1.0, 1.0, 1.0],
        "long_factor": [1.5, 3.0, 8.0, 20.0],
    },
)
PROMPT = tuple(range(3, 11))


def model_of(run_length):
    config = dataclasses.replace(hf.config_from(FIELDS), run_length=run_length)
    return build(config, compute_dtype="float32", remat="none")


def logits(model, params, tokens, segments, positions, length=24):
    """Score one row, padded to one length, so that it is one program."""
    fields = [np.zeros((1, length), np.int32) for _ in range(3)]
    for field, given in zip(fields, (tokens, segments, positions)):
        field[0, : len(given)] = given
    apply = jax.jit(lambda *fields: model.unembed(params, model.hidden(params, *fields)[0]))
    return np.asarray(apply(*fields))[0]


def test_sampled_and_rescored_alone_and_packed_are_the_same():
    model, found = model_of(24), {}
    params = model.init(jax.random.key(0))
    generator = Generator(model, byte_tokenizer(), rows=1, stop_ids=())
    one = generator(params, [Request(PROMPT, 1, 24, Sampling(temperature=0.0))])[0][0]
    text = [*PROMPT, *one.tokens.tolist()]
    assert len(text) == 24  # the run's length ends it
    scored = jax.nn.log_softmax(logits(model, params, text, [1] * 24, range(24)))
    places = np.arange(len(PROMPT), 24)
    np.testing.assert_allclose(scored[places - 1, text[8:]], one.token_logps, atol=1e-4)
    for run_length in (ORIGINAL, 24):
        model = model_of(run_length)
        alone = logits(model, params, PROMPT, [1] * 8, range(8))[:8]
        beside = [*PROMPT, *range(20, 32)]
        packed = logits(model, params, beside, [1] * 8 + [2] * 12, [*range(8), *range(12)])[:8]
        np.testing.assert_allclose(packed, alone, atol=1e-5)
        found[run_length] = alone
    assert np.abs(found[ORIGINAL] - found[24]).max() > 0.1


def test_a_row_beyond_the_border_needs_the_run_s_length():
    model, row = model_of(0), np.arange(ORIGINAL + 1)
    params = model.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"rows of 13 tokens.*longrope.*beyond 12.*run_length="):
        logits(model, params, row, np.ones_like(row), row, len(row))
    with pytest.raises(ValueError, match="max_length = 24 is more than the model's 12 positions"):
        Generator(model, byte_tokenizer(), rows=1, max_length=24)
    assert model_of(0).config.longest == ORIGINAL and model_of(99).config.longest == 48


def test_a_run_and_what_it_exports_keep_its_length(tmp_path):
    model = model_of(0)
    folder, out = str(tmp_path / "model"), str(tmp_path / "out")
    hf.save(folder, model.config, model.init(jax.random.key(0)))
    assert "align_jax_run_length" not in json.loads((tmp_path / "model/config.json").read_text())
    byte_tokenizer().save_pretrained(folder)
    config = configs.defaults()
    config.update(max_length=24, total_steps=1)
    config.model.path = config.reference.path = folder
    config.objective.name, config.data.train = "dpo", "builtin:pairs"
    resolved = setup.resolve_config(configs.read(config), 1)
    models = resolved.models
    for one in (
        resolved.model_config,
        models.policy.config,
        models.base.config,
        models.other.config,
    ):
        assert one.run_length == 24
    assert "the long factors" in resolved.model_config.rope_note()
    hf.save(
        out,
        dataclasses.replace(resolved.model_config, vocab_rows=272),
        model.init(jax.random.key(0)),
    )
    for path, given, length in ((out, 0, 24), (out, 10, 10), (folder, 0, 0), (folder, 99, 48)):
        found = load_model(path, max_length=given).config
        assert (found.run_length, found.longest) == (length, length or ORIGINAL)


def test_other_embeddings_know_no_border():
    config = hf.config_from(FIELDS | {"rope_scaling": None})
    assert (config.limit, config.longest, config.rope_note()) == (0, 48, "")
    (rope,) = config.ropes
    np.testing.assert_array_equal(frequencies(rope, 8)[0], frequencies(rope, 4096)[0])
