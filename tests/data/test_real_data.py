# SPDX-License-Identifier: Apache-2.0
"""Public data sets as their authors publish them are read without a flag, and mean what they
say."""

import collections
import json

import pytest

from align_jax.core.options import DataOptions
from align_jax.data import datasets, pipeline, tokenizer, transcripts
from align_jax.data.layout import BatchSizes

HH = "preference/hh_rlhf_harmless_test.jsonl.gz"


def load(testdata, name, kind, chat=True, limit=None, **options):
    return datasets.load(str(testdata / name), kind, DataOptions(**options), chat=chat, limit=limit)


FILES = [  # file, kind, options, examples, responses of each
    (HH, "pairs", {}, 2308, {2}),
    (HH, "unpaired", {}, 4616, {1}),
    (HH, "completions", {"limit": 100}, 99, {1}),
    ("preference/rasbt_instruction_preference.json", "pairs", {}, 1100, {2}),
    ("preference/lf_kto_en_demo.json", "unpaired", {}, 300, {1}),
    ("preference/lf_kto_en_demo.json", "completions", {}, 150, {1}),
    ("preference/oasst_en_100_tree.jsonl", "ranked", {}, 212, {2, 3, 4, 5, 6, 8, 9}),
    ("preference/oasst_en_100_tree.jsonl", "ranked", {"responses": 3}, 155, {3}),
    ("preference/oasst_en_100_tree.jsonl", "pairs", {"pairing": "all"}, 754, {2}),
    ("preference/oasst_en_100_tree.jsonl", "pairs", {"pairing": "adjacent"}, 429, {2}),
    ("text/rasbt_instruction_data.json", "completions", {}, 1100, {1}),
    ("rlvr/gsm8k_train.jsonl.gz", "completions", {"limit": 500}, 500, {1}),
    ("rlvr/gsm8k_test.jsonl", "prompts", {}, 1319, {0}),
]


@pytest.mark.parametrize("name, kind, options, count, responses", FILES)
def test_public_files_are_recognized(testdata, name, kind, options, count, responses):
    examples = load(testdata, name, kind, **options)
    assert len(examples) == count
    assert {len(example.responses) for example in examples.items} == responses
    assert all(example.prompt[-1]["role"] == "user" for example in examples.items)
    if kind == "unpaired":
        assert collections.Counter(example.label for example in examples.items)[True] == count // 2
    if kind == "prompts":
        assert all("####" in example.extras["answer"] for example in examples.items)


def test_transcripts_are_kept_to_the_letter_without_a_template(testdata):
    import gzip

    rows = [json.loads(line) for line in gzip.open(testdata / HH, "rt")]
    examples = load(testdata, HH, "pairs", chat=False)
    assert examples.report == {"examples": 2308, "dropped: empty response": 4}
    for example in examples.items:
        row = rows[int(example.source.rpartition(":")[2]) - 1]
        assert [example.prompt + response for response in example.responses] == [
            row["chosen"],
            row["rejected"],
        ]
        assert example.prompt.endswith("\n\nAssistant:")


def test_transcripts_as_messages_alternate_and_end_with_the_user(testdata):
    for example in load(testdata, HH, "pairs").items:
        roles = [message["role"] for message in example.prompt]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert not any(transcripts.is_transcript(response) for response in example.responses)


def test_reviews_with_scores_make_pairs_and_labels(testdata, tmp_path):
    """Vicuna's reviews: two answers with a score each, joined with their texts into scalar
    feedback."""
    folder = testdata / "scalar"

    def read(path):
        return [json.loads(line) for line in path.read_text().splitlines()]

    questions = {row["question_id"]: row["text"] for row in read(folder / "vicuna_question.jsonl")}
    answers = {
        row["answer_id"]: row["text"]
        for path in folder.glob("answer/*.jsonl")
        for row in read(path)
    }
    rows = [
        {
            "type": "scalar_feedback",
            "prompt": [{"role": "user", "content": questions[review["question_id"]]}],
            "output": answers[review[f"answer{side + 1}_id"]],
            "reward": review["score"][side],
            "review": path.name,
        }
        for path in sorted(folder.glob("review/*/*.jsonl"))
        for review in read(path)
        for side in (0, 1)
        if review["score"][0] > 0
    ]  # -1 where the judge gave none
    (tmp_path / "feedback.json").write_text(json.dumps(rows))
    pairs = load(tmp_path, "feedback.json", "pairs", min_difference=1.0)
    assert 0 < len(pairs) <= 80 and all(
        pair.scores[0] > pair.scores[1] + 1.0 for pair in pairs.items
    )
    labeled = load(tmp_path, "feedback.json", "unpaired", threshold="8.0")
    assert len(labeled) == len(rows) > 2000
    assert all(example.label == (example.scores[0] > 8.0) for example in labeled.items)


@pytest.mark.parametrize(
    "name, layout",
    [("models/TinyStories-656K", "packed"), ("tokenizers/minimind", "shared_prefix")],
)
def test_packing_saves_most_of_the_padding_of_real_pairs(testdata, name, layout):
    tok = tokenizer.load_tokenizer(str(testdata / name))
    examples = load(testdata, HH, "pairs", chat=bool(tok.chat_template), limit=500)
    plain, packed = (
        pipeline.make_pipeline(
            examples, tok, DataOptions(layout=which, trim=False), BatchSizes(32, 512)
        )
        for which in ("plain", layout)
    )

    def cost(pipe):
        return pipe.shape.rows * pipe.shape.length / pipe.report["groups_per_step"]

    assert cost(packed) < {"packed": 0.5, "shared_prefix": 0.33}[layout] * cost(plain)
    assert packed.report["padding_fraction"] < 0.06 < 0.5 < plain.report["padding_fraction"]
    assert packed.report["truncated responses"] == plain.report["truncated responses"]
