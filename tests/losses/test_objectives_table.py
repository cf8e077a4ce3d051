# SPDX-License-Identifier: Apache-2.0
"""What every row of the table promises; a new row is tested by being there."""

import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import loss_cases as cases
import numpy as np
import pytest

from align_jax import losses
from align_jax.core.metrics import divide
from align_jax.losses import OBJECTIVES, Inputs

LOG2 = math.log(2.0)
# The loss at policy = reference with default options, from the formulas; rows without a reference
# are where every log-probability or score is 0 (rollouts: ratio 1, advantage 1).
AT_REFERENCE = {
    "sft": 0.0,
    "csft": 0.0,
    "gkd": 0.0,
    "minillm": -1.0,
    "xpo": LOG2,
    "nash_md": 0.0,
    "reward": LOG2,
    "reward_ranked": math.log(24.0),
    "reward_regression": 4.0,
    "reward_classification": LOG2,
    "reward_process": LOG2,
    "dpo": LOG2,
    "robust": LOG2,
    "ipo": 25.0,
    "hinge": 1.0,
    "dpo_norm": LOG2,
    "exo_pair": -LOG2 - 0.5 * math.log(0.999) - 0.5 * math.log(0.001),
    "nca_pair": 2 * LOG2,
    "bco_pair": 2 * LOG2,
    "sppo_hard": 50.0,
    "aot": LOG2,
    "aot_unpaired": LOG2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * LOG2 + 0.5,
    "dpo_sigmoid": -0.5,
    "dpop": LOG2,
    "dpo_shift": LOG2,
    "rpo": 0.0,
    "tdpo": LOG2,
    "tgdpo": LOG2,
    "beta_dpo": LOG2,
    "simpo": math.log1p(math.e),
    "alphapo": math.log1p(math.e),
    "orpo": 0.1 * LOG2,
    "cpo": LOG2,
    "slic": 1.0,
    "simper": 0.0,
    "tpo": math.log1p(math.exp(0.5)),
    "adpo": math.log(4.0),
    "kto": 0.5,
    "kto_zero": 0.5,
    "kto_logsigmoid": LOG2,
    "apo_zero_unpaired": 0.5,
    "bco": LOG2,
    "ppo_offline": 0.01 * 0.5,
    "ppo": -1.0,
    "grpo": -1.0,
    "gspo": -1.0,
    "cispo": 0.0,
    "sapo": -2.0,
    "vespo": 0.0,
    "gmpo": -1.0,
    "clip_cov": -1.0,
    "kl_cov": -1.0,
    "rloo": -1.0,
    "reinforce": 0.0,
    "reinforce_pp": -1.0,
    "entropy": 0.0,
    "ptx": 0.0,
}
ROWS = list(OBJECTIVES)
PAIRS = [
    name for name, row in OBJECTIVES.items() if row.data == "pairs" and row.needs != ("scores",)
]
UNPAIRED = [
    name for name, row in OBJECTIVES.items() if row.data == "unpaired" and row.needs != ("scores",)
]


def blank(name, groups=2, **shape):
    """Everything the policy and the reference say is 0."""
    row = OBJECTIVES[name]
    batch = cases.make_batch(row.data, groups, **shape)
    if row.data == "rollout":
        ones = jnp.where(batch.loss_mask, 1.0, 0.0)
        batch = batch._replace(
            old_token_logps=0 * ones,
            sampler_token_logps=0 * ones,
            advantages=ones,
            returns=0 * ones,
            old_values=0 * ones,
        )
        batch = batch._replace(text=cases.make_batch("completions", groups))
    if row.data == "scored":
        batch = batch._replace(scores=jnp.full(batch.lengths.shape, 2.0))
    outputs = cases.make_outputs(batch, jnp.zeros(batch.tokens.shape))
    for field in (*row.needs, "log_sum_sq"):
        zeros = outputs.logps if field == "scores" else outputs.token_logps
        outputs = outputs._replace(**{field: zeros})
    mismatched = None
    if row.mismatched:
        batch = batch._replace(mismatched=batch)
        mismatched = (outputs, outputs)
    text = batch.text and cases.make_outputs(batch.text, jnp.zeros(batch.text.tokens.shape))
    return Inputs(batch, outputs, outputs, mismatched, text=text)


