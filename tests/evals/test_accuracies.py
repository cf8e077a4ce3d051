# SPDX-License-Identifier: Apache-2.0
"""Accuracies over subsets, of reward models, of k answers, and at equal lengths."""

import itertools
import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers

from align_jax import evaluate, export
from align_jax.core.options import DataOptions, RolloutOptions
from align_jax.data import datasets
from align_jax.data.tokenizer import load_tokenizer
from align_jax.evals import EVALS
from align_jax.evals.pass_at_k import unbiased
from align_jax.evals.policy import EvaluatedPolicy
from align_jax.evals.subsets import by_subset
from align_jax.evals.win_rate import interval, length_controlled, tally
from align_jax.online import rewards
from align_jax.parallel.mesh import make_mesh
from align_jax.runs import loop
from align_jax.runs.config_file import load
from align_jax.runs.weights import load_model

ROWS = [
    {"prompt": "What? ", "chosen": "good answer", "rejected": "bad", "subset": "easy"},
    {"prompt": "Why? ", "chosen": "no", "rejected": "because it is so", "subset": "hard"},
    {"prompt": "Who? ", "chosen": "me", "rejected": "you", "subset": "easy"},
    {"prompt": "When? ", "chosen": "now", "rejected": "then"},
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def test_each_subset_has_its_mean_and_counts_once():
    found = by_subset("accuracy", np.float32([1, 0, 0, 1]), ["a", "a", "b", ""])
    assert found["accuracy"] == 0.5 and found["accuracy/a"] == 0.5
    assert found["accuracy/b"] == 0.0 and found["accuracy/rest"] == 1.0
    assert found["accuracy/mean_of_subsets"] == 0.5
    assert by_subset("accuracy", np.float32([1, 0]), []).keys() == {"accuracy", "accuracy/stderr"}


def test_a_reward_models_accuracy_is_transformers(testdata, pairs, tmp_path):
    base = str(testdata / "models" / "TinyStories-656K")
    torch.manual_seed(1)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, dtype=torch.float32
    ).eval()
    tokenizer = load_tokenizer(base)
    model.config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    policy = evaluate.model_policy(str(tmp_path / "reward"), heads=("score",))
    found = evaluate.evaluate(policy, [f"reward={pairs}"])[f"reward={pairs}"]
    examples = datasets.load(pairs, "pairs", DataOptions(), chat=False)
    from align_jax.data import chat

    scores = []
    for example in examples.items:
        tokens = chat.encode(example, tokenizer)
        for ids in tokens.responses:
            with torch.no_grad():
                out = model(torch.tensor([[*tokens.prompt, *ids]])).logits
            scores.append(float(out[0, 0]))
    expected = np.asarray(scores).reshape(-1, 2)
    assert found["margin"] == pytest.approx((expected[:, 0] - expected[:, 1]).mean(), abs=1e-4)
    right = expected[:, 0] > expected[:, 1]
    assert found["accuracy"] == right.mean() and found["ties"] == 0.0
    assert found["accuracy/easy"] == right[[0, 2]].mean() and found["accuracy/rest"] == right[3]
    with pytest.raises(ValueError, match="is a reward model, which says no words"):
        evaluate.evaluate(policy, [f"preference={pairs}"])


