# SPDX-License-Identifier: Apache-2.0
"""`sample` and `label` as programs: files in, files out, resuming, a conversation, training data at
the end."""

import json
import shutil

import numpy as np
import pytest

from align_jax import label, sample
from align_jax.core.options import DataOptions
from align_jax.data import datasets
from align_jax.data.tokenizer import load_tokenizer
from align_jax.inference.generate import Completion, Request, stop_tokens
from align_jax.inference.samplers import Sampling
from align_jax.interop import hf
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


def test_a_prompt_that_does_not_fit_is_named_before_any_is_sampled(policy, tmp_path):
    path, output = tmp_path / "long.jsonl", tmp_path / "out.jsonl"
    path.write_text("".join(f'{{"prompt": "{text}"}}\n' for text in ("a", "a " * 5000)))
    with pytest.raises(ValueError, match=r"long\.jsonl:2: a prompt of \d{4,} tokens; .* room for"):
        run(policy, str(path), output)
    assert not output.exists()


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
        label.with_rewards(samples)
    (tmp_path / "broken.jsonl").write_text(json.dumps({"prompt": "a", "output": "b"}) + "\n")
    with pytest.raises(ValueError, match=r"broken.jsonl:1.*prompt_id, sample_id"):
        label.read_samples(str(tmp_path / "broken.jsonl"))


class Parrot:
    """An engine that says what it was asked, a byte at a time."""

    def __init__(self, tokenizer):
        self.tokenizer, self.asked = tokenizer, []

    def __call__(self, requests, report=None):
        return [[*self.stream(one)][-1:] for one in requests]

    def stream(self, request):
        self.asked.append(self.tokenizer.decode(request.prompt))
        if len(request.prompt) > 200:
            raise ValueError("no room is left")
        for end in range(1, 1 + len(said := "né ##".encode())):
            text = said[:end].decode(errors="replace").partition("##")[0]
            yield Completion(np.zeros(1, np.int32), np.zeros(1), np.zeros(1), text, "stop")

    def update(self, params):
        pass

    def release(self):
        pass