@pytest.mark.parametrize("name", ROWS)
def test_policy_equal_to_reference_gives_the_known_value(name):
    assert name in AT_REFERENCE, f"give {name!r} its value at policy = reference in AT_REFERENCE"
    value = cases.total(losses.resolve(name), blank(name, lengths=1))
    np.testing.assert_allclose(value, AT_REFERENCE[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ROWS)
def test_compiled_it_is_the_same(name):
    problem, terms = cases.make_problem(name), losses.resolve(name)
    compiled = jax.jit(functools.partial(cases.total, terms))(problem)
    np.testing.assert_allclose(cases.total(terms, problem), compiled, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", PAIRS)
def test_gradient_raises_chosen_above_rejected(name):
    # DiscoPOP is not convex, and turns round about d = 0; it is looked at where it is steep.
    problem = cases.make_problem(name, spread=0.05)
    batch = problem.batch
    if name == "rpo":  # learns how much better the chosen one is: without a margin, nothing
        problem = problem._replace(batch=batch._replace(margin=jnp.ones(4)))
    if name == "discopop":
        shift = jnp.where(jnp.arange(batch.tokens.shape[0])[:, None] % 2 == 0, 5.0, -5.0)
        problem = problem._replace(
            policy=cases.make_outputs(batch, problem.policy.token_logps + shift)
        )
    _, grads = cases.value_and_grad(losses.resolve(name), problem)
    by_response = cases.sum_by_slot(grads["token_logps"], batch)
    if name == "csft":  # learns both, each after its control token
        assert (by_response < 0).all()
        return
    counts = batch.lengths.astype(jnp.float32)
    slope = (by_response / counts).sum(axis=0)
    assert slope[0] < slope[1]
    if name != "apo_down":  # lowers both by design, the rejected one more
        assert slope[0] < 0
    if name != "slic" or slope[1] != 0:
        assert slope[1] > 0


@pytest.mark.parametrize("name", UNPAIRED)
def test_gradient_raises_desirable_and_lowers_undesirable(name):
    for label in (True, False):
        problem = cases.make_problem(name, spread=0.01, label=label)
        want = np.full(4, label)
        if name == "ppo_offline":  # its whitened advantages of one class have mean 0
            want = np.array([label, not label, label, not label])
            problem = cases.make_problem(name, spread=0.01, label=want)
        _, grads = cases.value_and_grad(losses.resolve(name), problem)
        slope = np.asarray(cases.sum_by_slot(grads["token_logps"], problem.batch))[:, 0]
        np.testing.assert_array_equal(slope < 0, want)


@pytest.mark.parametrize("name", ["reward", "reward_ranked"])
def test_gradient_raises_the_best_score_and_lowers_the_worst(name):
    problem = blank(name)
    _, grads = cases.value_and_grad(losses.resolve(name), problem)
    assert (grads["scores"][:, 0] < 0).all() and (grads["scores"][:, -1] > 0).all()


EXTREMES = {
    "ordinary": {},
    "log-ratios of 1e4 and -1e4": {"scale": 1e4},
    "empty responses": {"lengths": 0},
    "only desirable": {"label": True},
    "only undesirable": {"label": False},
    "all weights 0": {"weight": 0.0},
    "certain tokens": {"certain": True},
}


def extreme(name, *, scale=None, weight=None, certain=False, **shape):
    problem = cases.make_problem(name, **shape)
    batch, policy = problem.batch, problem.policy
    if scale is not None:
        groups, responses = batch.lengths.shape
        # both signs on either side of a pair
        flips = jnp.arange(groups)[:, None] + jnp.arange(responses)[None]
        signs = jnp.where(flips.reshape(-1, 1) % 2 == 0, scale, -scale)
        # Log-probabilities are never positive: a ratio is large where the reference's is small.
        policy = policy._replace(
            token_logps=jnp.where(batch.loss_mask, jnp.minimum(signs, -0.5), 0.0)
        )
        reference = cases.make_outputs(batch, jnp.minimum(-signs, -0.5))
        problem = problem._replace(reference=reference)
        if policy.scores is not None:
            policy = policy._replace(scores=scale * policy.scores)
    if certain:
        policy = policy._replace(token_logps=0 * policy.token_logps, logps=0 * policy.logps)
    if weight is not None:
        batch = batch._replace(weight=weight * batch.weight)
    return problem._replace(batch=batch, policy=policy)


@pytest.mark.parametrize("name", ROWS)
def test_every_variant_is_finite_in_extremes(name):
    extremes = [extreme(name, **change) for change in EXTREMES.values()]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *extremes)
    for options in cases.variants(name):
        each = jax.vmap(functools.partial(cases.value_and_grad, losses.resolve(name, options)))
        value, grads = each(stacked)
        for field, found in {"loss": value, **grads}.items():
            finite = np.isfinite(found).reshape(len(EXTREMES), -1).all(axis=1)
            assert finite.all(), (options, field, dict(zip(EXTREMES, finite)))


@pytest.mark.parametrize("name", ROWS)
def test_one_group_is_enough(name):
    value, grads = cases.value_and_grad(losses.resolve(name), extreme(name, groups=1))
    assert all(np.isfinite(found).all() for found in (value, *grads.values()))


@pytest.mark.parametrize("name", ROWS)
def test_weights_depend_on_the_batch_alone(name):
    problem, terms = cases.make_problem(name), losses.resolve(name)
    before = losses.weights(terms, problem.batch)
    np.testing.assert_array_equal(before, cases.whole(terms, problem).weights)
    assert before.shape == (len(terms), *problem.batch.weight.shape)


@pytest.mark.parametrize("name", ROWS)
def test_loss_and_gradient_do_not_depend_on_microbatches(name):
    """TRL's and HALOs' losses depend on how the batch is split."""
    problem, terms = cases.make_problem(name, groups=4), losses.resolve(name)

    def loss(token_logps, parts):
        logps = cases.sum_by_slot(token_logps, problem.batch)
        changed = problem._replace(
            policy=problem.policy._replace(token_logps=token_logps, logps=logps)
        )
        return (
            cases.total(terms, changed)
            if parts == 1
            else cases.in_microbatches(terms, changed, parts)
        )

    whole, parted = (
        jax.value_and_grad(loss)(problem.policy.token_logps, parts) for parts in (1, 2)
    )
    for a, b in zip(parted, whole):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ROWS)
