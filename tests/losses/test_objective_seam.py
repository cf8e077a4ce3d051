# SPDX-License-Identifier: Apache-2.0
"""Names, options and sums of objectives; and mistakes other frameworks make in silence, each
refused or absent here."""

import json
import pydoc

import jax
import jax.numpy as jnp
import loss_cases as cases
import numpy as np
import pytest

from align_jax import losses, objectives
from align_jax.core import metrics
from align_jax.core.metrics import divide
from align_jax.losses import Inputs, kto, pairs
from align_jax.losses.options import declared


def test_a_sum_of_objectives_is_the_weighted_sum():
    problem = cases.make_problem("dpo")
    whole = cases.total(losses.resolve("dpo+bco_pair+sft", {"beta": 0.3}, (0.8, 0.2, 1.0)), problem)
    parts = [
        cases.total(losses.resolve(name, {"beta": 0.3} if name != "sft" else {}), problem)
        for name in ("dpo", "bco_pair", "sft")
    ]
    np.testing.assert_allclose(whole, 0.8 * parts[0] + 0.2 * parts[1] + parts[2], rtol=1e-6)


def test_an_option_that_adds_a_term_equals_naming_it():
    assert [term.name for term in losses.resolve("dpo", {"sft_coef": 0.5})] == ["dpo", "sft"]
    problem = cases.make_problem("dpo")
    np.testing.assert_allclose(
        cases.total(losses.resolve("dpo", {"sft_coef": 0.5}), problem),
        cases.total(losses.resolve("dpo+sft", {}, (1.0, 0.5)), problem),
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("dp0", {}, "did you mean 'dpo'"),
        ("dpo+ktoo", {}, "did you mean 'kto'"),
        ("dpo", {"betta": 1.0}, "'beta'"),
        ("hinge", {"label_smoothing": 0.1}, "no option 'label_smoothing'"),  # TRL ignores it
        ("nca_pair", {"f_divergence": "js"}, "no option"),
        ("simpo", {"reference_free": True}, "no option"),
        ("aot", {"wpo": True}, "no option"),
    ],
)
def test_unknown_names_and_options_are_errors(name, options, words):
    with pytest.raises(ValueError, match=words):
        losses.resolve(name, options)


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("dpo", {"f_divergence": "jsd"}, "f_divergence"),
        ("dpo", {"label_smoothing": 0.5}, "label_smoothing"),
        ("exo_pair", {"label_smoothing": 0.0}, "label_smoothing"),
        ("ipo", {"lengths": "max"}, "lengths"),
        ("sft", {"per": "word"}, "per"),
        ("kto", {"kl_scope": "device"}, "kl_scope"),
        ("cpo", {"form": "exp"}, "form"),
        ("cpo", {"form": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
        ("discopop", {"tau": 0.0}, "tau"),
        ("reward_ranked", {"form": "all"}, "form"),
        ("grpo", {"loss_type": "gpro"}, "loss_type"),
        ("grpo", {"loss_type": "luspo"}, "set importance = 'sequence'"),
        ("ppo_offline", {"clip_form": "both"}, "clip_form"),
        ("ppo_offline", {"kl_sign": 0}, "kl_sign"),
        ("ppo_offline", {"clip_form": "reciprocal", "clip": 1.5}, "clip = 1.5: expected below 1"),
        ("ppo_offline", {"critic_target": "td"}, "critic_target"),
    ],
)
def test_values_out_of_range_are_errors(name, options, words):
    with pytest.raises(ValueError, match=words):
        cases.total(losses.resolve(name, options), cases.make_problem(name))


@pytest.mark.parametrize("name", losses.OBJECTIVES)
def test_every_option_says_its_meaning_to_help_and_accepts_its_default(name):
    row = losses.OBJECTIVES[name]
    assert row.declared.keys() <= losses.describe_options(name).keys()
    for option, known in row.declared.items():
        assert known.meaning and known.kinds and known.accepts(known.default), option
    shown = pydoc.render_doc(row.loss, renderer=pydoc.plaintext)
    for option in declared(row.loss).values():
        assert option.meaning.replace("'", "") in shown.replace("'", "").replace("\\", "")


