# SPDX-License-Identifier: Apache-2.0
"""Text rewards: each row of the table on hand-made cases, and its mistakes."""

import concurrent.futures
import json
import os
import runpy
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import label
from align_jax.core.schema import Example
from align_jax.inference.client import Client
from align_jax.inference.generate import Completion
from align_jax.losses import advantages as estimators
from align_jax.online import judges, rewards, rules, sampling
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
    table = rules.load_lexicon(str(path))
    assert rules.valences(text, table, rules.longest_phrase(table)) == [2.0, 2.0, 1.0, -1.5]
    for form, expected in (
        ("sum", 3.5),
        ("mean", 3.5 / 11),
        ("compound", 3.5 / np.sqrt(3.5**2 + 15)),
    ):
        fn = rules.lexicon(str(path), form=form)
        np.testing.assert_allclose(fn(["", ""], [text, ""], [{}, {}]), [expected, 0.0], rtol=1e-12)
    (tmp_path / "broken.txt").write_text("good\t2.0\nbad -3.0\n")
    with pytest.raises(ValueError, match="broken.txt:2"):
        rules.lexicon(str(tmp_path / "broken.txt"))


def test_vader_lexicon_prefers_the_happy_story(testdata):
    fn = rules.lexicon(str(testdata / "reward" / "vader_lexicon.txt"))
    happy, sad = fn(
        ["", ""],
        ["She was happy and loved her friend.", "He was sad and hated the pain."],
        [{}, {}],
    )
    assert happy > 0.5 and sad < -0.5


def test_every_gold_answer_of_gsm8k_scores_one_against_itself(testdata):
    rows = [json.loads(line) for line in (testdata / "rlvr" / "gsm8k_test.jsonl").open()]
    fn = rules.numeric()
    assert sum(fn([r["question"] for r in rows], [r["answer"] for r in rows], rows)) == len(rows)
    wrong = [f"#### {rules.find_number(r['answer']) + 1}" for r in rows]
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
        Client,
        "chat",
        lambda self, model, messages, **options: (
            asked.append((model, messages[0]["content"], options)) or answer
        ),
    )
    fn = REWARDS["judge"](url="https://nowhere", model="m", max_tokens=9)
    assert fn(["What?"], ["That."], [{}]) == [pytest.approx(expected)]
    assert (
        asked[0][0] == "m"
        and "What?" in asked[0][1]
        and "That." in asked[0][1]
        and asked[0][2] == {"max_tokens": 9}
    )


def test_a_judge_without_a_number_is_named(monkeypatch):
    monkeypatch.setattr(Client, "chat", lambda self, model, messages, **options: "very good")
    with pytest.raises(ValueError, match="'m' gave no number: 'very good'"):
        REWARDS["judge"](url="https://nowhere", model="m")(["p"], ["c"], [{}])


@pytest.mark.parametrize(
    "given,message",
    [
        ({}, "no reward"),
        ({"lexikon": {}}, "did you mean 'lexicon'"),
        ({"length": {}}, "target"),
        ({"length": {"target": 3, "from": 3}}, "from"),
        ({"length": {"target": 3, "unit": "pages"}}, "pages"),
        ({"function": {"path": "shout"}}, "module:function"),
        ({"length": {"target": "3"}}, "reward 'length': target = '3': expected a value of"),
        ({"length": {"target": True}}, "target = True"),
        ({"numeric": {"tolerance": float("nan")}}, "tolerance = nan: expected a finite number"),
        ({"format": float("nan")}, "reward 'format': weight = nan: expected a finite number"),
        ({"format": float("inf")}, "weight = inf"),
        ({"format": True}, "weight = True"),
        ({"format": {"weight": "1"}}, "weight = '1'"),
        ({"format": {"weight": None}}, "weight = None"),
        ({"format": None}, "expected a weight or options such as .*, got None"),
        ({"format": [1.0]}, r"got \[1.0\]"),
        ({"format": {"kind": ["length"]}}, "is unknown"),
        ({"mine:f": 1.0}, 'is named {"f": {"kind": "function", "path": "mine:f"}}'),
        ({"regex": {"pattern": "("}}, "reward 'regex': .*unterminated"),
        ({"lexicon": {"path": "/no/such/file"}}, "reward 'lexicon': .*No such file.*/no/such/file"),
        ({"judge": {"url": "http://gpu7:8000", "model": "m"}}, "'judge': .*plain http.*allow_http"),
        ({"judge": {"url": "https://a", "model": "m", "api_key": "x"}}, "name it in key_variable"),
        ({"judge": {"url": "https://a", "model": "m", "questoin": "x"}}, "mean 'question'"),
        ({"judge": {"url": "https://a", "model": "m", "question": "Rate {it}"}}, "the fields"),
        ({"judge": {"url": "https://a", "model": "m", "scale": 0.0}}, "scale > 0"),
    ],
)
def test_mistakes_in_the_config_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        rewards.resolve(given, load_model=load_model)


