# SPDX-License-Identifier: Apache-2.0
"""`sample` and `label` as programs: files in, files out, resuming, a conversation, training data at
the end."""

import json

import pytest

from align_jax import label, sample
from align_jax.core.options import DataOptions
from align_jax.data import datasets
from align_jax.inference.generate import Request, stop_tokens
from align_jax.inference.samplers import Sampling
from align_jax.runs.weights import load_model

SAMPLING = Sampling(temperature=0.9, top_p=0.9)


@pytest.fixture(scope="module")
def policy(testdata):
    path = testdata / "models" / "TinyStories-656K"
    return sample.load_checkpoint(str(path), rows=8, max_length=64, compute_dtype="float32")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = (
        "Once upon a time, ",
        "One day, a boy named Tim ",
        "The cat and the dog ",
        "Lily was very happy. ",
    )
    path.write_text(
        "".join(json.dumps({"prompt": text, "level": i}) + "\n" for i, text in enumerate(texts))
    )
    return str(path)


def run(policy, prompts, path, seed=5, **options):
    request = Request((), samples=3, max_new_tokens=16, sampling=SAMPLING, seed=seed)
    return sample.sample_file(policy, prompts, str(path), request, chunk=2, show=False, **options)


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_samples_have_halos_fields_and_an_interrupted_file_is_completed(policy, prompts, tmp_path):
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    assert run(policy, prompts, whole) == 12
    found = records(whole)
    assert [(one["prompt_id"], one["sample_id"]) for one in found] == [
        (p, s) for p in range(4) for s in range(3)
    ]
    assert found[4] | {"output": "", "tokens": 0, "finish": "", "sampling": {}} == {
        "prompt": "One day, a boy named Tim ",
        "level": 1,
        "output": "",
        "generator": policy.name,
        "dataset": prompts,
        "prompt_id": 1,
        "sample_id": 1,
        "type": "sample",
        "finish": "",
        "tokens": 0,
        "sampling": {},
    }
    assert len({one["output"] for one in found}) == 12
    lines = whole.read_text().splitlines(keepends=True)
    part.write_text("".join(lines[:7]) + lines[7][:30])  # killed in the middle of a line
    assert run(policy, prompts, part) == 5
    assert part.read_text() == whole.read_text()
    assert run(policy, prompts, part) == 0
    with pytest.raises(ValueError, match="another --output"):
        run(policy, prompts, part, seed=6)


def test_feedback_of_samples_is_training_data(policy, prompts, tmp_path, testdata):
    run(policy, prompts, tmp_path / "samples.jsonl")
    rewards = label.resolve(
        {
            "lexicon": {"path": str(testdata / "reward" / "vader_lexicon.txt")},
            "length": {"target": 8, "weight": 0.1},
        },
        load_model=load_model,
    )
    samples = label.score(label.read_samples(str(tmp_path / "samples.jsonl")), rewards, show=False)
    assert samples[0]["reward"] == pytest.approx(
        samples[0]["rewards"]["lexicon"] + 0.1 * samples[0]["rewards"]["length"], abs=1e-6
    )
    for kind, data_kind, options in (
        ("pairwise", "pairs", {"pairing": "max"}),
        ("scalar", "pairs", {}),
        ("binary", "unpaired", {"threshold": "mean"}),
    ):
        for suffix in (".jsonl", ".json"):
            path = str(tmp_path / (kind + suffix))
            label.write(path, label.make_feedback(samples, kind, round_number=2, **options))
            examples = datasets.load(path, data_kind, DataOptions(), chat=False)
            assert len(examples) == {"pairwise": 4, "scalar": 4, "binary": 12}[kind]
        if kind == "pairwise":
            best = max(
                (one for one in samples if one["prompt_id"] == 0), key=lambda one: one["reward"]
            )
            assert examples[0].responses[0] == best["output"]


def test_unscored_samples_and_broken_records_are_named(policy, prompts, tmp_path):
    run(policy, prompts, tmp_path / "samples.jsonl", limit=1)
    samples = label.read_samples(str(tmp_path / "samples.jsonl"))
    with pytest.raises(ValueError, match="--rewards"):
        label.make_feedback(samples, "binary")
    (tmp_path / "broken.jsonl").write_text(json.dumps({"prompt": "a", "output": "b"}) + "\n")
    with pytest.raises(ValueError, match=r"broken.jsonl:1.*prompt_id, sample_id"):
        label.read_samples(str(tmp_path / "broken.jsonl"))


def test_a_conversation_goes_on_until_an_empty_line(policy):
    words, said = iter(["Once upon a time, ", "The end of ", ""]), []
    sample.converse(
        policy,
        Request((), max_new_tokens=8, sampling=Sampling(0.0)),
        ask=lambda _: next(words),
        say=said.append,
    )
    assert len(said) == 2 and all(said)


def test_stop_tokens_are_the_ends_of_text_and_turn(policy, testdata):
    assert stop_tokens(policy.tokenizer, str(testdata / "models" / "TinyStories-656K")) == (2,)
    from align_jax.data.tokenizer import load_tokenizer

    minimind = load_tokenizer(str(testdata / "tokenizers" / "minimind"))
    assert minimind.convert_tokens_to_ids("<|im_end|>") in stop_tokens(minimind)
