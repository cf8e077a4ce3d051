# SPDX-License-Identifier: Apache-2.0
"""Rollouts: batches of the right form, exact on resuming, the same numbers as by hand."""

import dataclasses
import functools
import itertools
import json
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import losses
from align_jax.core.metrics import means
from align_jax.core.options import Config, DataOptions, RolloutOptions, ServerOptions
from align_jax.core.schema import Example, Outputs
from align_jax.data.tokenizer import load_tokenizer, pad_id
from align_jax.inference.engines import Local
from align_jax.inference.generate import Generator, Request
from align_jax.losses import advantages, baselines, targets
from align_jax.losses.logprobs import spread_to_tokens, sum_by_slot
from align_jax.losses.objective import Inputs
from align_jax.models.config import ModelConfig, Rope
from align_jax.models.model import build
from align_jax.online import sampling
from align_jax.online.batches import abstract_batch, rollout_shape, weigh_learned
from align_jax.online.config import make_rollout_config
from align_jax.online.rewards import WeightedRewards
from align_jax.online.rollout import RolloutMaker, Rollouts, Weights
from align_jax.online.sampling import Prompts, PromptSampler
from align_jax.parallel.mesh import make_mesh
from align_jax.runs.source import check_source

CONFIG = ModelConfig(
    family="llama",
    vocab_size=272,
    vocab_rows=272,
    num_layers=1,
    hidden_size=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=32,
    max_positions=64,
    query_scale=0.5,
    windows=(0,),
    layer_ropes=(0,),
    ropes=(Rope(10000.0, 4),),
    init_std=0.3,
)
EXAMPLES = [Example(f"prompt {i}" + "x" * (i % 5), (), source=f"prompts[{i}]") for i in range(6)]


def vowels(prompts, completions, extras):
    return [float(sum(text.count(v) for v in "aeiou") + 0.1 * len(text)) for text in completions]


REWARDS = WeightedRewards((("vowels", 1.0, vowels),))


@pytest.fixture(scope="module")
def models():
    policy = build(CONFIG, compute_dtype="float32", remat="none", heads=("value",), unembed=True)
    reference = build(CONFIG, compute_dtype="float32", remat="none")
    params, other = (
        jax.jit(policy.init)(jax.random.key(0)),
        jax.jit(reference.init)(jax.random.key(1)),
    )
    return policy, reference, Weights(params, other)


HELD_OUT = [Example(f"other {i}", (), source=f"held_out[{i}]") for i in range(3)]


def make_config(
    name,
    *,
    objective=None,
    batch_size=2,
    microbatches=1,
    layout="plain",
    seed=0,
    named=None,
    **rollout,
):
    options = {"responses_per_prompt": 4, "max_new_tokens": 6} | rollout
    config = Config(
        batch_size=batch_size,
        microbatches=microbatches,
        seed=seed,
        data=DataOptions(layout=layout),
        rollout=RolloutOptions(**options),
        rewards=named or {},
    )
    return make_rollout_config(losses.resolve(name, objective or {}), config)


def make(models, name, *, mesh=None, rewards=REWARDS, **keywords):
    tokenizer = load_tokenizer("byte")
    mesh = mesh or make_mesh({"data": 1}, jax.devices()[:1])
    config = make_config(name, **keywords)
    prompts = Prompts(EXAMPLES, tokenizer, max_length=24, max_new_tokens=6, seed=config.seed)
    held_out = Prompts(
        HELD_OUT, tokenizer, max_length=24, max_new_tokens=6, seed=config.seed, shuffle=False
    )
    policy, reference, weights = models
    generator = Generator(policy, tokenizer, rows=8, max_length=24, mesh=mesh, prompt_bucket=18)
    engine, greedy = Local(generator, weights.policy), config.method == "greedy"
    sampler = PromptSampler(config.options, engine, rewards, greedy=greedy)
    pad = pad_id(tokenizer)
    return Rollouts(RolloutMaker(config, prompts, sampler, pad, policy, reference, mesh), held_out)


def equal(a, b):
    flat_a, flat_b = jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b)
    assert [path for path, _ in flat_a] == [path for path, _ in flat_b]
    return all(np.array_equal(x, y) for (_, x), (_, y) in zip(flat_a, flat_b))