@pytest.mark.parametrize(
    "scores,message",
    [
        ([1.0], r"shape \(1,\) for 2 completions"),
        ([], "shape"),
        (np.ones((2, 1)), r"shape \(2, 1\)"),
        (np.float32(1.0), r"shape \(\)"),
        ([1.0, float("nan")], r"gave nan at row 1 \(prompt 'p', completion 'b'\)"),
        ([1.0, float("inf")], "inf"),
        ([1e300, 1.0], "1e.300 at row 0"),
        ([10**400, 1.0], "row 0"),
        ([1.0, "1"], r"gave 1 \(a str\) at row 1"),
        ([1.0, 1j], "a complex"),
        ([[1.0], [1.0]], r"\(a list\)"),
        (np.array(["a", "b"]), "a str"),
        ("ab", "returned a str; expected a list"),
        ({0: 1.0, 1: 1.0}, "returned a dict"),
        (None, "returned a NoneType"),
        (3.0, "returned a float"),
        ((x for x in (1.0, 2.0)), "returned a generator"),
    ],
)
def test_a_broken_reward_function_is_named(scores, message):
    broken = rewards.WeightedRewards((("mine", 1.0, lambda *_: scores),))
    with pytest.raises(ValueError, match=f"'mine'.*{message}"):
        broken(["p", "p"], ["a", "b"])


def test_a_missing_column_is_named_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'answers'"):
        rules.exact()(["p"], ["a"], [{"answers": "a"}])


@pytest.mark.parametrize(
    "scores",
    [
        (1, 0),
        [True, False],
        [np.float64(1), np.bool_(False)],
        np.array([1, 0], np.int8),
        np.array([True, False]),
        jnp.array([1.0, 0.0]),
        [jnp.float32(1.0), np.zeros(())],
    ],
)
def test_numbers_of_all_kinds_are_taken(scores):
    total, _ = rewards.WeightedRewards((("mine", 2.0, lambda *_: scores),))(["p", "p"], ["a", "b"])
    np.testing.assert_array_equal(total, np.float32([2.0, 0.0]))


def test_what_no_reward_scored_is_neither_better_nor_worse():
    each = np.float32([[3, np.nan, 1], [np.nan] * 3])
    found = sampling.unscored_as_mean(np.nan_to_num(each), {"mine": each.reshape(-1)})
    np.testing.assert_array_equal(found, np.float32([[3, 2, 1], [2, 2, 2]]))
    assert estimators.group_advantages(jnp.asarray(found))[0, 1] == 0
    assert estimators.leave_one_out(jnp.asarray(found))[0, 1] == 0


def test_none_abstains_and_a_row_without_any_reward_gets_zero():
    total, parts = rewards.WeightedRewards(
        (("a", 1.0, lambda *_: [1.0, None, None]), ("b", 0.5, lambda *_: [1.0, 4.0, None]))
    )(["p"] * 3, ["x"] * 3)
    np.testing.assert_array_equal(total, np.float32([1.5, 2.0, 0.0]))
    np.testing.assert_array_equal(parts["a"], np.float32([1.0, np.nan, np.nan]))
    assert rewards.counted(parts["b"]).tolist() == [1.0, 4.0]
    assert rewards.by_name(parts, 1) == {"a": None, "b": 4.0}


def test_metrics_and_records_of_rewards_that_abstain_have_no_nan():
    total, parts = rewards.WeightedRewards(
        (("a", 1.0, lambda *_: [1.0, None]), ("b", 1.0, lambda *_: [None, None]))
    )(["p"] * 2, ["x"] * 2)
    one = Completion(np.array([1], np.int32), *[np.zeros(1, np.float32)] * 2, "x", "stop")
    samples = sampling.PromptSamples(
        0, Example("p", ()), np.array([1], np.int32), [one, one], total, total, parts
    )
    rollout = sampling.SampledRollout([samples], 1, {}, 1.0, 2)
    found = sampling.describe(rollout)
    assert found["rewards/a"] == 1.0 and found["rewards/a/abstained"] == 1.0
    assert found["rewards/b/abstained"] == 2.0 and found["rewards/all_abstained"] == 1.0
    assert "rewards/b" not in found and np.isfinite(list(found.values())).all()
    assert sampling.records(rollout)[0]["rewards"] == {"a": 1.0, "b": None}
    rows = [{"prompt": "p", "output": "x", "prompt_id": i, "sample_id": 0} for i in (0, 1)]
    scored = label.score(rows, rewards.WeightedRewards((("a", 1.0, lambda *_: [None, 2.0]),)))
    assert [(one["prompt_id"], one["reward"]) for one in scored] == [(1, 2.0)]


