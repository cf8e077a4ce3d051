# SPDX-License-Identifier: Apache-2.0
"""What the policy's samples meet: the data's answers, another player's samples; rounds."""

import dataclasses
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rollout import CONFIG, REWARDS, make_config, models  # noqa: F401

from align_jax.core import config as configs
from align_jax.core.schema import Example
from align_jax.data.tokenizer import load_tokenizer, pad_id
from align_jax.inference.engines import Local
from align_jax.inference.generate import Generator, Request
from align_jax.inference.mixture import Mixture
from align_jax.models.model import build
from align_jax.online.generators import make_opponent
from align_jax.online.partners import Opponent, sampled_positions
from align_jax.online.rewards import WeightedRewards
from align_jax.online.rollout import RolloutMaker, Rollouts
from align_jax.online.sampling import Prompts, PromptSampler
from align_jax.parallel.mesh import make_mesh
from align_jax.runs import loop, setup

TINY = pathlib.Path(__file__).parents[2] / "configs/tiny.py"
ANSWERS = [Example(f"prompt {i}", (f" gold {i}" * (i + 1),), source=f"a[{i}]") for i in range(4)]


@pytest.fixture(scope="module")
def play(models):  # noqa: F811
    """Make a source whose samples meet something; the generators are shared."""
    policy, reference, weights = models
    tokenizer, mesh = load_tokenizer("byte"), make_mesh({"data": 1}, jax.devices()[:1])

    def generator(model):
        return Generator(model, tokenizer, rows=8, max_length=24, mesh=mesh, prompt_bucket=18)

    players = {
        "reference": (generator(reference), False),
        "mixture": (generator(Mixture(policy, reference, 0.5)), True),
        "teacher": (generator(Mixture(policy, reference, 0.25, arithmetic=True)), True),
    }
    own = generator(policy)
    players["own"] = own, False

    def make(name, rewards=REWARDS, **keywords):
        config = make_config(name, **keywords)
        prompts = Prompts(
            ANSWERS, tokenizer, max_length=24, max_new_tokens=6, answers=config.answers
        )
        opponent, mixed = None, config.reference_share > 0
        against = "reference" if config.taught else config.options.against
        if mixed or against in players:
            engine, mixes = players["teacher" if mixed else against]
            opponent = Opponent(Local(engine), mixes)
        engine, shares = Local(own, weights.policy), (config.own_share, config.taught)
        sampler = PromptSampler(
            *(config.options, engine, rewards, None), *shares, opponent=opponent, mixed=mixed
        )
        maker = RolloutMaker(config, prompts, sampler, pad_id(tokenizer), policy, reference, mesh)
        return Rollouts(maker), prompts

    return make, players, weights


def responses(batch):
    return [batch.tokens[row][batch.loss_mask[row]].tolist() for row in range(len(batch.tokens))]


def test_xpo_learns_the_references_own_samples_behind_the_policys(play):
    make, players, weights = play
    source, prompts = make("xpo", responses_per_prompt=2)
    batch = source.next(lambda: weights)
    assert batch.lengths.shape == (2, 4)
    requests = [
        Request(tuple(prompts[i][1].tolist()), 2, 6, seed=prompts.seed(i, player=1))
        for i in range(2)
    ]
    theirs = Local(players["reference"][0], weights.reference)(requests)
    found = responses(batch)
    for group, several in enumerate(theirs):
        assert found[4 * group + 2 : 4 * group + 4] == [one.tokens.tolist() for one in several]
    assert found[0] != found[2] and 0 <= source.metrics["against/win_rate"] <= 1
    assert source.metrics["reward"] == pytest.approx(batch.scores[:, :2].mean())
    assert source.metrics["against/reward"] == pytest.approx(batch.scores[:, 2:].mean())