@pytest.mark.parametrize(
    "name, options, expected",
    [
        ("dpo", {"beta": 0}, "beta = 0: expected a number above 0"),
        ("dpo", {"label_smoothing": 0.5}, r"expected a number in \[0, 0.5\)"),
        ("dpo", {"wpo": 2}, "wpo = 2: expected True or False"),
        ("grpo", {"max_length": 1.5}, "max_length = 1.5: expected an integer at least 1 or None"),
        ("grpo", {"epochs": 0}, "epochs = 0: expected an integer at least 1"),
        ("kto", {"kl_scope": "device"}, "expected one of 'global', 'microbatch'"),
        ("dpo", {"sft_coef": "1"}, "sft_coef = '1': expected a number"),
        ("grpo", {"entropy_step": 0}, r"entropy_step = 0: expected a number in \(0, 1\]"),
        ("dpo", {"f_divergence": np.zeros(2)}, "f_divergence = array.*: expected one of"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_range(name, options, expected):
    with pytest.raises(ValueError, match=f"objective '{name}': .*{expected}"):
        losses.resolve(name, options)


def test_sums_over_different_kinds_of_data_are_errors():
    with pytest.raises(ValueError, match="mixes kinds of data"):
        losses.resolve("dpo+kto")
    for name, words in (
        ("reward_regression+sft", "'sft' would learn every answer, whatever its score"),
        ("sft+reward_process", "'sft' would learn every step, right or wrong"),
        ("gkd+grpo", "'gkd' would learn the policy's own samples"),
        ("ppo+grpo", "one rollout made in two ways: advantages = 'gae' and 'group'"),
        ("grpo+nash_md", "'grpo' and 'nash_md' want one rollout made in two ways"),
        ("xpo+nash_md", "rollout.against = 'reference' and 'mixture'"),
    ):
        with pytest.raises(ValueError, match=f"objective '.*': .*{words}"):
            losses.resolve(name)
    assert len(losses.resolve("grpo+gspo+entropy")) == 3
    with pytest.raises(ValueError, match="expected 2 weights"):
        losses.resolve("dpo+sft", {}, (1.0,))
    with pytest.raises(ValueError, match="humanline"):
        losses.resolve("dpo", {"humanline": True, "reference_free": True})
    with pytest.raises(ValueError, match="log_eps_p"):
        losses.resolve("dpo", {"humanline": True, "log_eps_p": 1.0})


@pytest.mark.parametrize(
    "name, options",
    [
        ("dpo", {"f_alpha": 0.3}),
        ("dpo", {"log_eps_p": -0.5}),
        ("dpo", {"per": "sequence"}),
        ("cpo", {"alpha": 0.0, "dft": True}),
        ("tdpo", {"alpha": 0.0, "stop_gradient_chosen": False}),
        ("beta_dpo", {"alpha": 0.0, "momentum": 0.5}),
        ("ppo_offline", {"kl_coef": 0.0, "kl_sign": -1}),
        ("ppo_offline", {"critic_coef": 0.0, "critic_target": "gae"}),
        ("ppo", {"kl_coef": 0.0, "kl_target": 6.0}),
        ("ppo", {"kl_horizon": 100.0}),
        ("ppo", {"kl_coef": 0.0, "kl_estimator": "k3"}),
        ("ppo", {"vf_coef": 0.0, "value_clip": 0.5}),
        ("ppo", {"advantages": "batch", "lam": 0.5}),
        ("rloo", {"kl_coef": 0.0, "kl_target": 6.0}),
        ("reinforce_pp", {"advantages": "batch", "gamma": 0.5}),
        ("grpo", {"max_length": 9}),
        ("grpo", {"advantages": "batch", "scale": "none"}),
        ("ppo", {"advantages": "global", "whiten_advantages": False}),
        ("rloo", {"advantages": "group_global", "whiten_advantages": True}),
    ],
)
def test_an_option_without_effect_is_an_error_that_names_what_it_needs(name, options):
    changed = list(options)[-1]
    with pytest.raises(ValueError, match=f"{changed} = .* has no effect"):
        losses.resolve(name, options)


def test_advantages_that_an_objective_cannot_have_are_errors():
    for name in ("grpo", "rloo", "reinforce", "reinforce_pp"):
        with pytest.raises(ValueError, match="advantages = 'gae'"):  # no values
            losses.resolve(name, {"advantages": "gae"})
    with pytest.raises(ValueError, match="set kl_coef = 0"):
        losses.resolve("rloo", {"advantages": "group"})


def test_dr_grpo_divides_by_no_deviation_and_by_the_longest_completion_there_may_be():
    assert losses.resolve("grpo")[0].rollout["scale"] == "group"
    assert losses.resolve("gspo")[0].rollout["scale"] == "group"
    assert losses.resolve("grpo", {"loss_type": "dr_grpo"})[0].rollout["scale"] == "none"
    kept = {"loss_type": "dr_grpo", "scale": "batch"}
    assert losses.resolve("grpo", kept)[0].rollout["scale"] == "batch"
    problem = cases.make_problem("grpo")  # rows of 7 tokens, of which all may bear loss
    found, expected = (
        cases.total(losses.resolve("grpo", {"loss_type": "dr_grpo"} | more), problem)
        for more in ({}, {"max_length": 7})
    )
    assert found == expected


def test_sft_beside_unpaired_feedback_imitates_what_was_desirable():
    problem = cases.make_problem("kto", label=np.array([True, False, True, False]))
    terms = losses.resolve("kto+sft")
    _, grads = cases.value_and_grad(terms[1:], problem)
    moved = np.asarray(cases.sum_by_slot(grads["token_logps"], problem.batch))[:, 0] != 0
    assert moved.tolist() == [True, False, True, False]
    assert losses.weights(terms, problem.batch)[1].tolist()[1::2] == [0.0, 0.0]
    for name in ("grpo+sft", "ppo+sft"):
        with pytest.raises(ValueError, match="use ptx_coef"):
            losses.resolve(name)


@pytest.mark.parametrize("form", ["plackett_luce", "pairs", "best_of"])
def test_equal_scores_are_no_preference(form):
    problem = cases.make_problem("reward_ranked", groups=1, lengths=3)
    tied = problem._replace(
        batch=problem.batch._replace(scores=jnp.asarray([[2.0, 2.0, 1.0, 1.0]]))
    )
    terms = losses.resolve("reward_ranked", {"form": form})
    value, grads = cases.value_and_grad(terms, tied)
    swapped = tied.policy._replace(scores=tied.policy.scores[:, np.array([1, 0, 3, 2])])
    again, others = cases.value_and_grad(terms, tied._replace(policy=swapped))
    np.testing.assert_allclose(value, again, rtol=1e-6)
    order = np.array([1, 0, 3, 2])
    np.testing.assert_allclose(grads["scores"][:, order], others["scores"], rtol=1e-5, atol=1e-7)
    equal = problem._replace(batch=problem.batch._replace(scores=jnp.ones((1, 4))))
    nothing, grads = cases.value_and_grad(terms, equal)
    assert nothing == 0 and not grads["scores"].any()


@pytest.mark.parametrize(
    "options", [{}, {"form": "sum"}, {"form": "hinge", "beta": 0.01}, {"form": "ipo", "beta": 0.1}]
)
def test_tpo_learns_the_gold_response_alone_where_the_other_two_are_equal(options):
    """The same where the others bear no loss, wherever they stand."""
    problem = cases.make_problem("tpo", groups=4, lengths=3)
    scores = jnp.float32([[4, 3, 2, 1], [4, 2, 2, 2], [4, 3, 2, 1], [4, 3, 2, 1]])
    there = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]])
    grads, metrics = ranked_grads(losses.resolve("tpo", options), problem, scores, there)
    signs = [[-1, -1, 0, 1], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(np.sign(grads), signs)
    assert metrics["rewards/accuracies"][1] == 1  # where there is something to be right about


def test_adpo_shares_its_target_among_the_best():
    problem = cases.make_problem("adpo", groups=4, lengths=3, spread=0.05)
    scores = jnp.float32([[4, 3, 2, 1], [4, 4, 2, 2], [4, 3, 2, 1], [0, 0, 0, 0]])
    there = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 0, 1], [1, 1, 1, 1]])
    problem = problem._replace(reference=problem.policy)
    grads, metrics = ranked_grads(losses.resolve("adpo"), problem, scores, there)
    expected = [[-3, 1, 1, 1], [-1, -1, 1, 1], [0, -2, 0, 2], [0, 0, 0, 0]]
    np.testing.assert_allclose(grads / 0.1 * 4 * 4, expected, atol=1e-5)
    assert metrics["rewards/margins"][1] == 3