@pytest.mark.parametrize("layout", ["plain", "shared_prefix"])
def test_grpo_batch_has_group_advantages_of_its_scores_and_the_policys_own_logps(models, layout):
    source = make(models, "grpo", layout=layout)
    batch = source.next(lambda: models[2])
    assert batch.lengths.shape == (2, 4) and batch.tokens.shape == (
        source.shape.rows,
        source.shape.length,
    )
    scores = batch.scores
    expected = (scores - scores.mean(1, keepdims=True)) / (
        scores.std(1, ddof=1, keepdims=True) + 1e-4
    )
    each = [
        batch.advantages[batch.loss_mask & (batch.slot == s)] for s in range(source.shape.slots)
    ]
    assert (
        batch.advantages[~batch.loss_mask].max() == 0 and sum(map(len, each)) == batch.lengths.sum()
    )
    means = np.asarray(sum_by_slot(jnp.asarray(batch.advantages), batch)) / batch.lengths
    np.testing.assert_allclose(means, expected, rtol=1e-4)
    generated = make(models, "grpo", layout=layout, rescore=False).next(lambda: models[2])
    assert equal(batch._replace(old_token_logps=None), generated._replace(old_token_logps=None))
    np.testing.assert_allclose(batch.old_token_logps, generated.old_token_logps, atol=1e-4)
    assert (batch.old_token_logps[batch.loss_mask] < 0).all()


