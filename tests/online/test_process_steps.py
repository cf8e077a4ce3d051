# SPDX-License-Identifier: Apache-2.0
"""Process rewards: steps of a completion, what a model says of them, and a rollout's batch."""

import json

import numpy as np
import pytest
import torch
import transformers
from test_rollout import equal, make, make_config, models  # noqa: F401

from align_jax.data.tokenizer import load_tokenizer
from align_jax.inference.generate import Completion
from align_jax.online import rewards, steps
from align_jax.online.rewards import REWARDS, WeightedRewards
from align_jax.online.steps import StepReward
from align_jax.runs.weights import load_model

NAMED = {"process": {"path": "anywhere"}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A process reward model as align_jax.export writes one."""
    path = tmp_path_factory.mktemp("process")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=272,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        num_labels=1,
        pad_token_id=256,
        initializer_range=0.4,
        id2label={0: "step"},
        label2id={"step": 0},
        step_separator="\n",
    )
    model = transformers.LlamaForSequenceClassification(config).eval()
    model.save_pretrained(path)
    tokenizer = load_tokenizer("byte")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(path)
    return path, model, tokenizer


def logits(model, tokenizer, text):
    """Return the score at each line end of a text."""
    ids = tokenizer(text).input_ids
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids])).last_hidden_state
        said = model.score(hidden)[0, :, 0]
    return np.float32([said[i] for i, one in enumerate(ids) if tokenizer.decode(one) == "\n"])


def test_steps_are_scored_where_they_were_in_training(checkpoint):
    path, model, tokenizer = checkpoint
    fn = REWARDS["process"](path=str(path), form="logit", rows=2, load_model=load_model).fn
    said = ["4\n\n5 + 5\nand so", "one step", "cut off\nhere", "", "\n"]
    rows = [{}, {}, {"finished": False}, {}, {}]
    found = fn(["What? "] * 5, said, rows)
    assert [[end for end, _ in one] for one in found] == [[2, 9, 16], [9], [8], [], []]
    # as training writes them: each step with a separator behind it, and no empty ones
    for one, text in zip(found, ["4\n5 + 5\nand so\n", "one step\n", "cut off\n"]):
        expected = logits(model, tokenizer, "What? " + text)
        np.testing.assert_allclose([reward for _, reward in one], expected, atol=1e-4)
    for form, expected in (("probability", 1 / (1 + np.exp(-found[1][0][1]))), ("signed", None)):
        fn = REWARDS["process"](path=str(path), form=form, load_model=load_model).fn
        (((_, reward),),) = fn(["What? "], ["one step"], [{}])
        assert reward == pytest.approx(  # in a batch of another shape
            np.tanh(found[1][0][1] / 2) if expected is None else expected, rel=1e-5
        )


def test_steps_become_one_number_where_that_is_asked_for(checkpoint):
    path, _, _ = checkpoint
    said = ["a\nb\nc", "d\n", ""]
    fn = REWARDS["process"](path=str(path), load_model=load_model).fn
    each = [[reward for _, reward in one] for one in fn(["p"] * 3, said, [{}] * 3)]
    for aggregate, of in (("min", min), ("product", np.prod), ("mean", np.mean), ("last", None)):
        whole = REWARDS["process"](path=str(path), aggregate=aggregate, load_model=load_model)
        found = whole(["p"] * 3, said, [{}] * 3)
        expected = [one[-1] if of is None else of(one) for one in each[:2]]
        np.testing.assert_allclose(found[:2], expected, rtol=1e-5)
        assert found[2] is None


@pytest.mark.parametrize(
    "text,separator,finish,ends,places",
    [
        ("ab\nc\nd", "\n", "stop", [3, 5, 7], [2, 4, 6]),  # the last with the end of the text
        ("ab\nc\nd", "\n", "length", [3, 5], [2, 4]),
        ("ab\n", "\n", "stop", [3], [2]),  # its own separator, not the end of the text
        ("aé b№№c", "№", "stop", [5, 8], [7, 12]),
    ],
)
def test_a_step_ends_with_the_policy_s_own_token(text, separator, finish, ends, places):
    tokenizer = load_tokenizer("byte")
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    tokens += [tokenizer.eos_token_id] * (finish == "stop")
    zeros = np.zeros(len(tokens), np.float32)
    completion = Completion(np.array(tokens, np.int32), zeros, zeros, text, finish)
    found = steps.split_steps(text, separator, finish == "stop")
    assert [end for _, end in found] == ends
    given = [(end, 1.0) for _, end in found]
    assert steps.token_places(tokenizer, [65], completion, given) == places


def halves(prompts, completions, extras):
    """Reward the two halves of a completion, where it has so many characters."""
    cuts = [[len(text) // 2, len(text)] if len(text) > 1 else [] for text in completions]
    return [
        [(end, float(len(prompt) + sum(text.encode()[:end]) % 7)) for end in ends]
        for prompt, text, ends in zip(prompts, completions, cuts)
    ]


SCORED = WeightedRewards((), (("process", 0.5, StepReward(halves, "\n")),))


@pytest.mark.parametrize("layout", ["plain", "shared_prefix"])
def test_a_rollout_s_advantages_are_those_of_its_steps(models, layout, tmp_path):  # noqa: F811
    def source():
        return make(
            models, "grpo", rewards=SCORED, named=NAMED, layout=layout, batch_size=1, prompts=2
        )

    made = source()
    batch = made.next(lambda: models[2])
    records = made.log_samples(tmp_path, 1)[:4]
    given = [one["step_rewards"] for one in records]
    every = np.concatenate(given)
    assert np.ptp(every) > 0
    for number, rewards_ in enumerate(given):
        row, slot = divmod(number, made.shape.slots)
        own = batch.advantages[row][batch.loss_mask[row] & (batch.slot[row] == slot)]
        normal = (np.array(rewards_) - every.mean()) / (every.std(ddof=1) + 1e-4)
        togo = [*np.cumsum(normal[::-1])[::-1], 0.0]
        changes = [own[0]] + [b for a, b in zip(own, own[1:]) if b != a]
        np.testing.assert_allclose(changes, togo[: len(changes)], rtol=1e-4, atol=1e-5)
    assert records[0]["reward"] == pytest.approx(sum(given[0]))
    assert 0 < made.metrics["completions/steps"] <= 2 and made.metrics["rewards/process"] > 0
    state = made.save(tmp_path, 1)
    resumed = source()
    resumed.restore(tmp_path, state)
    assert equal(made.next(lambda: models[2]), resumed.next(lambda: None))


def test_ppo_learns_them_as_token_rewards(models):  # noqa: F811
    options = {"kl_coef": 0.0, "whiten_advantages": False, "lam": 1.0}
    source = make(models, "ppo", rewards=SCORED, named=NAMED, objective=options)
    batch = source.next(lambda: models[2])
    first = batch.loss_mask.argmax(axis=1)
    totals = batch.returns[np.arange(len(first)), first]
    assert totals.mean() == pytest.approx(source.metrics["reward"], rel=1e-4)
    assert source.metrics["reward"] == pytest.approx(source.metrics["objective/scores"], rel=1e-4)


@pytest.mark.parametrize(
    "name,options,words",
    [
        ("dpo", {}, "gives a number a step, and the objective 'dpo' learns one a sample.*'min'"),
        ("nash_md", {}, "learns one a sample"),
        ("grpo", {"objective": {"advantages": "pass_at_k"}}, "'pass_at_k' do not look at"),
        (
            "ppo",
            {"objective": {"advantages": "greedy"}},
            "'greedy' do not look at rewards of steps",
        ),
        ("grpo", {"environment": "a:b"}, "environment = 'a:b' is of whole completions"),
        ("grpo", {"normalize_scores": True}, "normalize_scores = True is of whole"),
        ("rloo", {"score_clip": 2.0}, "score_clip = 2.0"),
        ("grpo", {"against": "reference"}, "against = 'reference' compares scores"),
    ],
)
def test_what_would_not_look_at_steps_is_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        make_config(name, named=NAMED, **options)
    named = {"process": {"path": "anywhere", "aggregate": "min"}}
    if "do not look" not in words and "environment" not in options:
        assert not make_config(name, named=named, **options).steps_rewarded


def test_a_mistake_about_a_process_reward_is_named(checkpoint, tmp_path):
    path, _, _ = checkpoint
    with pytest.raises(ValueError, match="reward 'p' gives a number a step, and here each"):
        rewards.resolve({"p": {"kind": "process", "path": str(path)}}, load_model=load_model)
    with pytest.raises(ValueError, match="reward 'p': .*form"):
        given = {"p": {"kind": "process", "path": str(path), "form": "log"}}
        rewards.resolve(given, load_model=load_model, online=True)
    for options, words in (
        ({"separator": "##"}, "was trained with '\\\\n' behind each step"),
        ({"form": "log"}, "form"),
        ({"aggregate": "max"}, "aggregate"),
        ({"aggregate": "product", "form": "logit"}, "'product' is of probabilities"),
    ):
        with pytest.raises(ValueError, match=words):
            REWARDS["process"](path=str(path), load_model=load_model, **options)
    with pytest.raises(ValueError, match="says nothing of a whole answer.*'process'"):
        REWARDS["model"](path=str(path), load_model=load_model)
    other = tmp_path / "other"
    other.mkdir()
    for file in path.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    said = json.loads((path / "config.json").read_text())
    for change, words in (
        ({"id2label": {"0": "reward"}}, "says nothing of a step.*'model'"),
        ({"id2label": {"0": "LABEL_0"}, "step_separator": None}, "name it by separator"),
    ):
        (other / "config.json").write_text(json.dumps(said | change))
        with pytest.raises(ValueError, match=words):
            REWARDS["process"](path=str(other), load_model=load_model)
    fn = REWARDS["process"](path=str(other), separator="\n", load_model=load_model)
    assert fn.separator == "\n"
    with pytest.raises(ValueError, match="'<eos>'|tokenizer cannot write"):
        tokenizer = load_tokenizer("byte")
        steps.check_separator(tokenizer.eos_token, tokenizer)
    steps.check_separator(" ки\n", load_tokenizer("byte"))
