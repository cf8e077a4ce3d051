# SPDX-License-Identifier: Apache-2.0
"""Feedback from scored samples: thresholds, pairings, determinism, ids over rounds."""

import json
import math
import random

import pytest

from align_jax import label
from align_jax.online.rewards import WeightedRewards


def make(rewards_by_prompt, chat=True):
    return [
        {
            "prompt": [{"role": "user", "content": f"q{p}"}] if chat else f"q{p}",
            "output": f"a{p}.{s}",
            "prompt_id": p,
            "sample_id": s,
            "reward": reward,
            "type": "sample",
            "generator": "m",
        }
        for p, rewards in enumerate(rewards_by_prompt)
        for s, reward in enumerate(rewards)
    ]


@pytest.mark.parametrize(
    "threshold,labels",
    [(0.5, [0, 1, 1, 1]), ("0.75", [0, 0, 1, 1]), ("mean", [0, 0, 0, 1]), ("median", [0, 0, 1, 1])],
)
def test_binary_label_is_the_reward_at_least_the_threshold(threshold, labels):
    records = label.binary(make([[0.0, 0.5], [1.0, 7.0]]), threshold)
    assert [one["label"] for one in records] == labels
    assert records[0] == {
        "prompt_id": 0,
        "sample_id": 0,
        "prompt": [{"role": "user", "content": "q0"}],
        "output": [{"role": "assistant", "content": "a0.0"}],
        "label": 0,
        "reward": 0.0,
        "type": "binary_feedback",
    }


@pytest.mark.parametrize(
    "pairing,threshold,differences",
    [
        ("max", 0.0, [5.0]),
        ("max", 5.0, []),
        ("min", 0.0, [1.0, 1.0]),
        ("min", 1.0, [3.0]),
        ("min", 3.0, [4.0, 4.0]),
    ],
)
def test_pairs_differ_as_the_pairing_says(pairing, threshold, differences):
    records = label.pairwise(make([[0.0, 4.0, 1.0, 5.0], [2.0], [3.0, 3.0]]), pairing, threshold)
    assert [one["reward_difference"] for one in records] == differences
    for one in records:
        assert one["label"] == int(one["reward_A"] > one["reward_B"])
        assert one["type"] == "pairwise_feedback" and one["prompt_id"] == 0


def test_random_pairing_uses_each_sample_at_most_once_and_both_orders_occur():
    records = label.pairwise(make([[float(i) for i in range(6)]] * 40), "random")
    assert len(records) == 120
    for prompt in range(40):
        used = [r[k] for r in records if r["prompt_id"] == prompt for k in ("reward_A", "reward_B")]
        assert sorted(used) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert 30 < sum(one["label"] for one in records) < 90


def test_feedback_depends_on_the_seed_but_not_on_the_files_order():
    samples = make([[1.0, 2.0, 3.0, 4.0]] * 8)
    shuffled = random.Random(0).sample(samples, len(samples))
    assert label.pairwise(samples, "random", seed=1) == label.pairwise(shuffled, "random", seed=1)
    assert label.pairwise(samples, "random", seed=1) != label.pairwise(samples, "random", seed=2)
    assert label.scalar(samples) == label.scalar(shuffled)