def test_remax_takes_the_greedy_samples_reward_off(models):
    objective = {"advantages": "greedy", "kl_coef": 0.0}
    source = make(models, "reinforce", objective=objective, responses_per_prompt=2)
    batch = source.next(lambda: models[2])
    most_probable = {"temperature": 0.0, "responses_per_prompt": 1}
    other = make(models, "reinforce", objective={"kl_coef": 0.0}, **most_probable)
    expected = other.next(lambda: models[2]).scores  # [B, 1]
    means = np.asarray(sum_by_slot(jnp.asarray(batch.advantages), batch)) / batch.lengths
    np.testing.assert_allclose(means, batch.scores - expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(source.metrics["objective/greedy_scores"], expected.mean())
    plain = make(models, "reinforce", objective={"kl_coef": 0.0}, responses_per_prompt=2)
    assert np.array_equal(plain.next(lambda: models[2]).tokens, batch.tokens)  # the same samples


def test_gdpo_learns_each_reward_by_itself(models):
    def length(prompts, completions, extras):
        return [float(len(text)) if text.strip() else None for text in completions]

    both = WeightedRewards((("vowels", 1.0, vowels), ("length", 0.2, length)))
    source = make(models, "grpo", rewards=both, objective={"advantages": "decoupled"})
    batch = source.next(lambda: models[2])
    maker = source._maker
    maker.sampler.engine.update(models[2].policy)
    samples = maker.sampler.sample(maker.prompts, range(2), {})[0]
    each = jnp.asarray(np.stack([np.stack([*x.each_reward.values()], -1) for x in samples]))
    expected = baselines.decoupled(each.astype(jnp.float32), (1.0, 0.2), jnp.ones(2))
    means = np.asarray(sum_by_slot(jnp.asarray(batch.advantages), batch)) / batch.lengths
    np.testing.assert_allclose(means, expected, rtol=1e-4, atol=1e-5)


def test_the_optimal_token_baseline_sees_the_distributions_that_were_sampled(models):
    found = {}
    for layout in ("plain", "shared_prefix"):
        objective = {"advantages": "optimal_token"}
        source = make(models, "grpo", objective=objective, layout=layout, temperature=0.7)
        batch = source.next(lambda: models[2])
        found[layout] = batch.advantages[batch.loss_mask], batch.lengths
    np.testing.assert_allclose(found["plain"][0], found["shared_prefix"][0], rtol=1e-3, atol=1e-4)
    assert len(np.unique(found["plain"][0].round(4))) > found["plain"][1].size  # by token


@pytest.mark.parametrize(
    "objective, rollout, words",
    [
        ({"advantages": "pass_at_k", "pass_k": 5}, {}, "pass_k = 5 is more than the 4"),
        ({"advantages": "filtered", "keep_count": 5}, {}, "keep_count = 5 is more than the 4"),
        ({"advantages": "filtered", "keep_hard": 5}, {}, "keep_hard = 5 is more than the 4"),
        ({"advantages": "length_weighted"}, {"responses_per_prompt": 1}, "must be at least 2"),
        ({"advantages": "greedy"}, {"temperature": 0.0}, "temperature = 0"),
        ({"advantages": "decoupled"}, {"overlong_buffer": 2}, "overlong_buffer = 2 shapes the sum"),
        ({"advantages": "decoupled"}, {"score_clip": 0.5}, "score_clip = 0.5 shapes the sum"),
    ],
)
def test_what_the_advantages_would_not_look_at_is_refused(objective, rollout, words):
    with pytest.raises(ValueError, match=words):
        make_config("grpo", objective=objective, **rollout)


def test_a_server_takes_no_devices_of_the_mesh():
    server = ServerOptions("http://localhost:8000", "policy")
    assert make_config("grpo", server=server).options.server.model == "policy"
    with pytest.raises(ValueError, match="rollout.tensor = 2"):
        make_config("grpo", server=server, tensor=2)


def test_rows_that_the_mesh_does_not_divide_are_refused(models):
    with pytest.raises(ValueError, match="1 groups has 4 rows, which do not divide over 8 devices"):
        make(models, "grpo", microbatches=2, mesh=make_mesh({"fsdp": 8}))


def test_layouts_hold_the_same_rollout(models):
    plain, shared = (
        make(models, "grpo", layout=layout).next(lambda: models[2])
        for layout in ("plain", "shared_prefix")
    )
    np.testing.assert_array_equal(plain.lengths, shared.lengths)
    np.testing.assert_array_equal(plain.scores, shared.scores)
    for field in ("tokens", "old_token_logps", "advantages"):
        a, b = getattr(plain, field)[plain.loss_mask], getattr(shared, field)[shared.loss_mask]
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_ppo_batch_has_returns_and_a_kl_in_the_reward(models):
    source = make(
        models,
        "ppo",
        batch_size=4,
        responses_per_prompt=1,
        objective={"whiten_advantages": False, "lam": 1.0, "kl_coef": 0.5},
    )
    batch = source.next(lambda: models[2])
    from align_jax.inference.score import rescore

    reference, _ = rescore(
        models[1], models[2].reference, jax.tree.map(jnp.asarray, batch._replace(mismatched=None))
    )
    kl = np.where(batch.loss_mask, batch.old_token_logps - np.asarray(reference), 0.0).sum(1)
    first = np.argmax(batch.loss_mask, axis=1)
    returns = batch.returns[np.arange(4), first]
    np.testing.assert_allclose(returns, batch.scores[:, 0] - 0.5 * kl, rtol=1e-4)
    np.testing.assert_allclose(
        batch.advantages,
        np.where(batch.loss_mask, batch.returns - batch.old_values, 0.0),
        atol=1e-4,
    )
    np.testing.assert_allclose(source.metrics["objective/kl"], kl.mean(), rtol=1e-4)
    assert source.metrics["reward"] == pytest.approx(batch.scores.mean(), rel=1e-5)


def test_samples_of_a_part_of_the_distribution_are_weighed_by_what_it_kept(models):
    source = make(models, "grpo", top_p=0.5)
    batch = source.next(lambda: models[2])
    whole, _ = targets.make_targets(batch, advantages="group")
    np.testing.assert_array_equal(batch.advantages, whole.advantages)
    kept = batch.sampler_ratio[batch.loss_mask]
    assert (kept >= 0.499).all() and (kept <= 1 + 1e-5).all() and kept.min() < 0.9
    assert (batch.sampler_ratio[~batch.loss_mask] == 0).all()
    mean = source.metrics["sampling/importance_sampling_ratio/mean"]
    assert mean == pytest.approx(kept.mean(), rel=1e-5)
    penalized = make(models, "grpo", repetition_penalty=3.0).next(lambda: models[2])
    assert np.abs(penalized.sampler_ratio[penalized.loss_mask] - 1).max() > 0.05


SERVER = ServerOptions("http://localhost:8000", "policy")
TELLS = dataclasses.replace(SERVER, logprobs="processed")


@pytest.mark.parametrize(
    "objective,rollout,expected",
    [
        ({}, {}, None),
        ({}, {"server": SERVER}, ("sequence_mask", 3.0, None)),
        ({}, {"server": SERVER, "rescore": False}, None),
        ({}, {"server": SERVER, "temperature": 0.0}, None),
        ({}, {"server": TELLS, "temperature": 0.7}, ("sequence_mask", 3.0, None)),
        ({}, {"server": TELLS, "top_p": 0.9}, ("token_truncate", 3.0, None)),
        ({}, {"top_k": 4, "rescore": False}, ("token_truncate", 3.0, None)),
        ({}, {"repetition_penalty": 1.2}, ("token_truncate", 3.0, None)),
        ({"sampler_correction": "none"}, {"server": SERVER, "temperature": 0.7}, None),
        (
            {
                "sampler_correction": "token_mask",
                "sampler_ratio_min": 0.5,
                "sampler_ratio_max": 5.0,
            },
            {},
            ("token_mask", 5, 0.5),
        ),
        ({}, {"server": SERVER, "temperature": 0.7}, "logprobs = 'processed'"),
        ({}, {"server": SERVER, "repetition_penalty": 1.2}, "logprobs = 'processed'"),
        ({"sampler_correction": "token_mask"}, {"rescore": False}, "rescore = False"),
        ({}, {"server": TELLS, "top_p": 0.9, "rescore": False}, "set it to True"),
        ({"sampler_correction": "token_mask"}, {"temperature": 0.0}, "temperature > 0"),
        ({"sampler_ratio_max": 2.0}, {}, "no effect with sampler_correction = 'auto'"),
        (
            {"sampler_correction": "token_mask", "sampler_ratio_min": 3.0},
            {},
            "expected less than sampler_ratio_max = 3",
        ),
        (
            {"sampler_correction": "token_truncate", "sampler_ratio_max": None},
            {},
            "set sampler_ratio_max or sampler_ratio_min",
        ),
    ],
)
def test_the_sampler_is_corrected_for_where_it_is_another_program(objective, rollout, expected):
    for name in ("grpo", "ppo"):
        if isinstance(expected, str):
            with pytest.raises(ValueError, match=expected):
                make_config(name, objective=objective, **rollout)
        else:
            found = make_config(name, objective=objective, **rollout)
            assert found.correction == expected
            names = {"sampler_token_logps", "sampler_ratio"}
            source_has = {
                field
                for field, x in abstract_batch(found, rollout_shape(found, 8))._asdict().items()
                if x is not None
            }
            assert names & source_has == (names if expected else set())
    assert make_config("dpo", server=SERVER, temperature=0.7).correction is None


def test_another_sampler_s_log_probabilities_are_kept_and_its_samples_weighed(models):
    options = dict(objective={"sampler_correction": "sequence_truncate", "sampler_ratio_max": 1.2})
    source = make(models, "rloo", **options)
    engine = source._maker.sampler.engine

    class Other(Local):  # of another opinion of each completion's first token
        def __call__(self, requests, report=None):
            for several in (found := super().__call__(requests, report)):
                for number, one in enumerate(several):
                    one.drawn_logps[0] += 0.1 * (number - 2)
            return found

    sampler = dataclasses.replace(source._maker.sampler, engine=Other(engine._generator))
    source._maker = dataclasses.replace(source._maker, sampler=sampler)
    batch = source.next(lambda: models[2])
    ratio = np.asarray(spread_to_tokens(jnp.asarray(batch.sampler_ratio), batch))[batch.loss_mask]
    allowed = np.exp(-0.1 * (np.arange(4) - 2)).clip(max=1.2)
    np.testing.assert_allclose(sorted(set(ratio.round(3))), sorted(allowed.round(3)), atol=2e-3)
    gap = (batch.old_token_logps - batch.sampler_token_logps)[batch.loss_mask]
    found = {name: x for name, x in source.metrics.items() if name.startswith("sampling/")}
    assert found["sampling/sampling_logp_difference/max"] == pytest.approx(0.2, abs=1e-3)
    mean = found["sampling/sampling_logp_difference/mean"]
    assert mean == pytest.approx(np.abs(gap).mean(), rel=1e-4)
    assert found["sampling/importance_sampling_ratio/max"] == pytest.approx(1.2)
    assert found["sampling/importance_sampling_ratio/min"] == pytest.approx(np.exp(-0.1), rel=1e-3)


def test_behind_a_cut_off_response_stands_the_value_where_it_is_asked_for(models):
    batches = [
        make(
            models,
            "ppo",
            batch_size=4,
            responses_per_prompt=1,
            objective={"whiten_advantages": False, "lam": 1.0, "bootstrap": bootstrap},
        ).next(lambda: models[2])
        for bootstrap in (False, True)
    ]
    plain, more = batches
    from align_jax.inference.score import rescore

    rows = jax.tree.map(jnp.asarray, plain)
    _, values = rescore(models[0], models[2].policy, rows, value_head="value")
    ends = np.take_along_axis(plain.tokens, plain.last_index, axis=1)[:, 0]
    cut_off = ends != load_tokenizer("byte").eos_token_id
    assert cut_off.any()
    expected = np.where(cut_off, np.asarray(values.after)[:, 0], 0.0)[:, None]
    gained = np.where(plain.loss_mask, more.returns - plain.returns, expected)
    np.testing.assert_allclose(gained, np.broadcast_to(expected, gained.shape), atol=1e-5)
    assert more.final_values is None
    with pytest.raises(ValueError, match="keep_unfinished"):
        make_config("ppo", objective={"bootstrap": True}, keep_unfinished=False)


@pytest.mark.parametrize("name", ["rloo", "reinforce"])
def test_cut_off_responses_bear_no_loss_and_count_in_baseline_and_metrics(models, name):
    given = dict(objective={"kl_coef": 0.0}, stop=tuple("aeiouAEIOU0123456789"))
    sources = [make(models, name, keep_unfinished=keep, **given) for keep in (True, False)]
    whole, part = (source.next(lambda: models[2]) for source in sources)
    kept = part.loss_mask
    assert 0 < kept.sum() < whole.loss_mask.sum() and not (kept & ~whole.loss_mask).any()
    np.testing.assert_array_equal(part.scores, whole.scores)
    np.testing.assert_array_equal(part.advantages, np.where(kept, whole.advantages, 0.0))
    for metric, value in sources[0].metrics.items():
        if not metric.startswith("rollout/"):
            assert sources[1].metrics[metric] == pytest.approx(value), metric
    terms, batch = losses.resolve(name, given["objective"]), jax.tree.map(jnp.asarray, part)
    said = Outputs(batch.old_token_logps, sum_by_slot(batch.old_token_logps, batch), batch.lengths)
    found = means(losses.total(terms, Inputs(batch, said)).metrics)
    assert found["reward"] == pytest.approx(whole.scores.mean(), rel=1e-6)
    assert found["reward_std"] == pytest.approx(whole.scores.std(axis=1, ddof=1).mean(), rel=1e-5)
    assert found["frac_reward_zero_std"] == (np.ptp(whole.scores, axis=1) == 0).mean()


def test_there_is_no_preference_for_or_against_what_was_cut_off(models):
    given = dict(keep_unfinished=False, stop=tuple(string.ascii_letters), batch_size=12)
    batch = make(models, "dpo", responses_per_prompt=2, **given).next(lambda: models[2])
    whole, unequal = (batch.lengths > 0).all(axis=1), np.ptp(batch.scores, axis=1) > 0
    np.testing.assert_array_equal(batch.weight, whole & unequal)
    assert 0 < (whole & unequal).sum() < unequal.sum()
    lengths, ones = np.array([[3, 0, 2], [0, 4, 0], [0, 0, 0]]), np.ones(3, np.float32)
    other = batch._replace(lengths=lengths, weight=ones)
    assert weigh_learned(other, "ranked").weight.tolist() == [1, 0, 0]
    assert weigh_learned(other, "rollout").weight.tolist() == [1, 1, 1]  # they have advantages
    one = other._replace(lengths=lengths[:, :1])
    assert weigh_learned(one, "unpaired").weight.tolist() == [1, 0, 0]


def test_xpo_compares_with_nothing_that_was_cut_off():
    # own, own, the reference's, the reference's: of the second pair each, then both were cut off
    mask = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 0], [1, 0, 1, 0]], bool)[..., None]
    rng = np.random.default_rng(0)
    policy, reference = -rng.gamma(2.0, size=(2, 4, 4, 1)).astype(np.float32)
    scores = np.tile(np.float32([1.0, 0.0, 0.0, 1.0]), (4, 1))  # the first own one wins its pair
    xpo = losses.jitted("xpo", beta=0.5, alpha=0.25)
    given = {"reference": reference, "scores": scores, "mask": mask}
    found = xpo(policy, **given)
    ratio, there = (policy - reference)[..., 0], mask[..., 0]
    gaps = np.stack([ratio[:, 0] - ratio[:, 2], ratio[:, 3] - ratio[:, 1]], axis=1)
    whole = there[:, :2] & there[:, 2:]
    pairs = np.where(whole, np.log1p(np.exp(-0.5 * gaps)), 0.0)
    explored = 0.25 * np.where(there[:, 2:], policy[:, 2:, 0], 0.0)
    np.testing.assert_allclose(found.losses, (pairs + explored).mean(axis=1), rtol=1e-6)
    for name, of_pairs in {"margins": 0.5 * gaps, "accuracies": gaps > 0}.items():
        assert float(found.metrics[f"rewards/{name}"]) == pytest.approx(of_pairs[whole].mean())
    slope = jax.grad(lambda x: xpo(x, **given).losses.sum())(jnp.asarray(policy))[..., 0]
    np.testing.assert_array_equal(np.asarray(slope)[:, 1] != 0, whole[:, 1])
    assert slope[1, 3] == 0.125  # its exploration alone: half of α