def ranked_grads(terms, problem, scores, there):
    """Return the gradient of each response's first token, and the metrics, where responses that
    are not there bear no loss."""
    keep = np.repeat(there.reshape(-1, 1) > 0, problem.batch.tokens.shape[1], axis=1)
    batch = problem.batch._replace(
        scores=scores,
        loss_mask=problem.batch.loss_mask & keep,
        lengths=problem.batch.lengths * there.astype(np.int32),
    )
    said = (cases.make_outputs(batch, x.token_logps) for x in problem[1:3])
    problem = problem._replace(batch=batch, policy=next(said), reference=next(said))
    grads = cases.value_and_grad(terms, problem)[1]["token_logps"]
    return np.asarray(grads).sum(axis=1).reshape(there.shape) / 3, cases.whole(
        terms, problem
    ).metrics


def test_the_lowest_and_the_highest_reward_are_those_of_all_batches():
    problem = cases.make_problem("reward")
    terms, sums = losses.resolve("reward"), None
    whole = metrics.means(cases.whole(terms, problem).metrics)
    batches, policies = (cases.split(x, 4) for x in (problem.batch, problem.policy))
    for batch, policy in zip(batches, policies):
        sums = metrics.add_sums(sums, cases.whole(terms, Inputs(batch, policy)).metrics)
    scores = np.asarray(problem.policy.scores)
    assert metrics.means(sums) == pytest.approx(whole)
    assert whole["min_reward"] == pytest.approx(scores.min())
    assert whole["max_reward"] == pytest.approx(scores.max())
    assert whole["mean_reward"] == pytest.approx(scores.mean())


