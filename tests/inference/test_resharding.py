# SPDX-License-Identifier: Apache-2.0
"""The copy of the weights that generation works with: where it lies, and that nothing is computed
differently."""

import jax
import numpy as np
import pytest

from align_jax.core.tree import flatten
from align_jax.data.tokenizer import load_tokenizer
from align_jax.inference import decoding, resharding
from align_jax.inference.engines import Local
from align_jax.inference.generate import Generator, Request
from align_jax.interop import hf
from align_jax.models.lora import LoraConfig
from align_jax.models.model import build
from align_jax.parallel.mesh import make_mesh
from align_jax.training.partitioning import abstract_params

CONFIG = hf.config_from(
    dict(
        model_type="llama",
        vocab_size=272,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
)
REQUESTS = [Request(tuple(range(1, 3 + i)), samples=2, max_new_tokens=8, seed=i) for i in range(4)]


@pytest.fixture(scope="module")
def training():
    """A policy in bfloat16 with an adapter and a value head, its float32 weights over fsdp and
    tensor."""
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    model = build(
        CONFIG,
        compute_dtype="bfloat16",
        remat="none",
        lora=LoraConfig(2),
        heads=("value",),
        unembed=True,
    )
    params = jax.jit(
        model.init,
        out_shardings=jax.tree.map(
            lambda x: x.sharding, abstract_params(mesh, model.shapes(), model.axes())
        ),
    )(jax.random.key(0))
    return mesh, model, params


def test_neighbors_share_the_weights_and_the_rows(training):
    mesh, model, params = training
    where = resharding.decode_mesh(mesh, 2)
    assert dict(where.shape) == {"data": 4, "fsdp": 1, "expert": 1, "sequence": 1, "tensor": 2}
    assert [device.id for device in where.devices.flat] == list(range(8))
    placed = flatten(resharding.make_resharder(model, where)(params))
    assert not any(path.startswith("value/") for path in placed)
    up = placed["layers/mlp/up/kernel"]
    assert (str(up.dtype), up.sharding.shard_shape(up.shape)) == ("bfloat16", (2, 32, 16))
    scale = placed["layers/mlp_norm/scale"]  # multiplied in float32
    assert (str(scale.dtype), scale.sharding.shard_shape(scale.shape)) == ("float32", (2, 32))
    wanted = flatten(resharding.decode_specs(model, params, where))
    for path, leaf in placed.items():
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (
            wanted[path].shape,
            wanted[path].dtype,
            wanted[path].sharding,
        ), path
        np.testing.assert_array_equal(leaf, flatten(params)[path].astype(leaf.dtype))


def test_a_host_s_devices_must_divide(training):
    with pytest.raises(
        ValueError, match="config.rollout.tensor = 3: expected a divisor of the 8 devices of a host"
    ):
        resharding.decode_mesh(training[0], 3)


def test_completions_are_those_of_the_training_layout(training):
    mesh, model, params = training
    tokenizer = load_tokenizer("byte")

    def make(mesh):
        return Generator(model, tokenizer, rows=8, max_length=24, mesh=mesh, prompt_bucket=16)

    expected = make(mesh)(params, REQUESTS)
    where = resharding.decode_mesh(mesh, 2)
    engine = Local(make(where), None, resharding.make_resharder(model, where))
    engine.update(params)
    before = decoding.decode._cache_size()
    found = engine(REQUESTS)
    for several, others in zip(expected, found, strict=True):
        for one, other in zip(several, others, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            # bfloat16 sums, another order
            np.testing.assert_allclose(one.token_logps, other.token_logps, atol=0.03)
    engine.release()
    engine.update(jax.tree.map(lambda x: x + 0, params))
    engine(REQUESTS)
    assert decoding.decode._cache_size() == before + 1