def test_filler_groups_change_nothing(name):
    problem = cases.make_problem(name, groups=2)

    def double(x):
        return jnp.concatenate([x, x + 1.0 if x.dtype == jnp.float32 else x])

    def reweigh(batch):
        return batch._replace(weight=jnp.concatenate([jnp.ones(2), jnp.zeros(2)]))

    bigger = jax.tree.map(double, problem)
    batch = reweigh(bigger.batch)
    if batch.mismatched is not None:
        batch = batch._replace(mismatched=reweigh(batch.mismatched))
    if batch.text is not None:
        batch = batch._replace(text=reweigh(batch.text))
    bigger = bigger._replace(batch=batch)
    terms = losses.resolve(name)
    (a, grads), (b, more) = (
        cases.value_and_grad(terms, problem),
        cases.value_and_grad(terms, bigger),
    )
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for field in grads:
        np.testing.assert_allclose(
            grads[field], more[field][: len(grads[field])], rtol=1e-4, atol=1e-6
        )
        assert (more[field][len(grads[field]) :] == 0).all()


@pytest.mark.parametrize("name", ROWS)
def test_metrics_are_sums_and_weights(name):
    problem = cases.make_problem(name)
    terms = losses.resolve(name)
    metrics = cases.whole(terms, problem).metrics
    for key, one in metrics.items():
        assert all(jnp.shape(x) == () and np.isfinite(x) for x in one), key
        assert one[-1] >= 0 or key in ("min_reward", "max_reward"), key
    known = set(divide(metrics))
    assert OBJECTIVES[name].metric.split()[0] in known
    assert OBJECTIVES[name].metric.split()[1] in ("up", "down")
    if name in (*PAIRS, *UNPAIRED) and name != "csft":
        assert {
            f"rewards/{key}" for key in ("chosen", "rejected", "margins", "accuracies")
        } <= known


@pytest.mark.parametrize("name", [name for name in PAIRS if name not in ("csft",)])
def test_margin_column_asks_for_more(name):
    problem = cases.make_problem(name, spread=0.01)
    terms = losses.resolve(name)
    with_margin = problem._replace(batch=problem.batch._replace(margin=jnp.full(4, 0.3)))
    zero = problem._replace(batch=problem.batch._replace(margin=jnp.zeros(4)))
    np.testing.assert_array_equal(cases.total(terms, zero), cases.total(terms, problem))
    if name == "discopop":
        assert cases.total(terms, with_margin) != cases.total(terms, problem)
    else:
        assert cases.total(terms, with_margin) > cases.total(terms, problem)


def test_every_row_is_on_the_page_of_what_was_measured():
    page = (pathlib.Path(__file__).parents[2] / "docs/objectives.md").read_text()
    terms = {name for row in OBJECTIVES.values() for name, _ in row.adds.values()}
    missing = [name for name in OBJECTIVES if f"\n| {name} |" not in page]
    assert set(missing) <= terms, "python tools/measure_tiny.py measures them"


@pytest.mark.parametrize("name", ["dpo", "aot_unpaired", "kto"])
def test_the_same_loss_on_one_and_on_eight_devices(name):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    problem, terms = cases.make_problem(name, groups=8), losses.resolve(name)
    compiled = jax.jit(lambda problem: cases.value_and_grad(terms, problem))
    alone, grads = compiled(problem)
    spread, more = compiled(jax.device_put(problem, rows))
    np.testing.assert_allclose(alone, spread, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(grads["token_logps"], more["token_logps"], rtol=1e-5, atol=1e-7)
