# SPDX-License-Identifier: Apache-2.0
"""A tokenizer with more tokens than the checkpoint has rows: the vocabulary grows, the new rows are
trained beside an adapter where it is asked for, and exports load elsewhere."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from align_jax import export
from align_jax.core import config as configs
from align_jax.core.tree import flatten
from align_jax.data.tokenizer import byte_tokenizer
from align_jax.interop import hf
from align_jax.models.model import build
from align_jax.runs import loop, setup
from align_jax.runs.trained import restore

TINY = pathlib.Path(__file__).parents[2] / "configs/tiny.py"
BASE = dict(
    model_type="llama",
    vocab_size=272,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=256,
    initializer_range=0.3,
    bos_token_id=None,
    eos_token_id=None,
)
NEW = ("<|im_start|>", "<|im_end|>", "<|think|>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints with their tokenizer, tied and not; and tokenizers with tokens added."""
    path = tmp_path_factory.mktemp("vocabulary")
    for name in ("tied", "untied"):
        config = hf.config_from(BASE | {"tie_word_embeddings": name == "tied"})
        model = build(config, compute_dtype="float32", remat="none", attention="xla")
        hf.save(str(path / name), config, model.init(jax.random.key(1)))
        byte_tokenizer().save_pretrained(path / name)
    for name, tokens in (("more", NEW), ("other", ("<|else|>", *NEW))):
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens(list(tokens))
        tokenizer.save_pretrained(path / name)
    model = hf.config_from(BASE)
    larger = build(model, compute_dtype="float32", remat="none", attention="xla")
    hf.save(str(path / "other"), model, larger.init(jax.random.key(2)))
    return path


def config_of(folder, name="untied", **keys):
    config = runpy.run_path(str(TINY))["get_config"]("dpo")
    config.model.path, config.tokenizer = str(folder / name), str(folder / "more")
    config.total_steps, config.batch_size, config.max_length = 2, 8, 96
    config.eval.every_steps, config.log.every_steps, config.eval.max_examples = 0, 1, 8
    config.optimizer.learning_rate = 1e-2
    with config.unlocked():
        config.update_from_flattened_dict(keys)
    return config


def resolved(folder, name="untied", **keys):
    return setup.resolve_config(configs.read(config_of(folder, name, **keys)), 1)


def test_policy_and_reference_grow_to_the_tokenizer(folder):
    found = resolved(folder, **{"reference.path": str(folder / "tied")})
    assert found.new_tokens == NEW
    for model in (found.models.policy, found.models.base, found.models.other):
        assert model.config.vocab_size == 275 and model.config.vocab_rows % 16 == 0
    assert resolved(folder, tokenizer="").new_tokens == ()
    tied = resolved(folder, "tied", **{"model.lora.rank": 2, "model.lora.tokens": ("new",)})
    lora = tied.models.policy.options.lora
    assert lora.tokens == (272, 273, 274) and lora.head_tokens == ()


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"model.path": ""}, "has 275 tokens, the vocabulary of config.model.path = '' only 100"),
        (
            {"model.path": "other", "tokenizer": "more"},
            r"not that model's own tokenizer .*4 of its tokens differ, '<\|else\|>' among them",
        ),
        ({"reference.path": "other"}, r"the vocabulary of config.reference.path = .*'<\|else\|>'"),
        ({"model.lora.rank": 2, "model.lora.tokens": ("<|im_strat|>",)}, r"mean '<\|im_start\|>'"),
        (
            {"tokenizer": "untied", "model.lora.rank": 2, "model.lora.tokens": ("new",)},
            "'new' are the tokens that the checkpoint's vocabulary has no rows for",
        ),
        ({"model.lora.tokens": ("new",)}, "has no effect without an adapter"),
    ],
)
def test_what_is_no_growth_is_refused(folder, keys, words):
    names = ("model.path", "tokenizer", "reference.path")
    keys = {key: str(folder / x) if key in names and x else x for key, x in keys.items()}
    with pytest.raises(ValueError, match=words):
        if keys.get("model.path") == "":
            keys["model.config"] = {**BASE, "vocab_size": 100}
            keys["model.config"].pop("model_type")
        resolved(folder, **keys)


def logits(trained, rows):
    policy = trained.resolved.models.policy
    fields = jnp.asarray(rows), jnp.ones_like(rows), jnp.broadcast_to(jnp.arange(6), rows.shape)
    hidden = policy.hidden(trained.params, *(x.astype(jnp.int32) for x in fields))[0]
    return np.asarray(policy.unembed(trained.params, hidden))[..., :275]


def test_new_rows_are_trained_beside_an_adapter_and_exported(
    folder, tmp_path, capsys, quick_compiles
):
    run, name = str(tmp_path / "run"), "untied"
    keys = {"model.lora.rank": 2, "model.lora.tokens": ("new", "a"), "model.lora.alpha": 4.0}
    more = {"total_steps": 1, "data.eval_fraction": 0.0}
    loop.train(config_of(folder, name, **keys, **more), run)
    said = capsys.readouterr().err
    assert "vocabulary: grown from 272 to the tokenizer's 275 by <|im_start|>" in said
    trained = restore(run)
    _, base = hf.load(str(folder / name))
    table = np.asarray(flatten(base)["embed/tokens"])
    rows = np.asarray(trained.params["embed"]["rows"])
    # as they were, or a step of Adam away
    assert np.abs(rows[:3] - table.mean(axis=0)).max() < 0.05
    assert 0 < np.abs(rows[3] - table[97]).max() < 0.05
    tokens = np.asarray([[97, 272, 5, 274, 98, 273]])
    expected = logits(trained, tokens)
    export.export_run(run, str(tmp_path / "merged"))
    export.export_run(run, str(tmp_path / "adapter"), adapter=True)
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    )
    assert merged.config.vocab_size == 275
    assert (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").convert_ids_to_tokens(272)
        == (NEW[0])
    )
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "adapter", dtype=torch.float32
    )
    for model in (merged, adapted):
        with torch.no_grad():
            got = model.eval()(torch.tensor(tokens)).logits.numpy()
        np.testing.assert_allclose(got, expected, atol=1e-3)