def test_one_response_has_no_group_to_be_compared_with():
    with pytest.raises(ValueError, match="must be at least 2, got 1"):
        make_config("grpo", responses_per_prompt=1)


def test_text_goes_on_beside_the_rollouts_where_a_run_stood(models, tmp_path):
    rows = make(models, "ppo", responses_per_prompt=1).next(lambda: models[2])

    class Counted:
        def iterator(self, start):
            return (rows._replace(weight=np.float32([n, n])) for n in itertools.count(start))

    def start():
        source = make(models, "ppo", responses_per_prompt=1)
        source._text = Counted()
        return source

    source = start()
    taken = [source.next(lambda: models[2]) for _ in range(3)]
    assert [batch.text.weight[0] for batch in taken] == [0, 1, 2]
    saved = json.loads(json.dumps(source.save(tmp_path, 3)))
    again = start()
    again.restore(tmp_path, saved)
    assert again.next(lambda: models[2]).text.weight[0] == 3


def test_scores_are_normalized_by_the_moments_of_all_processes(monkeypatch):
    mine, other = np.float32([[1.0, 2.0]]), np.float32([3.0, 10.0])
    options = RolloutOptions(normalize_scores=True)
    monkeypatch.setattr(sampling, "gather", lambda x: np.concatenate([x, other]))
    shaped, moments = sampling.shape_scores(mine, [], options, advantages.FIRST_MOMENTS)
    everyone = np.append(mine[0], other)
    expected = (mine - everyone.mean()) / everyone.std()
    np.testing.assert_allclose(shaped, expected, rtol=1e-5)
    assert moments["count"] == 4 and moments["mean"] == pytest.approx(everyone.mean())