def test_ids_of_two_rounds_never_meet_and_scalar_keeps_all_fields():
    samples = make([[1.0, 0.0]] * 3, chat=False)
    rounds = [label.scalar(samples, n) for n in (0, 1)]
    assert not {one["prompt_id"] for one in rounds[0]} & {one["prompt_id"] for one in rounds[1]}
    assert rounds[1][0] == {**samples[0], "prompt_id": 10**9, "type": "scalar_feedback"}


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda s: label.binary(s, "mode"), "'mean' or 'median'"),
        (lambda s: label.pairwise(s, "best"), "'best'"),
        (lambda s: label.pairwise(s, "max", -1.0), "-1"),
        (lambda s: label.scalar(s + s), "one round"),
        (lambda s: label.pairwise([s[0], {**s[1], "prompt": "p"}]), "two prompts have prompt_id 0"),
        (lambda s: label.scalar(s, -1), "round"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(make([[1.0, 0.0]]))


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_a_reward_that_is_no_number_is_missing_and_counted(nothing):
    samples = make([[1.0, nothing, 0.0], [nothing, 1.0], [2.0, 2.0]])
    known = label.with_rewards(samples)
    assert [one["reward"] for one in known] == [1.0, 0.0, 1.0, 2.0, 2.0]
    records = label.make_feedback(known, "pairwise")
    assert label.summary("pairwise", samples, known, records) == (
        "1 records of pairwise feedback from 7 samples; 1 ties among a prompt's samples; 2 of 3 "
        "prompts unused; 2 samples without a reward left out"
    )
    with pytest.raises(ValueError, match="none of the 1 samples has a reward"):
        label.with_rewards(make([[nothing]]))


def test_labels_that_are_all_the_same_are_refused_unless_asked_for():
    records = label.binary(make([[1.0, 2.0]]))
    with pytest.raises(ValueError, match="all 2 samples get the label 1: rewards go from 1 to 2"):
        label.check_useful("binary", records, False)
    label.check_useful("binary", records, True)
    with pytest.raises(ValueError, match="no pairwise feedback"):
        label.check_useful("pairwise", [], False)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"output": None}, "this has no output"),
        ({"sample_id": "3"}, "sample_id: expected an integer, got a text"),
        ({"reward": "good"}, "reward: expected a number, got a text"),
        ({"reward": True}, "reward: expected a number, got true or false"),
        ({"prompt": []}, "prompt: no messages"),
        ({"prompt": [{"a": 1}]}, "prompt: expected messages with role and content"),
        ({"output": [3]}, "output: expected a text or messages"),
        ({"prompt_id": -1}, "expected an integer prompt_id from 0"),
    ],
)
def test_a_bad_sample_is_named_by_file_and_line(tmp_path, change, said):
    good, bad = make([[1.0, 0.0]])
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps({**bad, **change}) + "\n")
    with pytest.raises(ValueError, match=rf"s\.jsonl:2: .*{said}"):
        label.read_samples(str(path))


@pytest.mark.parametrize("name", ["f.jsonl", "f.json"])
def test_a_file_that_is_there_outlives_a_failure(tmp_path, name):
    path = tmp_path / name
    path.write_text("old")
    with pytest.raises(TypeError):
        label.write(str(path), [{"a": 1}, {"a": object()}])
    assert path.read_text() == "old" and [one.name for one in tmp_path.iterdir()] == [name]
    label.write(str(path), [{"a": 1}])
    assert "old" not in path.read_text()


@pytest.mark.parametrize("threshold", ["nan", "inf", "1e999", "9" * 400, "high", ""])
def test_a_threshold_that_is_no_finite_number_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold must be a finite number"):
        label.binary(make([[0.0, 0.5]]), threshold)


@pytest.mark.parametrize("reward", [None, float("nan"), float("inf"), 10**400, 1e39])
def test_a_reward_that_no_float32_holds_is_none(reward):
    known = {"reward": 1.0}
    assert label.with_rewards([known, {"reward": reward}]) == [known]


def test_an_output_of_messages_is_scored_by_its_words():
    (sample,) = make([[None]])
    sample["output"] = [{"role": "assistant", "content": "four"}]
    rewards = WeightedRewards((("long", 1.0, lambda p, c, e: [len(one) for one in c]),))
    assert [one["reward"] for one in label.score([sample], rewards, show=False)] == [4.0]


def test_half_a_character_is_written_as_json_escapes_it(tmp_path):
    label.write(str(tmp_path / "a.jsonl"), [{"output": "a\ud83d"}])
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {"output": "a\ud83d"}