def test_a_reference_is_asked_for_only_where_it_is_used():
    def wants(name, **options):
        return [term.reference for term in losses.resolve(name, options)]

    assert (
        wants("dpo") == [True]
        and wants("dpo", reference_free=True) == [False]
        and wants("simpo") == [False]
    )
    assert (
        wants("grpo") == [False]
        and wants("grpo", beta=0.1) == [True]
        and wants("grpo", humanline=True) == [True]
    )
    problem = cases.make_problem("dpo")._replace(reference=None)
    with pytest.raises(ValueError, match="needs the reference"):
        losses.total(losses.resolve("dpo"), problem)


def test_statistics_that_nobody_computed_are_errors():
    for name in ("kto", "bco", "aot", "aot_unpaired", "beta_dpo", "ppo_offline"):
        with pytest.raises(ValueError, match="needs stats"):
            losses.total(losses.resolve(name), cases.make_problem(name))
    problem = cases.make_problem("kto")._replace(mismatched=None)
    with pytest.raises(ValueError, match="mismatched"):
        losses.batch_statistics(losses.resolve("kto"), problem)


def test_needs_follow_the_options():
    assert losses.resolve("dpo")[0].needs == () and losses.resolve("dpo", {"wpo": True})[
        0
    ].needs == ("log_sum_sq",)
    assert losses.resolve("tdpo")[0].needs == ("kl",)
    assert [term.needs for term in losses.resolve("grpo", {"entropy_coef": 0.1})] == [
        (),
        ("entropy",),
    ]