def test_epochs_hand_out_the_same_rollout_in_other_slices_then_a_new_one(models):
    source = make(
        models,
        "ppo",
        responses_per_prompt=1,
        objective={"epochs": 2, "minibatches": 2, "kl_coef": 0.0},
    )
    calls = []
    batches = [source.next(lambda: calls.append(1) or models[2]) for _ in range(5)]
    assert len(calls) == 2
    names = [sorted(map(bytes, b.tokens)) for b in batches]
    assert sorted(names[0] + names[1]) == sorted(names[2] + names[3])
    assert not set(names[4]) & set(names[0] + names[1])
    assert batches[0].tokens.shape[0] == 2 and source.steps_per_epoch == 6


def test_online_dpo_pairs_are_best_and_worst_and_kto_has_labels_and_mismatched_rows(models):
    batch = make(models, "dpo").next(lambda: models[2])
    assert (
        batch.lengths.shape == (2, 2) and batch.advantages is None and batch.old_token_logps is None
    )
    assert (batch.scores[:, 0] > batch.scores[:, 1]).all() and (batch.weight == 1).all()
    source = make(models, "kto", batch_size=8)
    batch = source.next(lambda: models[2])
    np.testing.assert_array_equal(batch.label, batch.scores[:, 0] >= batch.scores.mean())
    assert batch.mismatched.tokens.shape == batch.tokens.shape and not np.array_equal(
        batch.mismatched.tokens, batch.tokens
    )


