# SPDX-License-Identifier: Apache-2.0
"""Text rewards: each row of the table on hand-made cases, and its mistakes."""

import json

import numpy as np
import pytest

from align_jax.online import rewards
from align_jax.online.rewards import REWARDS
from align_jax.runs.weights import load_model

CASES = [
    ("exact", {}, "  Paris\n", {"answer": "Paris"}, 1.0),
    ("exact", {}, "paris", {"answer": "Paris"}, 0.0),
    ("exact", {"ignore_case": True}, "paris", {"answer": "Paris"}, 1.0),
    ("exact", {"extract": r"<a>(.*?)</a>"}, "hm <a>no</a> <a> yes </a>", {"answer": "yes"}, 1.0),
    ("exact", {"extract": r"<a>(.*?)</a>"}, "yes", {"answer": "yes"}, 0.0),
    ("numeric", {}, "so 9 * 2 = $18.00", {"answer": "bla\n#### 18"}, 1.0),
    ("numeric", {}, "1,234,567 of them", {"answer": 1234567}, 1.0),
    ("numeric", {}, "#### -3\nor 4", {"answer": "-3"}, 1.0),
    ("numeric", {}, "3/4", {"answer": 0.75}, 1.0),
    ("numeric", {}, "1/0", {"answer": 0.75}, 0.0),
    ("numeric", {}, "none", {"answer": 0}, 0.0),
    ("numeric", {"marked": True}, "18", {"answer": 18}, 0.0),
    ("numeric", {"marked": True}, r"\boxed{18}", {"answer": 18}, 1.0),
    ("regex", {"pattern": r"^ab"}, "x\nabc", {}, 1.0),
    ("regex", {"pattern": "a", "count": True, "reward": 0.5}, "banana", {}, 1.5),
    ("regex", {"pattern": "z", "otherwise": -1.0}, "banana", {}, -1.0),
    ("format", {}, "<think>a\nb</think> <answer>4</answer>", {}, 1.0),
    ("format", {}, "well, <think>a</think><answer>4</answer>", {}, 0.0),
    ("length", {"target": 4}, "one two three", {}, -0.25),
    ("length", {"target": 2, "form": "excess"}, "one two three", {}, -0.5),
    ("length", {"target": 4, "unit": "characters"}, "abcdefghijklm", {}, -1.0),
]


@pytest.mark.parametrize("name,options,completion,extras,expected", CASES)
def test_reward_of_a_known_completion(name, options, completion, extras, expected):
    fn = REWARDS[name](**options)
    assert fn(["prompt", "prompt"], [completion, completion], [extras, extras]) == [
        expected,
        expected,
    ]


def test_lexicon_sums_valences_of_words_and_phrases(tmp_path):
    path = tmp_path / "lexicon.txt"
    path.write_text("good\t2.0\t0.1\t[]\nbad\t-3.0\nfed up\t-1.5\n:)\t1.0\n")
    text = 'It was Good, "good" and :) but we were fed up.'
    table = rewards.load_lexicon(str(path))
    assert rewards.valences(text, table, rewards.longest_phrase(table)) == [2.0, 2.0, 1.0, -1.5]
    for form, expected in (
        ("sum", 3.5),
        ("mean", 3.5 / 11),
        ("compound", 3.5 / np.sqrt(3.5**2 + 15)),
    ):
        fn = rewards.lexicon(str(path), form=form)
        np.testing.assert_allclose(fn(["", ""], [text, ""], [{}, {}]), [expected, 0.0], rtol=1e-12)
    (tmp_path / "broken.txt").write_text("good\t2.0\nbad -3.0\n")
    with pytest.raises(ValueError, match="broken.txt:2"):
        rewards.lexicon(str(tmp_path / "broken.txt"))