def test_nash_md_scores_a_sample_by_its_probability_to_win(play):
    make, _, weights = play
    source, _ = make("nash_md", responses_per_prompt=2)
    batch = source.next(lambda: weights)
    assert batch.lengths.shape == (2, 2)
    sample = source._now.samples[0]
    assert ((batch.scores > 0) & (batch.scores < 1)).all()
    assert sample["reward"] == sample["score"] != batch.scores[0, 0]


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_teachers_own_samples_stand_in_the_place_of_the_datas_answers(play, share):
    make, players, weights = play
    given = {"objective": {"on_policy": share, "seq_kd": True}, "responses_per_prompt": 1}
    source, prompts = make("gkd", WeightedRewards(()), **given)
    found = responses(source.next(lambda: weights))
    own = sampled_positions(range(2), share)
    for i in range(2):
        request = Request(tuple(prompts[i][1].tolist()), 1, 6, seed=prompts.seed(i))
        both = [
            Local(players[name][0], params)([request])[0][0].tokens.tolist()
            for name, params in (("own", weights.policy), ("reference", weights.reference))
        ]
        assert both[0] != both[1] and found[i] == both[i not in own]
    with pytest.raises(ValueError, match="without their answers"):
        prompts.answer(0)


def test_another_player_draws_no_token_that_the_policy_does_not_have(models):  # noqa: F811
    policy, tokenizer = models[0], load_tokenizer("byte")
    wide = build(
        dataclasses.replace(CONFIG, vocab_size=544, vocab_rows=544),
        compute_dtype="float32",
        remat="none",
    )
    config, mesh = make_config("xpo"), make_mesh({"data": 1}, jax.devices()[:1])
    opponent = make_opponent(config, policy, wide, tokenizer, mesh, 24, 18)
    opponent.update(None, jax.jit(wide.init)(jax.random.key(2)))
    [found] = opponent.engine([Request(tuple(b"prompt"), 8, 6)])
    assert max(int(one.tokens.max()) for one in found) < policy.config.vocab_size


@pytest.mark.parametrize("name", ["mixture", "teacher"])
def test_samples_of_a_mixture_are_drawn_from_both_models(play, models, name):  # noqa: F811
    _, players, weights = play
    policy, reference, _ = models
    request = Request(tuple(b"prompt 1"), 2, 6, seed=3)
    [found] = players[name][0]({"first": weights.policy, "second": weights.reference}, [request])
    for one in found:
        ids = jnp.asarray([[*request.prompt, *one.tokens.tolist()]])
        fields = (ids, jnp.ones_like(ids), jnp.arange(ids.shape[1])[None])
        logits = [
            model.unembed(params, model.hidden(params, *fields)[0])
            for model, params in ((policy, weights.policy), (reference, weights.reference))
        ]
        logps = jax.nn.log_softmax(0.5 * logits[0] + 0.5 * logits[1], axis=-1)[0]
        if name == "teacher":
            first, second = (jax.nn.softmax(x, axis=-1) for x in logits)
            logps = jnp.log(0.75 * first + 0.25 * second)[0]
        places = np.arange(len(request.prompt) - 1, ids.shape[1] - 1)
        np.testing.assert_allclose(one.token_logps, logps[places, one.tokens], atol=1e-4)


def test_of_a_teachers_share_the_drawn_probabilities_are_the_mixtures(play):
    """They are those that minillm's ratios are to; held-out prompts are the student's alone."""
    make, players, weights = play
    share = {"teacher_share": 0.25}
    source, prompts = make("minillm", WeightedRewards(()), objective=share, responses_per_prompt=2)
    batch = source.next(lambda: weights)
    requests = [Request(tuple(prompts[i][1].tolist()), 2, 6, seed=prompts.seed(i)) for i in (0, 1)]
    both = {"first": weights.policy, "second": weights.reference}
    drawn = [one for several in players["teacher"][0](both, requests) for one in several]
    assert responses(batch) == [one.tokens.tolist() for one in drawn]
    mask = batch.loss_mask
    for row, one in enumerate(drawn):
        np.testing.assert_array_equal(batch.sampler_token_logps[row][mask[row]], one.drawn_logps)
    gap = batch.old_token_logps[mask] - batch.sampler_token_logps[mask]
    assert batch.sampler_ratio is None and gap.min() < -0.01 and gap.max() < np.log(4 / 3) + 1e-4


def test_a_mixture_of_a_model_with_itself_samples_as_the_model(play, models):  # noqa: F811
    make, _, weights = play
    policy, tokenizer = models[0], load_tokenizer("byte")
    request = Request(tuple(b"prompt 1"), 2, 6, seed=3)
    made = (
        Generator(one, tokenizer, rows=2, max_length=24)
        for one in (policy, Mixture(policy, policy, 0.25))
    )
    [[alone]] = [next(made)(weights.policy, [request])]
    [[mixed]] = [next(made)({"first": weights.policy, "second": weights.policy}, [request])]
    assert [one.tokens.tolist() for one in alone] == [one.tokens.tolist() for one in mixed]