def of_completions(completions, **kwargs):
    assert sorted(kwargs) == ["answer", "level", "prompts"]
    return [float(text == gold) for text, gold in zip(completions, kwargs["answer"])]


def of_column(prompts, completions, answer, level=None):
    return [float(c == a) if n else None for c, a, n in zip(completions, answer, level)]


def of_turns(prompts, completions, **kwargs):
    return [len(p) + len(c[-1]["content"]) / 10 for p, c in zip(prompts, completions)]


async def awaited(completions, **kwargs):
    return [float(len(text)) for text in completions]


def greedy(prompts, completions, answr):
    return [0.0 for _ in completions]


def stateful(completions, completion_ids):
    return []


def strange(a, b):
    return []


def failing(completions, **kwargs):
    return [1.0 / len(text) for text in completions]


def leaving(completions, **kwargs):
    sys.exit()


ROWS = [{"answer": "a", "level": 1}, {"answer": "b", "level": 0}]


def user(name, **options):
    return rewards.WeightedRewards(
        (("mine", 1.0, rewards.function(f"{__name__}:{name}", **options)),)
    )


@pytest.mark.parametrize(
    "name,expected", [("of_completions", [1, 0]), ("of_column", [1, 0]), ("awaited", [1, 2])]
)
def test_a_function_in_trls_form_gets_the_columns_as_lists(name, expected):
    total, _ = user(name)(["p", "p"], ["a", "xx"], ROWS)
    np.testing.assert_array_equal(total, np.float32(expected))


def test_a_function_in_trls_form_gets_turns_where_the_data_have_turns():
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    total, _ = user("of_turns")(["u", "u"], ["ab", "a"], [{"messages": turns}] * 2)
    np.testing.assert_allclose(total, [2.2, 2.1])


