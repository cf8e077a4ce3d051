# SPDX-License-Identifier: Apache-2.0
"""Score and value heads, vocabularies that grow, and the checkpoints of both."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from align_jax.interop import hf
from align_jax.models.lora import merge
from align_jax.models.model import build

V = 53
SHAPE = dict(
    vocab_size=V,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def fields(count=2, length=9):
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, V, (count, length)), jnp.int32)
    return (
        tokens,
        jnp.ones_like(tokens),
        jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape),
    )


def saved(tmp_path, family="llama", kind=transformers.AutoModelForCausalLM, **changes):
    torch.manual_seed(0)
    model = kind.from_config(
        transformers.CONFIG_MAPPING[family](**(SHAPE | changes)), dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "peer")
    return str(tmp_path / "peer"), model


def head(model, params, name):
    run = jax.jit(
        lambda params, *fields: model.head(params, name, model.hidden(params, *fields)[0])
    )
    return np.asarray(run(params, *fields()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma3_text"])
def test_reward_models_go_both_ways(tmp_path, family):
    path, peer = saved(
        tmp_path, family, transformers.AutoModelForSequenceClassification, num_labels=1
    )
    config, params = hf.load(path, heads=("score",))
    model = build(config, compute_dtype="float32", remat="none", heads=("score",))
    with torch.no_grad():
        expected = peer(torch.tensor(fields()[0].tolist())).logits[:, 0].numpy()
    np.testing.assert_allclose(head(model, params, "score")[:, -1], expected, atol=1e-4)
    hf.save(str(tmp_path / "ours"), config, params, heads=("score",))
    before, after = (
        load_file(f"{folder}/model.safetensors") for folder in (path, tmp_path / "ours")
    )
    assert before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )
    again = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours"
    ).eval()
    assert again.config.num_labels == 1 and type(again) is type(peer)
    with torch.no_grad():
        np.testing.assert_allclose(
            again(torch.tensor(fields()[0].tolist())).logits[:, 0].numpy(), expected, atol=1e-6
        )


def test_a_reward_model_starts_from_a_language_model_and_a_value_model_from_it(tmp_path):
    path, _ = saved(tmp_path)
    config, params = hf.load(path, heads=("score",))  # its lm_head is not read
    assert "score" not in params and "output" not in params
    model = build(config, compute_dtype="float32", heads=("score",))
    full = merge(model.init(jax.random.key(0)), params)
    hf.save(str(tmp_path / "reward"), config, full, heads=("score",))
    _, values = hf.load(str(tmp_path / "reward"), heads=("value",), unembed=False)
    assert "value" not in values and "score" not in values
    np.testing.assert_array_equal(values["embed"]["tokens"], params["embed"]["tokens"])


@pytest.mark.parametrize("name", ["value", "value_mlp"])
def test_value_heads_round_trip_and_the_mlp_leaves_the_decoder_alone(tmp_path, name):
    path, _ = saved(tmp_path)
    config, params = hf.load(path)
    model = build(config, compute_dtype="float32", remat="none", heads=(name,))
    params = merge(model.init(jax.random.key(1)), params)
    got = head(model, params, name)
    assert got.shape == (2, 9) and got.dtype == np.float32 and np.std(got) > 0
    hf.save(str(tmp_path / "ours"), config, params, heads=(name,))
    _, again = hf.load(str(tmp_path / "ours"), heads=(name,))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    gradient = jax.grad(
        lambda p: jnp.sum(jnp.square(model.head(p, name, model.hidden(p, *fields())[0])))
    )(params)
    moved = float(jnp.abs(gradient["layers"]["mlp"]["up"]["kernel"]).max())
    assert (moved == 0) == (name == "value_mlp")
    assert float(jnp.abs(gradient[name]["out"]["kernel"]).max()) > 0


def test_a_head_that_was_not_built_is_an_error():
    model = build(hf.config_from({"model_type": "llama"} | SHAPE), heads=("value",))
    with pytest.raises(KeyError, match="not 'score'"):
        model.head({}, "score", jnp.zeros((2, 16)))
    with pytest.raises(ValueError, match="did you mean 'value'"):
        build(model.config, heads=("values",))


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_start_at_the_mean_of_the_old(tmp_path, tied):
    path, _ = saved(tmp_path, tie_word_embeddings=tied)
    _, old = hf.load(path)
    config = dataclasses.replace(hf.load_config(path), vocab_size=V + 2, vocab_rows=V + 2).padded(8)
    _, new = hf.load(path, config=config)
    table = np.asarray(new["embed"]["tokens"])
    assert table.shape == (56, 16)
    np.testing.assert_array_equal(table[:V], old["embed"]["tokens"])
    np.testing.assert_allclose(
        table[V : V + 2], np.asarray(old["embed"]["tokens"]).mean(0)[None].repeat(2, 0), rtol=1e-5
    )
    assert (table[V + 2 :] == 0).all()
    if not tied:
        np.testing.assert_allclose(
            new["output"]["kernel"][:, V],
            np.asarray(old["output"]["kernel"]).mean(1),
            rtol=1e-4,
            atol=1e-7,
        )
    hf.save(str(tmp_path / "ours"), config, new)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert (
        again.config.vocab_size == V + 2 and again.get_input_embeddings().weight.shape[0] == V + 2
    )


def test_another_model_than_the_one_asked_for_is_an_error(tmp_path):
    path, _ = saved(tmp_path)
    with pytest.raises(ValueError, match="num_layers is 2, expected 3"):
        hf.load(
            path, config=hf.config_from({"model_type": "llama"} | SHAPE | {"num_hidden_layers": 3})
        )


def test_bare_decoders_and_old_buffers_are_read(tmp_path):
    path, peer = saved(tmp_path, "gpt2")
    names = load_file(f"{path}/model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in names.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    from safetensors.torch import save_file

    save_file(bare, f"{path}/model.safetensors")
    config, params = hf.load(path)
    np.testing.assert_array_equal(
        params["embed"]["tokens"], names["transformer.wte.weight"].numpy()
    )
