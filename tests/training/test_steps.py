# SPDX-License-Identifier: Apache-2.0
"""The step gives the same result however its batch is split, on one device and on eight."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_runs

from align_jax.core.options import Config, OptimizerOptions
from align_jax.core.tree import flatten
from align_jax.models.roles import Role
from align_jax.parallel.mesh import make_mesh
from align_jax.planner import hlo
from align_jax.planner.collectives import read_collectives
from align_jax.runs import weights
from align_jax.training import evaluation, initialize, optim, partitioning, steps

SPLIT = (("data", 2), ("fsdp", 2), ("tensor", 2))
# objective, model, rank of the adapter (0: all is trained), mesh, microbatches; all shapes:
# tools/compare_all_meshes.py
MESHES = [
    ("aot", "dense", 0, (("data", 8),), 2),
    ("dpo", "dense", 0, (("fsdp", 2), ("sequence", 2), ("tensor", 2)), 1),
    # without experts the axis splits rows
    ("dpo", "dense", 0, (("data", 2), ("fsdp", 2), ("expert", 2)), 1),
    ("dpo", "dense", 2, SPLIT, 2),
    ("kto", "dense", 0, SPLIT, 2),
    ("kto", "dense", 2, (("fsdp", 4), ("tensor", 2)), 1),
    ("kto", "experts", 0, (("expert", 2), ("sequence", 2), ("tensor", 2)), 1),
    ("dpo", "experts", 2, (("data", 2), ("fsdp", 2), ("expert", 2)), 1),
]


def name_of(value):
    return "-".join(f"{axis}{size}" for axis, size in value) if isinstance(value, tuple) else None


def same(a, b):
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(
            [step[name] for step in a[0]], [step[name] for step in b[0]], rtol=1e-5, err_msg=name
        )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=5e-6), a[1], b[1])


@pytest.mark.parametrize("objective, model, rank, mesh, parts", MESHES, ids=name_of)
def test_eight_devices_equal_one(train_steps, objective, model, rank, mesh, parts):
    alone = train_steps(objective, model=model, rank=rank)
    same(alone, train_steps(objective, mesh, parts, model=model, rank=rank, devices=8))


def test_muon_moves_matrices_alike_on_one_device_and_on_eight(train_steps):
    muon = OptimizerOptions(name="muon", learning_rate=1e-3, schedule="constant", eps=1e-3)
    alone, many = (
        train_steps("dpo", mesh, model="experts", devices=devices, steps=2, optimizer=muon)
        for mesh, devices in (((), 1), ((("expert", 2), ("fsdp", 2), ("tensor", 2)), 8))
    )
    same(alone, many)
    assert all(np.isfinite(step["loss"]) for step in alone[0])
    assert alone[0][1]["loss"] != alone[0][0]["loss"]


def test_weights_drawn_over_a_mesh_are_those_of_one_device(train_steps, drawn_weights):
    specs, spec, mesh, _ = train_steps("dpo", MESHES[-1][3], 1, model="experts", rank=2, devices=8)[
        3
    ]
    expected = drawn_weights("dpo", "experts", 2, options=())
    with jax.set_mesh(mesh):
        frozen = weights.load_frozen(spec, specs, Config())
        found = frozen, weights.load_trained(spec, specs, frozen, Config())
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7),
        jax.device_get(found),
        expected,
    )


@pytest.mark.parametrize(
    "name, model",
    [*((name, "dense") for name in ("dpo", "kto", "aot", "dpo+sft")), ("kto", "experts")],
)
def test_microbatches_leave_the_step_unchanged(train_steps, name, model):
    same(train_steps(name, model=model), train_steps(name, model=model, microbatches=4))


def test_gradients_of_bfloat16_parameters_are_added_and_measured_in_float32(
    make_step_spec, drawn_weights, make_batch
):
    spec = make_step_spec("simpo")
    frozen, trained = drawn_weights("simpo", options=())
    narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), trained)
    norms = []
    for parts in (1, 8):
        step = jax.jit(functools.partial(steps.train_step, spec._replace(microbatches=parts)))
        state = steps.init_state(spec, narrow)
        after, values = step(state, frozen, make_batch(0))
        assert values["grad_norm"].dtype == jnp.float32
        assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
        norms.append(float(values["grad_norm"]))
    # added up in bfloat16, eight parts would lose half a percent
    assert norms[1] == pytest.approx(norms[0], rel=5e-4)


def test_what_bfloat16_has_no_place_for_arrives_in_the_mean(make_step_spec):
    """An update, a second moment's decay, a small share of the policy: each below half of the last
    place of the ones that it changes."""
    spec = make_step_spec("dpo", sync_every_steps=1, mix=2**-10)
    spec = spec._replace(optimizer=optax.adamw(0.06))
    lost = []
    for dtype in (jnp.float32, jnp.bfloat16):
        ones = {"w": jnp.ones(4096, dtype)}
        state = steps.init_state(spec, ones, jax.tree.map(lambda x: 2 * x, ones))
        state["opt_state"] = optax.tree_utils.tree_set(state["opt_state"], nu=ones)
        grads, key = {"w": jnp.full(4096, 0.5)}, jax.random.key(0)
        after, _ = steps._update(spec, state, jnp.ones(()), grads, {}, key)
        nu = optax.tree_utils.tree_get(after["opt_state"], "nu")
        found = after["params"]["w"], nu["w"], after["reference"]["w"]
        assert all(x.dtype == dtype for x in found)
        means = [float(x.mean(dtype=jnp.float32)) for x in found]
        lost.append(np.array([1.0, 1.0, 2.0]) - means)
    assert (lost[0] > 5e-4).all() and (lost[0] < 2e-3).all()
    np.testing.assert_allclose(lost[1], lost[0], rtol=0.15)


@pytest.mark.parametrize("name, kept", [("adamw", 0.9), ("lion", 0.99), ("muon", 0.95)])
def test_a_first_moment_in_bfloat16_follows_the_gradients_in_the_mean(make_step_spec, name, kept):
    options = OptimizerOptions(
        name=name, b1=0.9, b2=0.99, moment_dtype="bfloat16", learning_rate=0.0, clip_norm=0.0
    )
    roles = {"w": Role("linear", inputs=1, leading=1)}
    optimizer = optim.make_optimizer(options, lambda step: 0.0, roles)
    spec = make_step_spec("simpo")._replace(optimizer=optimizer)
    params = {"w": jnp.ones((1, 64, 64))}
    state, ones = steps.init_state(spec, params), {"w": jnp.ones((1, 64, 64), jnp.bfloat16)}
    moments = [x for x in jax.tree.leaves(state["opt_state"]) if x.dtype == jnp.bfloat16]
    assert [x.shape for x in moments] == [(1, 64, 64)]
    held = jax.tree.map(lambda x: ones["w"] if x.dtype == jnp.bfloat16 else x, state["opt_state"])
    grads = {"w": jnp.full((1, 64, 64), 1 - 1e-3 / (1 - kept))}  # a quarter of the last place
    given = (spec, state | {"opt_state": held}, jnp.ones(()), grads, {}, jax.random.key(0))
    after, _ = steps._update(*given)
    (found,) = (x for x in jax.tree.leaves(after["opt_state"]) if x.dtype == jnp.bfloat16)
    assert 1 - float(found.mean(dtype=jnp.float32)) == pytest.approx(1e-3, rel=0.15)


def test_the_step_compiles_once(train_steps):
    assert train_steps("dpo")[2]._cache_size() == 1


def test_dpo_at_the_reference_is_log_2(train_steps):
    for rank in (0, 2):
        assert train_steps("dpo", rank=rank)[0][0]["loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_no_array_of_all_logits_is_alive(train_steps):
    _, _, _, (specs, spec, mesh, batch) = train_steps("dpo")
    abstract = partitioning.abstract_batch(mesh, batch)
    text = (
        partitioning.lower_train_step(spec, specs.state, specs.frozen, abstract, mesh)
        .compile()
        .as_text()
    )
    rows, length = batch.tokens.shape
    vocabulary = spec.policy.config.vocab_size
    assert f"f32[{rows},4,{vocabulary}]" in text  # a chunk of 4 positions is
    for positions in (length, batch.loss_index.shape[1]):
        assert not re.search(rf"\[({rows},{positions}|{rows * positions}),{vocabulary}\]", text)


def test_a_copied_output_head_gives_the_same_step(train_steps):
    # chunks of one position
    assert train_steps("dpo")[3][3].loss_index.shape[1] >= steps.COPIED_FROM_CHUNKS
    same(train_steps("dpo"), train_steps("dpo", SPLIT, devices=8, chunk=1, ahead=True))


def test_chunks_of_the_loss_move_the_output_head_but_once(train_steps):
    _, _, chunked, (specs, spec, mesh, batch) = train_steps(
        "dpo", SPLIT, devices=8, chunk=1, ahead=True
    )
    abstract = partitioning.abstract_batch(mesh, batch)
    step = spec._replace(chunk=batch.loss_index.shape[1])
    whole = partitioning.lower_train_step(step, specs.state, specs.frozen, abstract, mesh).compile()
    moved = []
    for compiled in (chunked, whole):
        found = read_collectives(hlo.parse(compiled.as_text()))
        moved.append(
            sum(one.count * one.traffic for one in found if "fsdp" in one.axes(mesh.shape))
        )
    assert moved[0] < 1.05 * moved[1], moved


@pytest.mark.parametrize("name", ["sft", "dpo+sft", "kto", "aot", "beta_dpo", "reward"])
def test_the_evaluations_batch_size_leaves_its_loss_unchanged(
    make_step_spec, drawn_weights, make_batch, name
):
    """A mean of batches' means would weigh the tokens of a short batch too much, and statistics of
    a batch are not those of the set."""
    spec, mesh = make_step_spec(name), make_mesh({"data": 1}, jax.devices()[:1])
    frozen, trained = drawn_weights(name, options=())
    kind = spec.terms[0].objective.data
    # 16 groups, the last one a filler
    batch = make_batch(0, responses=1 if kind == "unpaired" else 2, kind=kind)
    noise = np.random.default_rng(0)
    moved = jax.tree.map(lambda x: x + 0.1 * noise.normal(size=x.shape).astype(x.dtype), trained)
    state = steps.init_state(spec, moved)

    def evaluate(size):
        def batches():
            for start in range(0, 16, size):

                def take(x, start=start):
                    each = x.shape[0] // 16
                    return x[each * start : each * (start + size)]

                yield jax.tree.map(take, batch)

        return evaluation.make_evaluation(spec, mesh, batches)(state, frozen)

    whole, pieces = evaluate(16), evaluate(4)
    for key, value in whole.items():
        assert pieces[key] == pytest.approx(value, rel=1e-5), key
    if name == "dpo+sft":
        assert whole["loss"] == pytest.approx(whole["loss/dpo"] + whole["loss/sft"], rel=1e-6)


def test_splitting_keeps_groups_whole_and_interleaves_them(make_batch):
    batch = jax.tree.map(jnp.asarray, make_batch(0, groups=8))
    parts = steps.split(batch, 4)
    tokens = batch.tokens.reshape(8, 2, -1)  # groups of two rows
    for index in range(4):
        np.testing.assert_array_equal(parts.tokens[index].reshape(2, 2, -1), tokens[index::4])
        np.testing.assert_array_equal(parts.lengths[index], batch.lengths[index::4])


def test_an_indivisible_batch_is_an_error(make_batch):
    with pytest.raises(ValueError, match="does not divide into 3 microbatches"):
        steps.split(make_batch(0, groups=8), 3)


def test_a_step_that_is_not_finite_leaves_the_state_as_it_was(train_steps, make_batch):
    _, _, step, (specs, spec, mesh, batch) = train_steps("dpo")
    with jax.set_mesh(mesh):
        frozen = weights.load_frozen(spec, specs, Config())
        trained = weights.load_trained(spec, specs, frozen, Config())
        trained["final_norm"]["scale"] = trained["final_norm"]["scale"] * jnp.nan
        before = jax.device_get(trained)
        state, metrics = step(initialize.first_state(spec, specs, trained), frozen, batch)
    assert not np.isfinite(float(metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state["params"]), before)
    assert int(state["step"]) == 1


def test_the_reference_follows_the_policy_every_few_steps(train_steps):
    metrics = train_steps("dpo", sync_every_steps=2, mix=1.0)[0]
    assert metrics[1]["rewards/margins"] != 0  # the policy has left the reference
    # after step 2 they are one again
    assert metrics[2]["loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_a_reference_that_moves_starts_from_its_own_weights(make_step_spec, drawn_weights):
    spec = make_step_spec("ppo", sync_every_steps=2)
    trained = drawn_weights("ppo", options=())[1]
    other = {name: leaf for name, leaf in trained.items() if name != "value"}
    other = jax.tree.map(lambda x: x + 1, other)
    reference = steps.init_state(spec, trained, other)["reference"]
    jax.tree.map(np.testing.assert_array_equal, reference, other | {"value": trained["value"]})


def test_the_value_head_alone_moves_in_its_first_steps(train_steps, drawn_weights, put_as):
    options = {"value_warmup_steps": 1}
    _, once, step, parts = train_steps("ppo_offline", steps=1, **options)
    specs, spec, mesh, batch = parts
    frozen, start = drawn_weights("ppo_offline", options=(), **options)

    def moved(params):
        same = jax.tree.map(np.array_equal, start, jax.device_get(params))
        return {path for path, equal in flatten(same).items() if not equal}

    assert moved(once) == {"value/out/kernel", "value/out/bias"}
    with jax.set_mesh(mesh):
        state = initialize.first_state(spec, specs, put_as(start, specs.trained))
        for _ in range(2):
            state, _ = step(state, put_as(frozen, specs.frozen), batch)
    assert {"embed/tokens", "layers/mlp/up/kernel"} < moved(state["params"])


def test_no_dropout_where_the_old_log_probabilities_had_none(make_step_spec):
    assert make_step_spec("dpo", rank=2, dropout=0.5).drops
    assert not make_step_spec("grpo", rank=2, dropout=0.5, options=(("entropy_coef", 0.1),)).drops


def test_an_adapter_s_reference_is_its_base_without_a_second_copy(train_steps):
    _, params, _, (specs, *_rest) = train_steps("dpo", rank=2)
    assert all("lora" in name for name in flatten(params))
    assert specs.reference is None and not any("lora" in name for name in flatten(specs.base))


def test_an_objective_without_reference_holds_none(make_step_spec):
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        specs = tiny_runs.state_specs_of(make_step_spec("simpo"), mesh)
    assert specs.base == {} and specs.reference is None