def test_a_trained_reward_model_gives_the_same_scores_in_transformers_on_batches(
    testdata, pairs, tmp_path
):
    """The tokenizer fills rows with its end token, as those do that have no other: transformers
    reads the score before it, so that is where it is trained."""
    base = tmp_path / "base"
    shutil.copytree(testdata / "models" / "TinyStories-656K", base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    (base / "special_tokens_map.json").unlink()  # which has the old one
    tokenizer.save_pretrained(base)
    config = load("tiny:reward")
    config.model.path, config.data.train, config.data.eval_fraction = str(base), pairs, 0.0
    config.batch_size, config.total_steps = 8, 2
    loop.train(config, str(tmp_path / "run"))
    item = f"reward={pairs}"
    found = evaluate.evaluate(evaluate.run_policy(str(tmp_path / "run"), heads=("score",)), [item])[
        item
    ]
    export.export_run(str(tmp_path / "run"), str(tmp_path / "hf"), dtype="float32")
    again = evaluate.evaluate(
        evaluate.model_policy(str(tmp_path / "hf"), dtype="float32", heads=("score",)), [item]
    )[item]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "hf", dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    texts = [row["prompt"] + row[key] for key in ("chosen", "rejected") for row in ROWS]
    batch = tokenizer([text + tokenizer.eos_token for text in texts], padding=True)
    assert len({sum(mask) for mask in batch["attention_mask"]}) > 1
    assert model.config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id
    with torch.no_grad():
        scores = model(**batch.convert_to_tensors("pt")).logits[:, 0].reshape(2, -1)
    margin = float((scores[0] - scores[1]).mean())
    assert found["margin"] == pytest.approx(margin, abs=1e-4) and abs(margin) > 1e-3
    assert again["margin"] == pytest.approx(margin, abs=1e-4)


def test_preference_tells_subsets_and_a_policy_has_no_score_head(testdata, pairs):
    base = str(testdata / "models" / "TinyStories-656K")
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    loaded = load_model(base, mesh=mesh, compute_dtype="float32")
    policy = EvaluatedPolicy(*loaded, load_tokenizer(base), mesh, None, "words")
    item = f"preference={pairs}"
    found = evaluate.evaluate(policy, [item])[item]
    parts = [found[f"logps/accuracies/{name}"] for name in ("easy", "hard", "rest")]
    assert found["logps/accuracies"] == pytest.approx((2 * parts[0] + parts[1] + parts[2]) / 4)
    assert found["logps/accuracies/mean_of_subsets"] == pytest.approx(sum(parts) / 3)
    with pytest.raises(ValueError, match="words is a language model, .*--eval=preference"):
        evaluate.evaluate(policy, [f"reward={pairs}"])
    kept = []
    passing = rewards.WeightedRewards((("even", 1.0, _even),))
    found = EVALS["pass_at_k"].fn(
        policy,
        datasets.load(pairs, "prompts", DataOptions(), chat=False),
        passing,
        RolloutOptions(responses_per_prompt=4, max_new_tokens=4, rows=8),
        keep=kept.append,
    )
    each = np.asarray([row["reward"] for row in kept]).reshape(4, 4)
    assert found["pass@1"] == pytest.approx(each.mean())
    assert found["pass@4"] == pytest.approx(each.any(axis=1).mean())
    assert found["pass@1"] <= found["pass@2"] <= found["pass@4"] and "pass@2/easy" in found


def _even(prompts, completions, extras):
    return [float(len(text) % 2 == 0) for text in completions]


@pytest.mark.parametrize(("samples", "k"), [(4, 1), (4, 2), (4, 4), (5, 3)])
def test_pass_at_k_is_the_share_of_all_choices_of_k(samples, k):
    for passed in range(samples + 1):
        marks = [i < passed for i in range(samples)]
        share = np.mean([any(one) for one in itertools.combinations(marks, k)])
        assert unbiased(np.array([passed]), samples, k)[0] == pytest.approx(share, abs=1e-6)


def test_a_win_by_length_alone_is_half_at_equal_lengths():
    longer = np.linspace(-50, 50, 400, dtype=np.float32)
    by_length = (longer > 0).astype(np.float32)
    uneven, wins = longer[100:], by_length[100:]  # most of its answers are the longer ones
    assert wins.mean() > 0.66 and length_controlled(wins, uneven) == pytest.approx(0.5, abs=0.06)
    apart = np.tile(np.float32([1, 1, 1, 0]), 100)  # of lengths independent
    assert length_controlled(apart, longer) == pytest.approx(0.75, abs=0.01)
    for value in (0.0, 0.5, 1.0):
        same = tally(np.full(10, value, np.float32), np.zeros(10, np.float32))
        assert same["win_rate/length_controlled"] == pytest.approx(value, abs=1e-3)
        assert same["win_rate/low"] == same["win_rate/high"] == value
    low, high = interval(apart)
    assert low == pytest.approx(0.75 - 1.96 * 0.433 / 20, abs=0.01) and high > 0.78