@pytest.mark.parametrize(
    "name,options,message",
    [
        ("shuot", {}, "has no function 'shuot'; did you mean 'shout'"),
        ("ROWS", {}, "is a list; expected a function"),
        ("strange", {}, r"takes \(a, b\); expected \(prompts, completions, extras\)"),
        ("stateful", {}, "needs 'completion_ids', which TRL's trainers give"),
        ("shout", {"facter": 2.0}, "takes no option 'facter'; did you mean 'factor'"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_at_the_start(name, options, message):
    with pytest.raises(ValueError, match=f"reward 'mine': .*{message}"):
        given = {"mine": {"kind": "function", "path": f"{__name__}:{name}", **options}}
        rewards.check(given, [])


def test_modules_that_cannot_be_imported_are_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "needs_more.py").write_text("import no_such_module_at_all")
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)")
    for path, message in (
        ("no_such_module:f", "no module 'no_such_module'; start where it lies"),
        ("rewards.py:f", "a module, not a file: 'rewards'"),
        ("needs_more:f", "'needs_more' cannot be imported: No module named 'no_such_module_at"),
        ("leaves:f", "'leaves' cannot be imported: SystemExit: 0"),
    ):
        with pytest.raises(ValueError, match=message):
            rewards.function(path)


def test_a_script_without_a_main_guard_gives_its_own_function(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    script = tmp_path / "my_run.py"
    script.write_text(
        "from align_jax.online import rewards\n"
        "def mine(completions, **kwargs):\n    return [float(started) for _ in completions]\n"
        "started = globals().get('started', 0) + 1\n"
        "score = rewards.function('my_run:mine')(['p'], ['c'], [{}])\n"
    )
    assert runpy.run_path(str(script), run_name="__main__")["score"] == [1.0]
    assert "my_run" not in sys.modules


def test_what_the_data_lack_is_said_at_the_start_with_file_and_line():
    examples = [
        Example("p", (), source=f"data.jsonl:{i}", extras=row)
        for i, row in enumerate([{"answer": "4"}, {"answer": "four"}, {"answer": None}, {}], 1)
    ]
    mine = {"kind": "function", "path": f"{__name__}:greedy"}
    for given, message in (
        ({"numeric": 1.0}, r"data.jsonl:2: reward 'numeric': .*no number: 'four'.* 2 more rows\)"),
        ({"exact": 1.0}, r"data.jsonl:3: reward 'exact': .*got 'None' \(a NoneType\)"),
        ({"exact": {"column": "anser"}}, "data.jsonl:1: .*'anser' is unknown; did you mean 'answ"),
        (
            {"mine": mine},
            "data.jsonl:1: reward 'mine': .*'answr' is unknown; did you mean 'answer'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            rewards.check(given, examples)
    rewards.check({"exact": 1.0, "numeric": 1.0, "format": 1.0}, examples[:1])


def sleeping(prompts, completions, extras):
    for text in completions:
        time.sleep(60 if text == "slow" else 0)
    return [0.0] * len(completions)


def spinning(completions, **columns):
    for turns in completions:
        while turns == "slow":
            try:
                pass
            except Exception:
                pass


@pytest.mark.parametrize("name", ["sleeping", "spinning"])
@pytest.mark.parametrize("in_thread", [False, True])
def test_a_function_that_does_not_return_is_ended_and_named_with_the_row(name, in_thread):
    if name == "sleeping" and in_thread:
        pytest.skip("a sleeping thread cannot be ended: the process is")
    fn = user(name, timeout_seconds=0.2)
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = (["p"] * 3, ["a", "b", "slow"], [{}] * 3)
        with pytest.raises(TimeoutError) as caught:
            pool.submit(fn, *asked).result() if in_thread else fn(*asked)
    assert time.monotonic() - began < 5
    said = str(caught.value)
    assert said.startswith("reward 'mine': no answer within timeout_seconds = 0.2 for 3 completio")
    assert "test_rewards.py:" in said and said.endswith("row 2 (completion 'slow')")


def test_a_function_that_does_not_return_and_cannot_be_ended_ends_the_process(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def stuck(completions, **columns):\n    while True:\n        try:\n            while True:"
        "\n                pass\n        except BaseException:\n            pass\n"
    )
    script = (
        "from align_jax.online import deadline, rewards\ndeadline._KNOCKS = 1\n"
        "rewards.function('mine:stuck', timeout_seconds=0.2)(['p'], ['a'], [{}])\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 1 and found.stderr.count("\n") == 1, found.stderr
    assert "mine.py:" in found.stderr and "cannot be stopped: the run ends" in found.stderr


def test_a_function_that_fails_is_named_with_the_row_and_its_line():
    completions = ["a", "b", "", "c", "d"]
    with pytest.raises(ValueError) as caught:
        user("failing")(["p"] * 5, completions, [{}] * 5)
    assert str(caught.value).startswith(
        "reward 'mine' failed at row 2 (prompt 'p', completion ''): ZeroDivisionError: "
    )
    assert "test_rewards.py:" in str(caught.value)
    with pytest.raises(ValueError, match=r"'mine' failed at row 0 .*: SystemExit"):
        user("leaving")(["p"], ["a"], [{}])


@pytest.mark.parametrize(
    "answer,message",
    [
        ("Final score: 11", "gave 11; expected 0 to 10"),
        ("score: -3", "gave -3; expected 0 to 10"),
        ("score: 1e9", "gave"),
        ("Score: 4/5", "gave 4/5; expected 0 to 10"),
        ("It has 2 faults and 3 merits.", "several numbers and marks none"),
        ("score: 1,000", "gave 1000"),
    ],
)
def test_a_rating_that_is_none_is_an_error_or_none_at_all(monkeypatch, answer, message):
    monkeypatch.setattr(Client, "chat", lambda *args, **options: answer)
    judge = {"url": "https://nowhere", "model": "m"}
    scored = rewards.WeightedRewards((("mine", 1.0, judges.judge(**judge)),))
    with pytest.raises(ValueError, match=f"'mine' failed at row 0 .*'m' .*{message}.*nowhere"):
        scored(["p"], ["c"])
    assert judges.judge(**judge, abstain=True)(["p"], ["c"], [{}]) == [None]


@pytest.mark.parametrize("answer", ["**Final score:** 7", "Rating: **7**/10", "7 out of 10", "7."])
def test_ratings_as_judges_write_them(monkeypatch, answer):
    monkeypatch.setattr(Client, "chat", lambda *args, **options: answer)
    fn = judges.judge(url="https://nowhere", model="m")
    assert fn(["p"], ["c"], [{}]) == [0.7]


@pytest.mark.parametrize(
    "text,message",
    [
        ('{"format": 1.0, "format": 2.0}', "--rewards={.*: 'format' is named twice"),
        (
            "{format: 1}",
            "--rewards={format: 1}: expected JSON such as .*there is no such file, or it is not",
        ),
        ("rewards.jsn", "--rewards=rewards.jsn: .*there is no such file"),
        ("[1]", "expected reward -> weight, got"),
        ("[" * 100000, "recursion"),
    ],
)
def test_rewards_of_a_command_line_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        rewards.from_json(text)
