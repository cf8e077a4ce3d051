# SPDX-License-Identifier: Apache-2.0
"""A judge of pairs in both orders: its verdicts, and what online DPO, XPO and Nash-MD make of
them."""

import dataclasses

import numpy as np
import pytest
from test_partners import play  # noqa: F401
from test_rollout import HELD_OUT, make_config, models  # noqa: F401

from align_jax.data.tokenizer import load_tokenizer
from align_jax.inference.client import Client
from align_jax.online import comparisons, rewards
from align_jax.online.judges import PairJudge, Verdicts
from align_jax.online.rewards import WeightedRewards
from align_jax.online.sampling import Prompts
from align_jax.runs.weights import load_model

NAMED = {"pair_judge": {"url": "https://nowhere", "model": "m"}}


class Answering(Client):
    """A client whose server answers by a function of both answers."""

    def __init__(self, answer):
        self.answer, self.asked, self.url = answer, [], "https://judge"

    def chat(self, model, messages, **options):
        _, a, b = messages[0]["content"].split("|")
        self.asked.append((a, b))
        return self.answer(a, b)


def judge(answer, **options):
    return PairJudge(Answering(answer), "m", "{prompt}|{a}|{b}", **options)


def longer(a, b):
    return "A" if len(a) > len(b) else "B" if len(b) > len(a) else "C"


@pytest.mark.parametrize(
    "answer,wins,tie,disagrees,silent",
    [
        (longer, 1.0, False, False, False),
        (lambda a, b: "B" if len(a) > len(b) else "A", 0.0, False, False, False),
        (lambda a, b: "A", 0.5, False, True, False),
        (lambda a, b: "C", 0.5, True, False, False),
        (lambda a, b: "C" if len(b) > len(a) else "A", 0.75, False, False, False),
        (lambda a, b: "hm" if len(b) > len(a) else "B", 0.25, False, False, True),
        (lambda a, b: "A or B?", 0.5, False, False, True),
    ],
)
def test_a_pair_is_judged_in_both_orders(answer, wins, tie, disagrees, silent):
    asked = judge(answer, abstain=True)
    found = asked(["p"], ["long"], ["s"])
    assert [x.item() for x in found] == [wins, tie, disagrees, silent]
    assert sorted(asked.client.asked) == [("long", "s"), ("s", "long")]
    if silent:
        with pytest.raises(ValueError, match="'m' at https://judge .*prompt 'p'"):
            judge(answer)(["p"], ["long"], ["s"])
    assert [len(x) for x in asked([], [], [])] == [0] * 4


def test_completions_meet_each_other_or_what_stands_against_them():
    asked = judge(longer)
    texts = [["a", "bbb", "a", "cc"], ["", "b", "cc", "dd"]]
    first, second = comparisons.compare(asked, ["p", "q"], texts, 2, facing=True)
    assert first.wins.tolist() == [0.5, 1.0, 0.5, 0.0] and first[1:] == (2, 1, 0, 0)
    assert second.wins.tolist() == [0.0, 0.0, 1.0, 1.0]
    assert len(asked.client.asked) == 2 * 3  # two equal texts are a tie that nobody is asked about
    everyone, _ = comparisons.compare(asked, ["p", "q"], texts, 4, facing=False)
    np.testing.assert_allclose(everyone.wins, [1 / 6, 1.0, 1 / 6, 2 / 3], rtol=1e-6)
    assert everyone[1:] == (6, 1, 0, 0)
    [data] = comparisons.compare(asked, ["p"], [["a", "bbb", "cc"]], 2, facing=True)
    assert data.wins.tolist() == [0.0, 1.0, 0.5]  # one answer of the data's meets both


def by_bytes(prompts, first, second):
    """Prefer the text with the greater sum of bytes, but now and then each in one order."""
    a, b = (np.array([sum(x.encode()) for x in texts]) for texts in (first, second))
    wins = np.float32(0.5 + 0.5 * np.sign(a - b))
    none = np.zeros(len(a), bool)
    odd = (a + b) % 3 == 0
    return Verdicts(np.where(odd, np.float32(0.5), wins), (a == b) & ~odd, odd, none)