def talk(policy, *words, **options):
    """Return what a conversation writes, piece by piece."""
    written, lines = [], iter(words)

    def ask(_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    sample.converse(policy, Request((), **options), ask=ask, write=written.append)
    return written


def test_a_conversation_streams_whole_characters_and_keeps_its_turns():
    tokenizer = load_tokenizer("byte")
    policy = sample.SamplingPolicy(Parrot(tokenizer), tokenizer, "parrot", 512)
    written = talk(policy, "Hi", "", "And?", "/reset", "Yo", "/system Be", "Oh", stop=("##",))
    assert "/quit or Ctrl-D leaves" in written[0] and "/system" in written[0]
    assert written[1:5] == ["n", "é", " ", "\n"]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(written) and "#" not in "".join(written)
    hi, both, anew, system = policy.engine.asked
    assert both == f"{hi}né <|end|><|user|>And?<|end|><|assistant|>"
    assert anew == hi.replace("Hi", "Yo") and "<|system|>Be<|end|><|user|>Oh<|end|>" in system


def test_a_conversation_ends_with_quit_and_says_what_it_cannot_do():
    tokenizer = load_tokenizer("byte")
    policy = sample.SamplingPolicy(Parrot(tokenizer), tokenizer, "parrot", 512)
    written = talk(policy, "x" * 300, "/help", "Hi", "/quit", "never")
    assert "no room is left; /reset begins anew" in written[1] and written[2].startswith("/help: ")
    assert len(policy.engine.asked) == 2 and "xxx" not in policy.engine.asked[1]


def test_a_conversation_of_a_real_model_says_what_sampling_says(policy):
    start, sampling = "Once upon a time, ", Sampling(0.0)
    written = talk(policy, start, "Then ", max_new_tokens=8, sampling=sampling)
    assert "/system" not in written[0]  # for which a template is needed
    assert "continues the text" in written[1] and len(written) > 8
    ids = tuple(policy.tokenizer(start).input_ids)
    [[whole]] = policy.engine([Request(ids, max_new_tokens=8, sampling=sampling)])
    assert "".join(written[2:]).startswith(whole.text + "\n")
    drawn = Request(ids, max_new_tokens=12, sampling=SAMPLING, seed=3, stop=(" and",))
    assert [*policy.engine.stream(drawn)][-1].text == policy.engine([drawn])[0][0].text


@pytest.mark.parametrize("limit, samples, wanted", [(0, 1, 3), (0, 2, 6), (2, 4, 8), (9, 1, 3)])
def test_no_more_rows_are_decoded_than_completions_are_wanted(limit, samples, wanted, tmp_path):
    (tmp_path / "three.jsonl").write_text('{"prompt": "p"}\n' * 3)
    assert sample.count_wanted(f"{tmp_path}/three.jsonl", limit, samples) == wanted


def test_more_new_tokens_than_the_model_has_positions_are_refused(policy, prompts, tmp_path):
    request = Request((), max_new_tokens=64)
    with pytest.raises(ValueError, match="--max_new_tokens=64: expected at most 63"):
        sample.sample_file(policy, prompts, str(tmp_path / "o.jsonl"), request)


@pytest.mark.parametrize("strings", ["plain", "messages"])
def test_a_text_beside_a_chat_template_is_continued_and_said_so(prompts, tmp_path, capsys, strings):
    tokenizer = load_tokenizer("byte")
    policy = sample.SamplingPolicy(Parrot(tokenizer), tokenizer, "parrot", 512, strings)
    sample.sample_file(policy, prompts, str(tmp_path / "o.jsonl"), Request((), max_new_tokens=8))
    assert ("--strings=messages" in capsys.readouterr().err) == (strings == "plain")
    assert ("<|user|>" in policy.engine.asked[0]) == (strings == "messages")


def test_on_a_cpu_the_default_type_is_the_checkpoints_own(testdata):
    path = str(testdata / "models" / "TinyStories-656K")
    assert load_model(path).params["embed"]["tokens"].dtype == "bfloat16"
    assert sample.Sampling() == Sampling(temperature=1.0)  # evaluate's and the rollouts', too


def test_greedy_text_is_transformers_on_24_prompts(policy, testdata, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    rows = json.loads((testdata / "text" / "rasbt_instruction_data.json").read_text())
    texts = [row["instruction"] for row in rows if len(row["instruction"]) < 40]
    texts = [text for text in texts if len(policy.tokenizer(text).input_ids) <= 16][:24]
    assert len(texts) == 24
    source = tmp_path / "24.jsonl"
    source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    request = Request((), max_new_tokens=16, sampling=Sampling(0.0))
    sample.sample_file(policy, str(source), str(tmp_path / "o.jsonl"), request, show=False)
    path = testdata / "models" / "TinyStories-656K"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for record in records(tmp_path / "o.jsonl"):
        ids = policy.tokenizer(record["prompt"], return_tensors="pt").input_ids
        found = theirs.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0)[0]
        asked, whole = (
            policy.tokenizer.decode(one, skip_special_tokens=True) for one in (ids[0], found)
        )
        assert asked + record["output"] == whole


def test_stop_tokens_are_the_ends_of_text_and_turn(policy, testdata):
    folder = str(testdata / "models" / "TinyStories-656K")
    assert stop_tokens(policy.tokenizer, hf.load_config(folder).end_tokens) == (2,)
    minimind = load_tokenizer(str(testdata / "tokenizers" / "minimind"))
    assert minimind.convert_tokens_to_ids("<|im_end|>") in stop_tokens(minimind)


def test_a_server_is_told_the_end_tokens_of_the_checkpoint(tiny_chat, tmp_path):
    folder = shutil.copytree(tiny_chat, tmp_path / "served")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    asked = sample.load_server("http://127.0.0.1:9", str(folder))
    assert {5, 7, asked.tokenizer.eos_token_id} == set(asked.engine._stop_ids)
    assert sample.load_server("http://127.0.0.1:9", "byte").engine._stop_ids == (
        load_tokenizer("byte").eos_token_id,
    )
