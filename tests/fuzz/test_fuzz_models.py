# SPDX-License-Identifier: Apache-2.0
"""Bytes damaged in a run's log, a model's files and a chat template; fields of a model's config
replaced; reward functions that return anything."""

import json
import math

import hypothesis
import jax
import junk
import numpy as np
import pytest
from hypothesis import strategies as st
from oracle import Wrong, fuzzed, judge

from align_jax.core.metrics import read_rows
from align_jax.core.schema import Example
from align_jax.data.chat import encode_many
from align_jax.data.tokenizer import load_tokenizer
from align_jax.interop import hf
from align_jax.models.model import build
from align_jax.online import rewards

CONFIG = dict(
    model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=272, hidden_size=16,
    intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    max_position_embeddings=64, rms_norm_eps=1e-6, hidden_act="silu", rope_theta=1e4,
    tie_word_embeddings=False, head_dim=8, attention_bias=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sound model, whose files a case damages and puts back."""
    path = tmp_path_factory.mktemp("model")
    config = hf.config_from(CONFIG)
    model = build(config, compute_dtype="float32", remat="none")
    hf.save(str(path), config, model.init(jax.random.key(0)))
    return path


@st.composite
def damages(draw, size):
    """Cuts, flips and insertions, as functions of bytes."""
    how, at = draw(st.sampled_from(("cut", "flip", "insert"))), draw(st.integers(0, size - 1))
    if how == "cut":
        return lambda data: data[:at]
    if how == "flip":
        bit = 1 << draw(st.integers(0, 7))
        return lambda data: data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
    more = draw(st.binary(min_size=1, max_size=9))
    return lambda data: data[:at] + more + data[at:]


@fuzzed(short=40, share=1)
@hypothesis.given(name=st.sampled_from(sorted(CONFIG)), value=junk.values)
def test_a_field_of_a_models_config_is_used_or_named(folder, name, value):
    path = folder / "config.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(before) | {name: value}))
        judge(
            "model configs",
            {name: value},
            lambda: hf.load(str(folder), dtype="float32"),
            names=[name, "config.json", str(folder)],
        )
    finally:
        path.write_text(before)


@fuzzed(short=40, share=1)
@hypothesis.given(damage=damages(6000))
def test_damaged_weights_are_named_or_the_same_shape(folder, damage):
    path = folder / "model.safetensors"
    before = path.read_bytes()
    try:
        path.write_bytes(damage(before))
        judge(
            "weights",
            damage(before)[:200],
            lambda: hf.load(str(folder), dtype="float32")[1],
            names=[str(folder)],
            check=finite,
        )
    finally:
        path.write_bytes(before)


def finite(params):
    for leaf in jax.tree.leaves(params):
        if not np.isfinite(np.asarray(leaf)).all():
            raise Wrong("weights that are not finite")


TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
EXAMPLE = Example(({"role": "user", "content": "ask"},), ("answer",), source="data.jsonl:1")


@fuzzed(short=40, share=1)
@hypothesis.given(damage=damages(len(TEMPLATE)))
def test_a_damaged_template_is_named_or_keeps_the_answer(damage):
    template = damage(TEMPLATE.encode()).decode(errors="replace")

    def act():
        tokenizer = load_tokenizer("byte", chat_template=template)
        (found,) = encode_many([EXAMPLE], tokenizer)
        ids = np.asarray(found.responses[0])[np.asarray(found.masks[0])]
        return tokenizer.decode(ids)

    def check(learned):
        if "answer" not in learned:
            raise Wrong(f"learned {learned!r}")

    judge("templates", template, act, names=["template", "data.jsonl:1", "tokenizer"], check=check)


@fuzzed(short=40, share=1)
@hypothesis.given(found=st.one_of(junk.values, st.lists(junk.values, min_size=2, max_size=2)))
def test_what_a_reward_function_returns_is_numbers_or_named(found):
    def check(values):
        if len(values) != 2 or any(math.isinf(value) for value in values):
            raise Wrong(f"{found!r} became {values!r}")

    judge("rewards", found, lambda: list(call(found)), names=["made_up"], check=check)


def call(found):
    weighted = rewards.WeightedRewards((("made_up", 1.0, lambda p, c, e: found),))
    return weighted(["p", "p"], ["a", "b"], [{}, {}])[0]


LOG = "".join(
    json.dumps({"step": step, "loss": 1.5, "text": "é\u2028"}, ensure_ascii=False) + "\n"
    for step in range(4)
)


@fuzzed(short=40, share=1)
@hypothesis.given(damage=damages(len(LOG.encode())))
def test_a_damaged_log_is_read_without_a_cut_line_or_named(tmp_path_factory, damage):
    path = tmp_path_factory.getbasetemp() / "metrics.jsonl"
    path.write_bytes(damage(LOG.encode()))

    def check(rows):
        steps = [row["step"] for row in rows]
        if not set(steps) <= {0, 1, 2, 3, *range(10)}:
            raise Wrong(f"steps {steps}")

    judge("logs", path.read_bytes(), lambda: read_rows(path), names=["metrics.jsonl:"], check=check)