def test_resuming_in_mid_rollout_is_exact(models, tmp_path):
    options = dict(
        responses_per_prompt=1,
        objective={"epochs": 2, "minibatches": 2, "kl_target": 3.0},
        seed=3,
        normalize_scores=True,
    )
    source, weights = make(models, "ppo", **options), lambda: models[2]
    through = [source.next(weights) for _ in range(10)]
    again = make(models, "ppo", **options)
    for step in range(6):
        assert equal(again.next(weights), through[step])
    state = json.loads(json.dumps(again.save(tmp_path, 6)))
    resumed = make(models, "ppo", **options)
    resumed.restore(tmp_path, state)
    assert state["file"]
    logged = []
    for one in (again, resumed):
        assert equal(one.next(weights), through[6])
        one.log_samples(tmp_path / "logged", 7)  # of a rollout from before the stop
        one.close()
        logged.append((tmp_path / "logged/samples.jsonl").read_text())
    assert logged[0] == logged[1] != ""
    for step in range(7, 10):
        assert equal(resumed.next(weights), through[step])
    whole = resumed.save(tmp_path, 10)
    assert not whole["file"] or (tmp_path / f"{whole['file']}-0.npz").exists()
    assert source.metrics.keys() == resumed.metrics.keys()


def test_a_lost_or_damaged_rollout_is_told_and_stray_files_harm_nothing(models, tmp_path):
    source = make(models, "ppo", objective={"minibatches": 2}, responses_per_prompt=1)
    source.next(lambda: models[2])
    (tmp_path / "rollouts").mkdir()
    for stray in (".DS_Store", "notes.txt", "old-0.npz"):
        (tmp_path / "rollouts" / stray).write_text("mine")
    state = source.save(tmp_path, 1)
    check = functools.partial(check_source, source, str(tmp_path))
    assert check({"source": state}) == "" == check({})
    source.save(tmp_path, 2, kept=[1])
    names = {path.name for path in (tmp_path / "rollouts").iterdir()}
    assert names == {".DS_Store", "notes.txt", "old-0.npz", "1-0.npz", "2-0.npz"}
    file = tmp_path / "rollouts/1-0.npz"
    for damage in (lambda: file.write_bytes(file.read_bytes()[:100]), file.unlink):
        damage()
        assert "rollouts/1-0.npz" in check({"source": state})