def test_humanline_has_no_gradient_outside_its_range():
    problem = cases.make_problem("dpo", spread=2.0)
    ratio = problem.policy.token_logps - problem.reference.token_logps
    _, grads = cases.value_and_grad(losses.resolve("dpo", {"humanline": True}), problem)
    outside = (ratio < -1.0) | (ratio > 1.5)
    assert outside.any() and not grads["token_logps"][outside].any()
    assert grads["token_logps"][~outside & problem.batch.loss_mask].all()


def test_humanline_clamps_the_mismatched_pairs_that_z0_comes_from_too():
    problem = cases.make_problem("kto")  # log-ratios of 0.3 nats a token in the mismatched pairs
    terms = losses.resolve("kto", {"humanline": True, "log_eps_r": 0.1})
    found, _weights = losses.batch_statistics(terms, problem)["0"]
    lengths = np.asarray(problem.batch.mismatched.lengths)[:, 0]
    np.testing.assert_allclose(found["x"], 0.1 * lengths, rtol=1e-5)


def test_ld_alpha_in_a_packed_row_equals_the_plain_layout():
    plain = cases.make_problem("dpo")
    rows, length = plain.batch.tokens.shape

    def join(x):
        return x.reshape(rows // 2, 2 * length)  # chosen and rejected in one row

    slot = jnp.broadcast_to(
        jnp.repeat(jnp.arange(2, dtype=jnp.int32), length)[None], (rows // 2, 2 * length)
    )
    batch = plain.batch._replace(
        tokens=join(plain.batch.tokens), loss_mask=join(plain.batch.loss_mask), slot=slot
    )
    for alpha in (0.0, 0.3, 1.0):
        a = pairs.shared_length_logps(plain.policy.token_logps, plain.batch, alpha)
        b = pairs.shared_length_logps(join(plain.policy.token_logps), batch, alpha)
        np.testing.assert_allclose(a, b, rtol=1e-5)
    np.testing.assert_allclose(a, plain.policy.logps, rtol=1e-5)


# ----------------------------------------------------------- seen wrong elsewhere (HALOs, TRL, ...)


def test_ipo_at_policy_equal_to_reference_is_finite():
    """HALOs counts tokens as "log-ratio is not zero": 0 / 0 at the first step."""
    problem = cases.make_problem("ipo")
    problem = problem._replace(policy=problem.reference)
    value, grads = cases.value_and_grad(losses.resolve("ipo"), problem)
    np.testing.assert_allclose(value, 25.0)
    assert np.isfinite(grads["token_logps"]).all() and grads["token_logps"].any()


def test_tokens_of_probability_one_count_as_tokens():
    """HALOs takes a log-probability of exactly 0 for padding."""
    found = losses.jitted("sft")([[-2.0, 0.0, 0.0, 0.0]])
    assert float(found.loss) == 0.5
    found = losses.jitted("simpo", beta=1.0, gamma_beta_ratio=0.0)(
        policy=[[[-2.0, 0.0], [-2.0, -2.0]]]
    )
    np.testing.assert_allclose(found.losses, [np.log1p(np.exp(-1.0))], rtol=1e-6)


def test_slic_takes_sequences_of_different_lengths():
    """HALOs adds a [B, T] to a [B] and crashes."""
    problem = cases.make_problem("slic")
    assert cases.whole(losses.resolve("slic"), problem).losses.shape == (1, 4)


@pytest.mark.parametrize("label", [True, False])
def test_kto_on_one_class_is_finite_and_reports_no_reward_of_the_other(label):
    problem = cases.make_problem("kto", label=label)
    found = cases.whole(losses.resolve("kto"), problem)
    assert np.isfinite(found.loss)
    absent = "rewards/rejected" if label else "rewards/chosen"
    assert float(found.metrics[absent][1]) == 0.0
    assert np.isnan(divide(found.metrics)[absent])
    assert all(np.isfinite(x) for x in divide(found.metrics, empty=0.0).values())


def test_kl_scope_decides_whether_z0_is_the_global_batchs():
    problem = cases.make_problem("kto", groups=4)
    whole, pieces = (
        losses.resolve("kto", {"kl_scope": scope}) for scope in ("global", "microbatch")
    )
    alone = cases.total(whole, problem)
    np.testing.assert_allclose(cases.in_microbatches(whole, problem, 4), alone, rtol=1e-5)
    assert abs(cases.in_microbatches(pieces, problem, 4) - alone) > 1e-4


def test_z0_is_clamped_after_the_mean():
    for weight, z0 in (([1.0, 1.0], 0.0), ([0.0, 1.0], 1.0)):
        found = {"x": jnp.asarray([[-3.0, 1.0]]), "weight": jnp.asarray([weight])}
        stats, _ = kto.Kto().reduce_statistics(found, jnp.ones((1, 2)), {})
        assert stats.tolist() == [z0]


def test_no_gradient_flows_through_z0():
    problem = cases.make_problem("kto")

    def f(shift):
        other = problem.mismatched[0]
        other = other._replace(logps=other.logps + shift)
        return cases.total(
            losses.resolve("kto"), problem._replace(mismatched=(other, problem.mismatched[1]))
        )

    assert jax.grad(f)(0.0) == 0.0 and f(1.0) != f(0.0)


def test_wpo_goes_with_hinge():
    """TRL multiplies a leaf of relu in place and crashes."""
    _, grads = cases.value_and_grad(
        losses.resolve("hinge", {"wpo": True}), cases.make_problem("hinge")
    )
    assert np.isfinite(grads["token_logps"]).all()


def test_imbalance_is_said():
    assert kto.balance_warning(100, 90) is None
    assert "desirable_weight to between 3 and 4" in kto.balance_warning(100, 300)
    assert "all feedback is desirable" in kto.balance_warning(5, 0)


# --------------------------------------------------------------------------- notebooks, the program


def test_jitted_takes_chosen_and_rejected_or_both_stacked():
    rng = np.random.default_rng(0)
    policy, reference = rng.normal(size=(2, 3, 2)).astype(np.float32)
    run = losses.jitted("dpo", beta=0.2)
    apart = run(policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1])
    together = run(policy=policy, reference=reference)
    np.testing.assert_array_equal(apart.losses, together.losses)
    np.testing.assert_allclose(apart.rewards, 0.2 * (policy - reference), rtol=1e-6)
    found, rewards = losses.dpo_from_indices(
        jnp.asarray(policy.reshape(-1)),
        jnp.asarray(reference.reshape(-1)),
        jnp.array([0, 2, 4]),
        jnp.array([1, 3, 5]),
        beta=0.2,
    )
    np.testing.assert_allclose(found, apart.losses, rtol=1e-6)
    np.testing.assert_allclose(rewards.reshape(3, 2), apart.rewards, rtol=1e-6)


def test_jitted_names_its_mistakes():
    run = losses.jitted("dpo")
    with pytest.raises(TypeError, match="unknown array"):
        run(policy=[[0.0, 0.0]], label=[True], mismatched_policy=[0.0])
    with pytest.raises(ValueError, match="both chosen and rejected"):
        run(policy_chosen=[0.0])
    with pytest.raises(ValueError, match="needs the reference"):
        run([0.0], [0.0])


def test_the_program_prints_every_row():
    rows = objectives.rows([])
    printed = objectives.text(rows)
    uses = [row["use"] for row in rows]
    assert all(uses) and len(set(uses)) == len(rows) and f"use: {uses[0]}" in printed
    assert [row["name"] for row in json.loads(json.dumps(rows))] == list(losses.OBJECTIVES)
    for row in rows:
        assert row["name"] in printed and row["formula"] in printed and row["paper"] in printed
        known = losses.OBJECTIVES[row["name"]].declared
        assert row["options"].keys() == row["meanings"].keys() == known.keys()
        for option in known.values():
            assert option.meaning in printed and option.range in printed
    with pytest.raises(ValueError, match="did you mean 'dpo'"):
        objectives.rows(["dp0"])