@pytest.mark.parametrize("name", ["dpo", "kto_zero"])
def test_spin_prefers_the_datas_answer_to_the_policys_sample_without_a_reward(play, name):
    make, _, weights = play
    source, prompts = make(
        name, WeightedRewards(()), responses_per_prompt=1, against="data", batch_size=2
    )
    batch = source.next(lambda: weights)
    found = responses(batch)
    for group in range(len(found) // 2):
        answer = prompts.answer(group).tokens.tolist()
        chosen, rejected = found[2 * group : 2 * group + 2]
        if name == "kto_zero":
            chosen, rejected = rejected, chosen
        assert chosen == answer != rejected
    assert batch.weight.all() and "reward" not in source.metrics
    if name == "kto_zero":
        assert batch.label.tolist() == [False, True]


def tiny(name, **keys):
    config = runpy.run_path(str(TINY))["get_config"](name)
    config.rollout.responses_per_prompt = 1
    config.update_from_flattened_dict(keys)
    return configs.read(config)


MIXED = {"objective.teacher_share": 0.2, "rollout.responses_per_prompt": 2}
SPIN = {"rollout.against": "data", "data.train": "builtin:completions:train?size=64"}


def test_rounds_move_the_reference_after_each_rollout():
    rounds = SPIN | {"rollout.prompts": 64, "rollout.epochs": 3}
    config = tiny("dpo", **rounds | {"reference.sync_every_rollouts": 2})
    resolved = setup.resolve_config(config, 1)
    assert resolved.rollouts.steps == 6 and resolved.rollouts.answers
    assert setup.make_step_spec(config, resolved, 30).sync_every_steps == 12


def test_a_rollout_is_held_against_the_reference_that_has_moved():
    frozen = {"base": {"w": 1, "v": 2}}
    moved = loop.weights_of({"params": {"w": 3}, "reference": {"w": 4}}, frozen)
    assert moved == ({"w": 3, "v": 2}, {"w": 4, "v": 2})
    kept = loop.weights_of({"params": {"w": 3}}, frozen)
    assert kept.reference == frozen["base"]
    other = loop.weights_of({"params": {"w": 3}}, frozen | {"reference": {"u": 5}})
    assert other.reference == {"u": 5}


@pytest.mark.parametrize(
    "name, keys, words",
    [
        ("online_dpo", {"rollout.against": "mixture", "rollout.tries": 2}, "tries"),
        ("grpo", {"rollout.mixture": 0.25, "rollout.responses_per_prompt": 2}, "no effect with"),
        ("online_dpo", {"rollout.against": "reference", "rollout.pairing": "random"}, "pairing"),
        ("dpo", {"rollout.against": "reference"}, "compares scores"),
        ("dpo", SPIN | {"rollout.responses_per_prompt": 2}, "set it to 1"),
        ("dpo", SPIN | {"rollout.min_difference": 0.5}, "does not go with"),
        ("kto", SPIN | {"rollout.threshold": "median"}, "does not go with"),
        ("online_sft", {"rollout.against": "data"}, "compares none"),
        ("xpo", {"rollout.against": "mixture"}, "exploration term"),
        ("nash_md", {"rollout.against": "none"}, "meet another player's"),
        ("minillm", MIXED | {"objective.sampler_correction": "token_mask"}, "leave .* at 'auto'"),
        ("minillm", MIXED | {"rollout.rescore": False}, "rescore: .*; set True"),
        ("minillm", MIXED | {"rollout.against": "reference"}, "set 'none'"),
        ("minillm", MIXED | {"objective.advantages": "greedy"}, "the student's own"),
        ("dpo", {"reference.sync_every_rollouts": 1}, "has no rollouts"),
        (
            "online_dpo",
            {"reference.sync_every_rollouts": 1, "reference.sync_every_steps": 1},
            "say two things",
        ),
        (
            "online_dpo",
            {"reference.sync_every_rollouts": 1, "rollout.stop_kl": 0.1, "rollout.epochs": 2},
            "ends rollouts early",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(name, keys, words):
    with pytest.raises(ValueError, match=words):
        setup.resolve_config(tiny(name, **keys), 1)
