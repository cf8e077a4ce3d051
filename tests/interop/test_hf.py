# SPDX-License-Identifier: Apache-2.0
"""Import into shardings: each device reads its own part, and the host never holds more than a
tensor."""

import dataclasses
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.core.tree import flatten
from align_jax.interop import hf, streaming
from align_jax.models.model import build
from align_jax.models.tensor_map import TensorMap, parse
from align_jax.parallel.mesh import make_mesh
from align_jax.parallel.sharding import tree_shardings

SHAPE = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=16,
    pad_token_id=0,
)
EXTRA = {
    "llama": {"head_dim": 12},
    "phi3": {},
    "gpt2": {},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4},
    "olmo2": {},
}


def saved(tmp_path, family, **changes):
    config = hf.config_from({"model_type": family} | SHAPE | EXTRA[family] | changes)
    params = build(config).init(jax.random.key(0))
    noise = iter(jax.random.split(jax.random.key(1), 100))
    params = jax.tree.map(lambda x: x + jax.random.normal(next(noise), x.shape), params)
    hf.save(str(tmp_path), config, params, shard_bytes=20_000)
    return config, params


@pytest.mark.parametrize("family", EXTRA)
def test_every_device_reads_its_own_part(tmp_path, family):
    config, params = saved(tmp_path, family)
    config = config.padded(4)
    mesh = make_mesh({"fsdp": 2, "tensor": 2, "expert": 2})
    shardings = tree_shardings(mesh, build(config).axes())
    _, sharded = hf.load(str(tmp_path), config=config, shardings=shardings)
    for path, got in flatten(sharded).items():
        expected = np.asarray(flatten(params)[path])
        np.testing.assert_array_equal(
            np.asarray(got)[tuple(map(slice, expected.shape))], expected, err_msg=path
        )
    for path, got in flatten(sharded).items():
        assert got.sharding == flatten(shardings)[path], path


def test_a_checkpoint_is_read_for_a_model_that_computes_the_same(tmp_path):
    """What a model started from, and how long its rows may be, makes no other model of it."""
    config, params = saved(tmp_path, "llama")
    asked = dataclasses.replace(config, init_std=0.5, max_positions=99, run_length=8)
    _, found = hf.load(str(tmp_path), config=asked)
    np.testing.assert_array_equal(found["embed"]["tokens"], params["embed"]["tokens"])
    for change, words in (
        ({"num_heads": 2}, "another model .*: num_heads is 4, expected 2"),
        ({"norm_eps": 0.1}, "norm_eps is 1e-06, expected 0.1"),
    ):
        with pytest.raises(ValueError, match=words):
            hf.load(str(tmp_path), config=dataclasses.replace(config, **change))


def test_learned_positions_are_as_many_as_asked_for(tmp_path):
    config, _ = saved(tmp_path, "gpt2")
    with pytest.raises(ValueError, match="max_positions is 16, expected 99"):
        hf.load(str(tmp_path), config=dataclasses.replace(config, max_positions=99))


def test_an_import_holds_no_more_than_its_largest_tensor(tmp_path, monkeypatch):
    _, params = saved(
        tmp_path,
        "llama",
        vocab_size=16384,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
    )
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    largest = params["embed"]["tokens"].nbytes
    assert held > 3 * largest
    del params
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 1 << 18)
    tracemalloc.start()
    hf.load(str(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]  # numpy's memory, and Python's while compiling
    tracemalloc.stop()
    assert peak < 1.3 * largest + (16 << 20), f"{peak / largest:.2f} of the largest tensor"


@pytest.mark.parametrize(
    "layout, index",
    [
        ("(H h) D -> D H h", (slice(3, 17), slice(1, 3), slice(0, 8))),
        ("D (3:1 H h) -> D H h", (slice(0, 5), slice(0, 4), slice(0, 8))),
        ("(H 3:2 h) D -> D H h", (slice(2, 9), slice(2, 4), slice(0, 8))),
        ("(2:1 F) D -> D F", (slice(0, 32), slice(7, 31))),
    ],
    ids=str,
)
def test_layouts_invert_and_slice(layout, index):
    config = hf.config_from({"model_type": "llama"} | SHAPE)
    parsed = parse(TensorMap("w", "w", layout), config)
    theirs = np.random.default_rng(0).normal(size=parsed.their_shape).astype(np.float32)
    everything = [slice(None)] * len(parsed.ours)
    whole = parsed.to_ours(theirs[parsed.bounds(everything)], everything)
    assert whole.shape == parsed.our_shape
    np.testing.assert_array_equal(parsed.to_ours(theirs[parsed.bounds(index)], index), whole[index])
    again = np.full_like(theirs, np.nan)
    parsed.to_theirs(whole, again)
    kept = ~np.isnan(again)
    assert kept.sum() == whole.size
    np.testing.assert_array_equal(again[kept], theirs[kept])


def test_half_precision_checkpoints_are_exact_in_float32(tmp_path):
    for dtype in ("bfloat16", "float16", "float32"):
        config = hf.config_from({"model_type": "llama"} | SHAPE)
        params = build(config).init(jax.random.key(0), jnp.dtype(dtype))
        hf.save(str(tmp_path / dtype), config, params)
        _, got = hf.load(str(tmp_path / dtype), dtype="float32")
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(a, np.asarray(b, np.float32)), got, params
        )
        assert jax.tree.leaves(hf.load(str(tmp_path / dtype))[1])[0].dtype == dtype