def test_vader_lexicon_prefers_the_happy_story(testdata):
    fn = rewards.lexicon(str(testdata / "reward" / "vader_lexicon.txt"))
    happy, sad = fn(
        ["", ""],
        ["She was happy and loved her friend.", "He was sad and hated the pain."],
        [{}, {}],
    )
    assert happy > 0.5 and sad < -0.5


def test_every_gold_answer_of_gsm8k_scores_one_against_itself(testdata):
    rows = [json.loads(line) for line in (testdata / "rlvr" / "gsm8k_test.jsonl").open()]
    fn = rewards.numeric()
    assert sum(fn([r["question"] for r in rows], [r["answer"] for r in rows], rows)) == len(rows)
    wrong = [f"#### {rewards.find_number(r['answer']) + 1}" for r in rows]
    assert sum(fn([r["question"] for r in rows], wrong, rows)) == 0


def test_a_bare_number_is_a_weight():
    total, _ = rewards.resolve({"format": 3}, load_model=load_model)(
        ["p"], ["<think></think><answer></answer>"]
    )
    assert list(total) == [3.0]


def shout(prompts, completions, extras, factor=1.0):
    return [factor * sum(map(str.isupper, text)) for text in completions]


def test_weighted_sum_of_named_kinds_and_of_the_users_own_function():
    total, parts = rewards.resolve(
        {
            "short": {"kind": "length", "target": 2, "weight": 2.0},
            "function": {"path": f"{__name__}:shout", "factor": 0.5},
        },
        load_model=load_model,
    )(["p", "p"], ["A b", "A B c"], None)
    np.testing.assert_array_equal(parts["short"], np.float32([0.0, -0.5]))
    np.testing.assert_array_equal(parts["function"], np.float32([0.5, 1.0]))
    np.testing.assert_array_equal(total, np.float32([0.5, 0.0]))


@pytest.mark.parametrize(
    "answer,expected",
    [("It has 2 faults.\nFinal score: 7", 0.7), ("final Score: 8.5/10", 0.85), ("9", 0.9)],
)
def test_a_judges_rating_is_the_number_after_the_word_score(monkeypatch, answer, expected):
    asked = []
    monkeypatch.setattr(
        rewards.Client,
        "chat",
        lambda self, model, messages, **options: (
            asked.append((model, messages[0]["content"], options)) or answer
        ),
    )
    fn = REWARDS["judge"](url="http://nowhere", model="m", max_tokens=9)
    assert fn(["What?"], ["That."], [{}]) == [pytest.approx(expected)]
    assert (
        asked[0][0] == "m"
        and "What?" in asked[0][1]
        and "That." in asked[0][1]
        and asked[0][2] == {"max_tokens": 9}
    )


def test_a_judge_without_a_number_is_named(monkeypatch):
    monkeypatch.setattr(
        rewards.Client, "chat", lambda self, model, messages, **options: "very good"
    )
    with pytest.raises(ValueError, match="'m' gave no number: 'very good'"):
        REWARDS["judge"](url="http://nowhere", model="m")(["p"], ["c"], [{}])


@pytest.mark.parametrize(
    "given,message",
    [
        ({}, "no reward"),
        ({"lexikon": {}}, "did you mean 'lexicon'"),
        ({"length": {}}, "target"),
        ({"length": {"target": 3, "from": 3}}, "from"),
        ({"length": {"target": 3, "unit": "pages"}}, "pages"),
        ({"function": {"path": "shout"}}, "module:function"),
    ],
)
def test_mistakes_in_the_config_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        rewards.resolve(given, load_model=load_model)


@pytest.mark.parametrize("scores,message", [([1.0], "shape"), ([1.0, float("nan")], "nan")])
def test_a_broken_reward_function_is_named(scores, message):
    broken = rewards.WeightedRewards((("mine", 1.0, lambda *_: scores),))
    with pytest.raises(ValueError, match=f"'mine'.*{message}"):
        broken(["p", "p"], ["a", "b"])


def test_a_missing_column_is_named_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'answers'"):
        rewards.exact()(["p"], ["a"], [{"answers": "a"}])
