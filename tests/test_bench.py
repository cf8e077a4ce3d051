# SPDX-License-Identifier: Apache-2.0
"""The bench measures what it says: the same examples through every variant, errors kept apart."""

from __future__ import annotations

import jax
import pytest

from align_jax import bench
from align_jax.core import config as configs
from align_jax.parallel.mesh import make_mesh

PRESET = bench.Preset(
    dict(
        vocab_size=272,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
    ),
    "dpo",
    8,
    64,
    24,
    12,
    "float32",
    ("base", "layout=plain", "reference=cached"),
)


def test_variants_are_measured_side_by_side_and_failures_told():
    names = (*PRESET.variants, "attention=splash")  # which no CPU can run
    rows = bench.measure(PRESET, names, make_mesh({}, jax.devices()[:1]), rounds=2, steps=1)
    assert "error" in rows["attention=splash"]
    base, plain, cached = (rows[name] for name in PRESET.variants)
    for row in (base, plain, cached):
        assert "error" not in row, row
        assert row["seconds"] > 0 and row["bytes"] > 0 and row["groups"] > 0
    assert plain["padding_fraction"] != base["padding_fraction"]
    assert base["mfu"] is None  # of a CPU no peak is known
    text = bench.table({name: rows[name] for name in names}, "base")
    assert "1.00" in text.splitlines()[1] and len(text.splitlines()) == 1 + len(names)


@pytest.mark.parametrize("name", bench.PRESETS)
def test_presets_are_valid_and_their_examples_fit(name):
    preset = bench.PRESETS[name]
    configs.read(bench.make_config(preset, {}))
    assert set(preset.variants) <= set(bench.VARIANTS)
    for example in bench.make_examples(preset).items:
        assert len(example.prompt) + max(map(len, example.responses)) <= preset.max_length
