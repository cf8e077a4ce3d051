# SPDX-License-Identifier: Apache-2.0
"""Scores by models: a Hugging Face sequence classifier's, and a batch's log-probabilities."""

import numpy as np
import pytest
import torch
import transformers

from align_jax.core.schema import Example
from align_jax.data.tokenizer import load_tokenizer
from align_jax.inference.score import RewardModel
from align_jax.online import rewards
from align_jax.parallel.mesh import make_mesh
from align_jax.runs.weights import load_model

TEXTS = [
    ("Hi", "hello"),
    ("How are you?", "fine, thank you very much indeed"),
    ("?", "no"),
    ("abc", "d" * 40),
]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=272,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        num_labels=1,
        pad_token_id=256,
        initializer_range=0.4,
    )
    model = transformers.LlamaForSequenceClassification(config).eval()
    model.save_pretrained(path)
    tokenizer = load_tokenizer("byte")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(path)
    return path, model, tokenizer


def expected(model, tokenizer, texts, ends=True):
    scores = []
    for prompt, completion in texts:
        ids = tokenizer(prompt + completion).input_ids + [tokenizer.eos_token_id] * ends
        with torch.no_grad():
            scores.append(model(torch.tensor([ids[-64:]])).logits.item())
    return np.float32(scores)


@pytest.mark.parametrize("mesh", [None, {"fsdp": 4, "tensor": 2}])
def test_rewards_equal_transformers_sequence_classifier(classifier, mesh):
    path, model, tokenizer = classifier
    mesh = mesh and make_mesh(mesh)
    loaded = load_model(str(path), mesh=mesh, compute_dtype="float32", heads=("score",))
    scorer = RewardModel(loaded, load_tokenizer(str(path)), rows=4, mesh=mesh)
    got = scorer([Example(prompt, (completion,)) for prompt, completion in TEXTS + TEXTS[:1]])
    np.testing.assert_allclose(got, expected(model, tokenizer, TEXTS + TEXTS[:1]), atol=1e-4)


def test_a_reward_model_is_a_row_of_the_rewards(classifier):
    path, model, tokenizer = classifier
    fn = rewards.REWARDS["model"](path=str(path), rows=2, load_model=load_model)
    got = fn([p for p, _ in TEXTS], [c for _, c in TEXTS], [{}] * 4)
    np.testing.assert_allclose(got, expected(model, tokenizer, TEXTS), atol=1e-4)
    # a completion that was cut off did not end: it is not shown as one that did
    got = fn([p for p, _ in TEXTS], [c for _, c in TEXTS], [{"finished": False}] * 4)
    np.testing.assert_allclose(got, expected(model, tokenizer, TEXTS, ends=False), atol=1e-4)


def test_an_online_run_s_reward_model_lies_over_its_mesh(classifier, monkeypatch):
    made = []

    class Recorded(RewardModel):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(rewards, "RewardModel", Recorded)
    path, model, tokenizer = classifier
    mesh = make_mesh({"fsdp": 8})
    given = {"model": {"path": str(path), "rows": 8}}
    total, _ = rewards.resolve(given, mesh=mesh, load_model=load_model)(*zip(*TEXTS))
    np.testing.assert_allclose(total, expected(model, tokenizer, TEXTS), atol=1e-4)
    kernel = made[0]._params["layers"]["mlp"]["up"]["kernel"]
    assert (
        kernel.sharding.mesh == mesh
        and kernel.sharding.shard_shape(kernel.shape)[1] == kernel.shape[1] // 8
    )


def test_a_checkpoint_without_a_score_head_is_refused(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=272,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    load_tokenizer("byte").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="score"):
        rewards.REWARDS["model"](str(tmp_path), load_model=load_model)