def test_a_batch_names_the_examples_that_it_is_of_where_some_were_dropped():
    tokenizer = load_tokenizer("byte")
    examples = [*EXAMPLES, Example("much too long " * 9, (), source="long"), *HELD_OUT]
    prompts = Prompts(
        examples, tokenizer, max_length=24, max_new_tokens=6, truncation="drop", seed=1
    )
    assert len(prompts) == len(examples) - 1 and prompts.report["dropped prompts"] == 1
    for position in range(2 * len(prompts)):
        example, tokens = prompts[position]
        assert examples[prompts.index(position)] is example
        assert tokenizer.decode(tokens).endswith(example.prompt)


def test_adaptive_coefficient_moves_towards_its_target(models):
    source = make(models, "rloo", objective={"kl_target": 1e-3, "kl_horizon": 40.0})
    coefficients = []
    for _ in range(3):
        source.next(lambda: models[2])
        coefficients.append(source.metrics["objective/kl_coef"])
    assert (
        coefficients[0] == pytest.approx(0.05)
        and coefficients[0] < coefficients[1] < coefficients[2]
    )


def test_dynamic_sampling_keeps_groups_with_unequal_scores(models):
    flat = WeightedRewards(
        (("parity", 1.0, lambda p, c, e: [float(len(text.encode()) % 2) for text in c]),)
    )
    source = make(models, "grpo", responses_per_prompt=2, tries=8, seed=1, rewards=flat)
    batch = source.next(lambda: models[2])
    assert (batch.scores[:, 0] != batch.scores[:, 1]).all() and source.metrics["rollout/tries"] > 1
    assert source.save("/nonexistent", 1)["position"] == 2 * source.metrics["rollout/tries"]


def test_overlapped_rollouts_are_those_of_the_weights_before(models):
    fresh = Weights(jax.jit(models[0].init)(jax.random.key(5)), models[2].reference)
    plain = make(models, "grpo")
    first, second = plain.next(lambda: models[2]), plain.next(lambda: models[2])
    ahead = make(models, "grpo", overlap=True)
    assert equal(ahead.next(lambda: models[2]), first)
    assert equal(ahead.next(lambda: fresh), second)  # made with the first weights
    assert not equal(ahead.next(lambda: fresh), plain.next(lambda: models[2]))