def text(tokens):
    return load_tokenizer("byte").decode(
        tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


JUDGED = WeightedRewards((), pairs=("pair_judge", by_bytes))


def judged_source(play, name, **keywords):  # noqa: F811
    """Make a source whose samples a judge compares."""
    make, players, weights = play
    source, prompts = make(name, JUDGED, named=NAMED, **keywords)
    maker = source._maker
    sampler = dataclasses.replace(maker.sampler, facing=maker.config.facing)
    source._maker = dataclasses.replace(maker, sampler=sampler)
    return source, weights


def test_online_dpo_learns_the_better_of_two_and_leaves_ties_out(play, tmp_path):  # noqa: F811
    source, weights = judged_source(play, "dpo", responses_per_prompt=2, batch_size=4)
    batch = source.next(lambda: weights)
    records = source.log_samples(tmp_path, 1)
    ties = 0
    for group in range(4):
        said = [one["output"] for one in records[2 * group : 2 * group + 2]]
        verdict = by_bytes([""], said[:1], said[1:])
        tie = said[0] == said[1] or verdict.wins[0] == 0.5
        ties += tie
        assert batch.weight[group] == (0.0 if tie else 1.0)
        if not tie:
            assert batch.scores[group].tolist() == [1.0, 0.0]
            tokens = batch.tokens[2 * group][batch.loss_mask[2 * group]].tolist()
            better = said[int(verdict.wins[0] < 0.5)]
            assert text(tokens) == better
    metrics = source.metrics
    assert metrics["judge/pairs"] == 4
    assert (metrics["judge/ties"] + metrics["judge/disagreements"]) * 4 == ties
    assert metrics["reward"] == 0.5 and metrics["rewards/pair_judge"] == 0.5


@pytest.mark.parametrize("name", ["nash_md", "xpo"])
def test_samples_win_against_what_they_meet(play, name):  # noqa: F811
    source, weights = judged_source(play, name, responses_per_prompt=2, batch_size=4)
    batch = source.next(lambda: weights)
    assert set(np.unique(batch.scores)) <= {0.0, 0.5, 1.0}
    if name == "xpo":
        np.testing.assert_allclose(batch.scores[:, 2:], 1.0 - batch.scores[:, :2])
        for row in range(0, len(batch.tokens), 4):
            said = [batch.tokens[r][batch.loss_mask[r]].tolist() for r in range(row, row + 4)]
            said = [text(one) for one in said]
            expected = np.where(
                np.array(said[:2]) == np.array(said[2:]),
                0.5,
                by_bytes(["", ""], said[:2], said[2:]).wins,
            )
            np.testing.assert_allclose(batch.scores[row // 4, :2], expected)
    own = batch.scores[:, :2]
    assert source.metrics["judge/pairs"] == 8
    assert source.metrics["reward"] == pytest.approx(own.mean())
    assert source.metrics["against/win_rate"] == pytest.approx(own.mean())


def test_held_out_samples_are_judged_against_what_they_meet(play):  # noqa: F811
    source, weights = judged_source(play, "dpo", responses_per_prompt=2, batch_size=4)
    held_out = Prompts(HELD_OUT, load_tokenizer("byte"), max_length=24, max_new_tokens=6)
    found, _ = source._maker.evaluate(held_out, weights, {})
    assert found["judge/pairs"] == len(HELD_OUT) and found["reward"] == 0.5
    source, weights = judged_source(play, "nash_md", responses_per_prompt=2, batch_size=4)
    found, _ = source._maker.evaluate(held_out, weights, {})
    assert found["judge/pairs"] == 2 * len(HELD_OUT)
    assert found["reward"] == found["against/win_rate"] == 1.0 - found["against/reward"]


@pytest.mark.parametrize(
    "name,options,words",
    [
        ("kto", {"responses_per_prompt": 1}, "nothing to compare"),
        ("dpo", {"responses_per_prompt": 1, "against": "data"}, "leave config.rewards empty"),
        ("kto", {"against": "data", "batch_size": 5}, "leave config.rewards empty"),
        ("grpo", {"normalize_scores": True}, "says how often a completion wins"),
        ("nash_md", {"score_clip": 1.0}, "score_clip = 1.0 shapes rewards"),
        ("rloo", {"objective": {"advantages": "greedy"}}, "a judge of pairs gives none"),
        ("dpo", {"named": NAMED | {"length": {"target": 3}}}, "let it be the only one"),
        ("dpo", {"named": {"j": {"kind": "pair_judge", "weight": 2.0}}}, "url"),
        (
            "dpo",
            {"named": {"j": {"kind": "pair_judge", "weight": 2.0, "url": "x", "model": "m"}}},
            "of weight 1",
        ),
    ],
)
def test_what_a_judge_of_pairs_does_not_go_with_is_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        make_config(name, **{"named": NAMED} | options)


def test_a_judge_of_pairs_is_of_rollouts_alone():
    with pytest.raises(ValueError, match="kind 'judge' rates them.*win_rate"):
        rewards.resolve(NAMED, load_model=load_model)
    with pytest.raises(ValueError, match="the fields {prompt}, {a}, {b}"):
        rewards.resolve(
            {"pair_judge": NAMED["pair_judge"] | {"question": "{prompt}?"}},
            load_model=load_model,
            online=True,
        )
    with pytest.raises(ValueError, match="did you mean 'abstain'"):
        rewards.check({"pair_judge": NAMED["pair_judge"] | {"abstein": True}}, ())
