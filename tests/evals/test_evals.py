# SPDX-License-Identifier: Apache-2.0
"""Evaluations: against transformers' log-probabilities, by hand, and as a program."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
import torch
import transformers

from align_jax import evaluate
from align_jax.core.options import DataOptions, RolloutOptions
from align_jax.data import datasets
from align_jax.data.tokenizer import load_tokenizer
from align_jax.evals import EVALS, generation
from align_jax.evals.policy import EvaluatedPolicy
from align_jax.evals.win_rate import by_judge, by_rewards, tally
from align_jax.inference.client import Client
from align_jax.online import judges, rewards
from align_jax.online.judges import PairJudge
from align_jax.parallel.mesh import make_mesh
from align_jax.runs.weights import load_model

PAIRS = [
    ("What? ", "good answer", "bad"),
    ("Why? ", "no", "because it is so"),
    ("Who? ", "me", "you"),
    ("When? ", "now", "then"),
    ("Where? ", "here", "over there"),
]


def letters(prompts, completions, extras):
    return [float(len(text)) for text in completions]


REWARD = rewards.WeightedRewards((("letters", 1.0, letters),))


@pytest.fixture(scope="module")
def folder(testdata):
    return str(testdata / "models" / "TinyStories-656K")


@pytest.fixture(scope="module")
def policy(folder):
    mesh = make_mesh({"fsdp": 2}, jax.devices()[:2])
    loaded = load_model(folder, mesh=mesh, compute_dtype="float32")
    noisy = jax.tree.map(lambda x: x * 1.05, loaded.params)
    return EvaluatedPolicy(loaded.model, noisy, load_tokenizer(folder), mesh, loaded, "noisy")


@pytest.fixture()
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": p, "chosen": c, "rejected": r}) + "\n" for p, c, r in PAIRS)
    )
    return str(path)


def options(samples):
    return RolloutOptions(responses_per_prompt=samples, max_new_tokens=8, rows=8)


def expected_logps(folder, tokenizer, scale):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    from align_jax.core.schema import Example
    from align_jax.data import chat

    sums = []
    for prompt, *responses in PAIRS:
        tokens = chat.encode(Example(prompt, tuple(responses)), tokenizer)
        for ids in tokens.responses:
            whole = torch.tensor([[*tokens.prompt, *ids]])
            with torch.no_grad():
                logps = torch.log_softmax(model(whole).logits[0, :-1], -1)
            sums.append(logps.gather(1, whole[0, 1:, None])[-len(ids) :].sum().item())
    return np.array(sums).reshape(-1, 2)


def test_preference_and_perplexity_equal_transformers(policy, folder, pairs):
    found = EVALS["preference"].fn(
        policy, datasets.load(pairs, "pairs", DataOptions(), chat=False), batch_size=4
    )
    mine, other = (expected_logps(folder, policy.tokenizer, scale) for scale in (1.05, 1.0))
    rewards_ = 0.1 * (mine - other)
    assert found["logps/chosen"] == pytest.approx(mine[:, 0].mean(), abs=1e-3)
    assert found["logps/accuracies"] == pytest.approx((mine[:, 0] > mine[:, 1]).mean())
    assert found["rewards/margins"] == pytest.approx(
        (rewards_[:, 0] - rewards_[:, 1]).mean(), abs=1e-4
    )
    assert found["rewards/accuracies"] == pytest.approx((rewards_[:, 0] > rewards_[:, 1]).mean())
    assert found["examples"] == 5
    labeled = datasets.load(pairs, "unpaired", DataOptions(), chat=False)
    of_labels = EVALS["feedback"].fn(policy, labeled, batch_size=4)
    same = (
        "logps/chosen",
        "logps/rejected",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
    )
    assert [of_labels[name] for name in same] == pytest.approx(
        [found[name] for name in same], rel=1e-4
    )
    above = rewards_[:, :1] > rewards_[:, 1]
    assert of_labels["rewards/auc"] == pytest.approx(above.mean()) and of_labels["desirable"] == 5
    with pytest.raises(ValueError, match="needs a reference"):
        EVALS["feedback"].fn(policy._replace(reference=None), labeled)
    found = EVALS["perplexity"].fn(
        policy, datasets.load(pairs, "completions", DataOptions(), chat=False), batch_size=4
    )
    assert found["nll"] == pytest.approx(-mine[:, 0].sum() / found["tokens"], abs=1e-4)
    assert found["reference_nll"] == pytest.approx(-other[:, 0].sum() / found["tokens"], abs=1e-4)


def test_generation_reports_rewards_and_the_kl_of_its_own_samples(policy, pairs):
    examples = datasets.load(pairs, "prompts", DataOptions(), chat=False)
    kept = []
    found = EVALS["generation"].fn(policy, examples, REWARD, options(4), keep=kept.append)
    assert len(kept) == 20 and found["reward"] == pytest.approx(
        sum(row["reward"] for row in kept) / 20, rel=1e-5
    )
    assert found["prompts"] == 5 and 0 < found["completions/mean_length"] <= 8
    assert found["best_of_n"] > found["reward"] > 0 and found["objective/kl"] > 0
    same = policy._replace(params=policy.reference.params)
    found = EVALS["generation"].fn(same, examples, REWARD, options(1))
    assert found["objective/kl"] == pytest.approx(0.0, abs=1e-5) and "best_of_n" not in found


def test_an_evaluations_environment_knows_the_policys_end_tokens(policy, pairs, monkeypatch):
    told = []

    def made(*given, end_tokens, **options):
        told.extend(end_tokens)
        raise InterruptedError

    monkeypatch.setattr(generation, "make_player", made)
    config = dataclasses.replace(policy.model.config, end_tokens=(5, 7))
    ends = policy._replace(model=dataclasses.replace(policy.model, config=config))
    examples = datasets.load(pairs, "prompts", DataOptions(), chat=False)
    with pytest.raises(InterruptedError):
        EVALS["generation"].fn(ends, examples, REWARD, options(1))
    assert told == [5, 7]


def _lost(*given):
    raise ConnectionError("the judge is gone")


def test_win_rate_against_itself_is_half_and_against_empty_answers_one(policy, pairs, tmp_path):
    examples = datasets.load(pairs, "prompts", DataOptions(), chat=False)
    same = policy._replace(params=policy.reference.params)
    by_length = by_rewards(REWARD)
    kept = []
    found = EVALS["win_rate"].fn(same, examples, by_length, options=options(1), keep=kept.append)
    assert [row["win"] for row in kept] == [0.5] * 5 and len(json.dumps(kept)) > 0
    assert all(row["output"] == row["other"] and row["prompt"] for row in kept)
    assert found["win_rate"] == 0.5 and found["ties"] == 1.0
    kept.clear()
    with pytest.raises(ConnectionError):  # what was sampled is not lost with the judge
        EVALS["win_rate"].fn(same, examples, _lost, options=options(1), keep=kept.append)
    assert [(bool(row["other"]), row["win"]) for row in kept] == [(True, None)] * 5
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "answer": ""}) + "\n" for p, *_ in PAIRS))
    alone = policy._replace(reference=None)
    found = EVALS["win_rate"].fn(
        alone,
        datasets.load(str(path), "prompts", DataOptions(), chat=False),
        by_length,
        options=options(1),
    )
    assert found["win_rate"] == 1.0 and found["comparisons"] == 5
    with pytest.raises(ValueError, match="reference"):
        EVALS["win_rate"].fn(
            alone,
            datasets.load(pairs, "prompts", DataOptions(), chat=False),
            by_length,
            options=options(1),
        )


def test_a_judge_is_asked_in_both_orders():
    class Judge(Client):
        def __init__(self, answer):
            self.answer, self.asked, self.url = answer, [], "https://judge"

        def chat(self, model, messages, **options):
            self.asked.append(messages[0]["content"])
            return self.answer(messages[0]["content"])

    biased = Judge(lambda text: "I say A")
    assert (
        by_judge(PairJudge(biased, "m"))(["p"], ["x"], ["y"], [{}]) == [0.5]
        and len(biased.asked) == 2
    )
    fair = Judge(
        lambda text: "A" if text.index("best") < text.index("Answer B") else "The answer: B"
    )
    found = by_judge(PairJudge(fair, "m"))(["p", "p"], ["best", "y"], ["x", "best"], [{}, {}])
    assert found == [1.0, 0.0]
    assert tally(np.float32([1.0, 0.5, 0.0, 1.0]), np.zeros(4, np.float32))["win_rate"] == 0.625
    with pytest.raises(ValueError, match="neither A, B nor C"):
        by_judge(PairJudge(Judge(lambda text: "well"), "m"))(["p"], ["x"], ["y"], [{}])
    with pytest.raises(ValueError, match="'m' at https://judge named A and B: .*prompt 'p'"):
        by_judge(PairJudge(Judge(lambda text: "B beats A"), "m"))(["p"], ["x"], ["y"], [{}])
    reasoned = Judge(lambda text: "A good answer beats a bad one.\n**Answer: C**")
    assert by_judge(PairJudge(reasoned, "m"))(["p"], ["x"], ["y"], [{}]) == [0.5]
    with pytest.raises(ValueError, match="expected the fields {prompt}, {a}, {b}"):
        PairJudge(reasoned, "m", question="Which of {a} and {b}?")


def test_the_program_names_mistakes_and_writes_an_aligned_table(policy, pairs):
    for item, message in (
        ("preferences=x", "did you mean 'preference'"),
        ("preference", "NAME=SOURCE"),
        ("generation=x", "--rewards"),
        ("win_rate=x", "--judge"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate.evaluate(policy, [item])
    results = evaluate.evaluate(policy, [f"preference={pairs}"], limit=3)
    text = evaluate.table(results)
    assert "examples" in text and "3.0000" in text and "±" in text


def test_the_programs_judge_has_the_limit_in_all_that_a_rewards_has(monkeypatch):
    values = types.SimpleNamespace(rewards="", judge="http://localhost:1", allow_http=False)
    values.temperature, values.top_p = 1.0, 1.0
    monkeypatch.setattr(evaluate, "flags", types.SimpleNamespace(FLAGS=values))
    monkeypatch.setattr(evaluate.command, "output_path", lambda name: None)
    monkeypatch.setattr(evaluate.distributed, "start", lambda: None)

    def client(url, *, allow_http, total_seconds):
        raise StopIteration(total_seconds)

    monkeypatch.setattr(evaluate, "Client", client)
    with pytest.raises(StopIteration) as made:
        evaluate.main([])
    assert made.value.value == judges.TOTAL_SECONDS > 0