@pytest.mark.parametrize("overlap", [False, True])
def test_evaluation_samples_the_held_out_prompts_and_leaves_the_rollouts_as_they_were(
    models, overlap
):
    seen = []

    def watched(prompts, completions, extras):
        seen.append(prompts)
        return vowels(prompts, completions, extras)

    undisturbed = make(models, "grpo", overlap=overlap)
    rewards = WeightedRewards((("vowels", 1.0, watched),))
    source = make(models, "grpo", overlap=overlap, rewards=rewards)
    before, _ = source.evaluate(models[2])
    assert sorted(set(seen[0])) == [example.prompt for example in HELD_OUT] and len(seen[0]) == 12
    request = [
        Request(tuple(source._held_out[i][1].tolist()), 4, 6, seed=source._held_out.seed(i))
        for i in range(3)
    ]
    engine = source._maker.sampler.engine
    engine.update(models[2].policy)  # let go of after each use
    texts = [one.text for several in engine(request) for one in several]
    assert before["reward"] == pytest.approx(np.mean(vowels(None, texts, None)), rel=1e-6)
    two = make(models, "grpo", eval_responses_per_prompt=2).evaluate(models[2])[0]
    first = [text for i, text in enumerate(texts) if i % 4 < 2]  # a sample's draw is its own
    assert two["reward"] == pytest.approx(np.mean(vowels(None, first, None)), rel=1e-6)
    for _ in range(3):
        assert equal(undisturbed.next(lambda: models[2]), source.next(lambda: models[2]))
        assert source.evaluate(models[2])[0] == before


def test_divergence_ends_a_rollout_early(models):
    options = dict(responses_per_prompt=1, objective={"epochs": 4, "kl_coef": 0.0}, batch_size=4)
    fresh = Weights(jax.jit(models[0].init)(jax.random.key(5)), None)
    source = make(models, "ppo", stop_kl=1e-3, **options)
    first = source.next(lambda: models[2])
    assert sorted(map(bytes, source.next(lambda: models[2]).tokens)) == sorted(
        map(bytes, first.tokens)
    )
    assert sorted(map(bytes, source.next(lambda: fresh).tokens)) != sorted(map(bytes, first.tokens))


def test_over_a_mesh_the_rollout_is_the_same(models):
    alone = make(models, "grpo", batch_size=4, responses_per_prompt=2).next(lambda: models[2])
    mesh = make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4])
    batch = make(models, "grpo", batch_size=4, responses_per_prompt=2, mesh=mesh).next(
        lambda: models[2]
    )
    np.testing.assert_array_equal(alone.tokens, batch.tokens)
    np.testing.assert_allclose(alone.advantages, batch.advantages, atol=1e-4)
    np.testing.assert_allclose(alone.old_token_logps, batch.old_token_logps, atol=1e-4)


def test_samples_are_logged_for_people(models, tmp_path):
    source = make(models, "grpo")
    source.next(lambda: models[2])
    source.log_samples(tmp_path, 1)
    source.log_samples(tmp_path, 2)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 16 and lines[0]["step"] == 1 and lines[-1]["step"] == 2
    assert set(lines[0]) == {
        "step",
        "prompt",
        "output",
        "reward",
        "score",
        "rewards",
        "tokens",
        "finish",
    }


@pytest.mark.parametrize(
    "name,keywords,message",
    [
        (
            "grpo",
            {"threshold": "prompt"},
            "rollout.threshold = 'prompt' is of objectives on unpaired",
        ),
        ("kto", {"pairing": "random", "batch_size": 4}, "rollout.pairing = .* on pairs"),
        ("ppo", {"epochs": 2}, "rollout.epochs = 2.*config.objective.epochs"),
        ("rloo", {"missing_eos_penalty": 1.0}, "config.objective.missing_eos_penalty"),
        ("dpo", {"pairing": "bets"}, "'bets'"),
        ("grpo", {"prompts": 3}, "3 groups"),
        ("kto", {"batch_size": 6}, "multiple of"),
        ("grpo", {"layout": "packed"}, "packed"),
    ],
)
def test_mistakes_are_named(models, name, keywords, message):
    with pytest.raises(ValueError, match=message):
        make(models, name, **keywords)


def test_passes_are_the_objective_s_or_else_the_rollout_s():
    assert make_config("ppo").options.epochs == 4
    assert make_config("dpo", epochs=2, missing_eos_penalty=1.0).steps == 2
    assert make_config("dpo").options.epochs == 1


def test_generation_speed_and_share_are_measured(models):
    source = make(models, "grpo")
    source.next(lambda: models[2])
    first = dict(source.metrics)
    tokens = first["rollout/tokens_per_second"] * first["rollout/generation_seconds"]
    # 2 prompts, 4 samples of each
    assert tokens == pytest.approx(8 * first["completions/mean_length"])
    assert first["rollout/generation_seconds"] < first["rollout/seconds"] and np.isnan(
        first["rollout/share"]
    )
    source.next(lambda: models[2])
    assert 0 < source.metrics["rollout/share"] < 1
