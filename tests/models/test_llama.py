# SPDX-License-Identifier: Apache-2.0
"""The Llama decoder against transformers, and its weights both ways."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from align_jax.core.tree import flatten
from align_jax.interop import hf
from align_jax.models.model import build

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def tiny(tmp_path, **changes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **dict(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
        | changes
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


def rows(vocab, count=2, length=19, seed=0):
    tokens = np.random.default_rng(seed).integers(0, vocab, (count, length)).astype(np.int32)
    return (
        tokens,
        np.ones_like(tokens),
        np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
    )


def logits(model, params, tokens, segments, positions):
    @jax.jit
    def run(params, *fields):
        return model.unembed(params, model.hidden(params, *fields)[0])

    return np.asarray(run(params, *map(jnp.asarray, (tokens, segments, positions))))


def reference(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 12},
        {"rope_parameters": LLAMA3},
        {"num_key_value_heads": 4},
    ],
    ids=str,
)
def test_logits_equal_transformers(tmp_path, changes):
    path, peer = tiny(tmp_path, **changes)
    config, params = hf.load(str(path), dtype="float32")
    fields = rows(97)
    ours = logits(build(config, compute_dtype="float32"), params, *fields)
    np.testing.assert_allclose(ours, reference(peer, fields[0]), atol=1e-4)


def test_the_real_model_equals_transformers(testdata):
    path = testdata / "models" / "TinyStories-656K"
    peer = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    config, params = hf.load(str(path), dtype="float32")
    fields = rows(2048, length=64)
    ours = logits(build(config, compute_dtype="float32"), params, *fields)
    np.testing.assert_allclose(ours, reference(peer, fields[0]), atol=1e-4)


def test_export_of_import_is_byte_identical(testdata, tmp_path):
    path = testdata / "models" / "TinyStories-656K"
    for shard_bytes in (10**9, 300_000):
        config, params = hf.load(str(path), dtype="float32")
        out = tmp_path / str(shard_bytes)
        hf.save(str(out), config, params, shard_bytes=shard_bytes)
        before = load_file(path / "model.safetensors")
        after = {
            name: tensor
            for file in out.glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert after[name].dtype == tensor.dtype
            assert torch.equal(after[name].view(torch.int16), tensor.view(torch.int16)), name
        again = transformers.AutoModelForCausalLM.from_pretrained(out)
        assert again.dtype == torch.bfloat16
        hf.load(str(out))  # the index is read back


def test_one_error_names_every_bad_tensor(tmp_path):
    path, _ = tiny(tmp_path)
    config = json.loads((path / "config.json").read_text()) | {
        "num_hidden_layers": 4,
        "intermediate_size": 50,
    }
    (path / "config.json").write_text(
        json.dumps(config | {"attention_bias": False, "tie_word_embeddings": True})
    )
    with pytest.raises(ValueError) as error:
        hf.load(str(path))
    message = str(error.value)
    assert "model.layers.3.mlp.up_proj.weight" in message and "missing" in message
    assert "model.layers.0.mlp.up_proj.weight: expected (50, 32), got (48, 32)" in message


def test_an_unknown_family_names_the_known(tmp_path):
    with pytest.raises(ValueError, match="model_type = 'lama' is unknown; did you mean 'llama'"):
        hf.config_from({"model_type": "lama"})


def test_padded_vocabulary_never_gets_probability(tmp_path):
    path, peer = tiny(tmp_path)
    config = hf.load_config(str(path)).padded(64)
    assert config.vocab_rows == 128
    _, params = hf.load(str(path), config=config, dtype="float32")
    fields = rows(97)
    ours = logits(build(config, compute_dtype="float32"), params, *fields)
    np.testing.assert_allclose(ours[..., :97], reference(peer, fields[0]), atol=1e-4)
    assert (ours[..., 97:] < -1e38).all()


@pytest.mark.parametrize("remat", ["none", "dots", "attention"])
def test_rematerialization_leaves_gradients_unchanged(tmp_path, remat):
    path, _ = tiny(tmp_path)
    config, params = hf.load(str(path), dtype="float32")
    fields = tuple(map(jnp.asarray, rows(97)))

    def gradient(policy):
        model = build(config, compute_dtype="float32", remat=policy)
        return jax.jit(
            jax.grad(lambda p: jnp.square(model.unembed(p, model.hidden(p, *fields)[0])).mean())
        )(params)

    for ours, theirs in zip(jax.tree.leaves(gradient(remat)), jax.tree.leaves(gradient("full"))):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_random_initialization_matches_axes_and_shapes(tmp_path):
    path, _ = tiny(tmp_path)
    config = hf.load_config(str(path))
    model = build(config)
    params = model.init(jax.random.key(0), jnp.bfloat16)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), model.shapes(jnp.bfloat16)
    )
    jax.tree.map(
        lambda x, names: None if x.ndim == len(names) else pytest.fail(f"{x.shape} {names}"),
        params,
        model.axes(),
        is_leaf=lambda node: isinstance(node, tuple),
    )
    assert flatten(params).keys() == {entry.path for entry in hf.tensor_maps(config)}
