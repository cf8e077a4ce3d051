# SPDX-License-Identifier: Apache-2.0
"""Adapters in a run: over a base in few bits, from a PEFT adapter, beside heads."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from align_jax import losses
from align_jax.core.options import (
    Config,
    LoraOptions,
    ModelOptions,
    OptimizerOptions,
    ReferenceOptions,
)
from align_jax.core.tree import flatten, unflatten
from align_jax.interop import hf, peft
from align_jax.models.lora import LoraConfig
from align_jax.models.model import build
from align_jax.models.quantize import Quantized, quantize
from align_jax.parallel.mesh import make_mesh
from align_jax.parallel.sharding import put_batch
from align_jax.runs import weights
from align_jax.training import initialize, optim, partitioning
from align_jax.training.steps import StepSpec

CONFIG = hf.config_from(
    dict(
        model_type="llama",
        vocab_size=64,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
)
PLAIN = LoraConfig(2)
SHARDED = {"fsdp": 4, "tensor": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    draw = np.random.default_rng(0)
    hf.save(
        str(path),
        CONFIG,
        jax.tree.map(
            lambda x: draw.normal(size=x.shape).astype(np.float32) * 0.2, build(CONFIG).shapes()
        ),
    )
    return str(path)


def prepared(name, lora, mesh=None, reference_dtype="float32", **model_options):
    terms = losses.resolve(name, {})
    options = ModelOptions(compute_dtype="float32", attention="xla", **model_options)
    models = initialize.make_models(CONFIG, terms, options, lora)
    adamw = OptimizerOptions(learning_rate=1e-2, schedule="constant", clip_norm=0.0)
    schedule = optim.make_schedule(adamw, total_steps=10)
    spec = StepSpec(
        models.policy,
        models.base,
        terms,
        optim.make_optimizer(adamw, schedule, models.policy.roles()),
        schedule,
        chunk=4,
        value_head=options.value_head,
    )
    mesh = make_mesh(mesh or {"data": 1}, jax.devices()[: math.prod((mesh or {}).values())])
    reference = ReferenceOptions(dtype=reference_dtype)
    return spec, mesh, initialize.make_state_specs(spec, mesh, options, reference)


def started(path, **more):
    """A run's config that says no more than what it starts from."""
    return Config(model=ModelOptions(path=path, **more))


@functools.cache
def stepped(checkpoint, make_batch, quantization, sharded, lora=PLAIN):
    """Take two steps of DPO; return their metrics and the frozen weights."""
    spec, mesh, specs = prepared("dpo", lora, SHARDED if sharded else None, quantize=quantization)
    with jax.set_mesh(mesh):
        frozen = weights.load_frozen(spec, specs, started(checkpoint))
        assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), frozen) == jax.tree.map(
            lambda x: (x.shape, x.dtype, x.sharding), specs.frozen
        )
        state = initialize.first_state(
            spec, specs, weights.load_trained(spec, specs, frozen, started(checkpoint))
        )
        step = partitioning.jit_train_step(spec, specs.state, mesh)
        metrics = []
        for number in range(2):
            state, values = step(state, frozen, put_batch(mesh, make_batch(number)))
            metrics.append({name: float(value) for name, value in values.items()})
        return metrics, jax.device_get(frozen["base"])


def test_the_quantized_base_is_policy_and_reference(checkpoint, make_batch):
    metrics, base = stepped(checkpoint, make_batch, "nf4", False)
    assert (
        metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        and metrics[0]["rewards/margins"] == 0
    )
    assert metrics[0]["grad_norm"] > 1e-3 and metrics[1]["rewards/margins"] != 0
    _, stored = hf.load(checkpoint)
    for path, leaf in flatten(stored).items():
        held = flatten(base)[path]
        if isinstance(held, Quantized):
            assert sum(x.nbytes for x in jax.tree.leaves(held)) * 7.5 < leaf.nbytes
            expected = jax.jit(functools.partial(quantize, like=held))(leaf)
            jax.tree.map(np.testing.assert_array_equal, held, jax.device_get(expected))
        else:
            np.testing.assert_array_equal(held, leaf)


def test_a_quantized_base_is_the_same_over_a_mesh(checkpoint, make_batch):
    one, base = stepped(checkpoint, make_batch, "nf4", False)
    many, other = stepped(checkpoint, make_batch, "nf4", True)
    jax.tree.map(np.testing.assert_array_equal, base, other)
    for a, b in zip(one, many):
        assert {
            name: pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True) for name, value in a.items()
        } == b


def test_ends_are_adapted_and_rows_trained_over_a_mesh(checkpoint, make_batch):
    lora = LoraConfig(
        2, targets="attention/query|embed", whole=("final_norm/scale",), head_tokens=(3, 5)
    )
    metrics, _ = stepped(checkpoint, make_batch, "nf4", True, lora)
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics[0]["grad_norm"] > 1e-3 and metrics[1]["rewards/margins"] != 0
    spec, _, specs = prepared("dpo", lora)
    assert flatten(specs.trained).keys() >= {"embed/lora_a", "output/rows", "final_norm/scale"}


def test_what_came_with_an_adapter_stands_in_the_place_of_the_base_s(checkpoint, tmp_path):
    lora = LoraConfig(
        2,
        targets="attention/query",
        whole=("final_norm/scale",),
        replaced=("embed/tokens",),
        head_tokens=(5, 3),
    )
    shapes = flatten(build(CONFIG, lora=lora).shapes())
    kept = {"embed/tokens", "output/rows", "final_norm/scale"}
    kept |= {path for path in shapes if "lora" in path}
    draw = np.random.default_rng(1)
    given = {path: draw.normal(size=shapes[path].shape).astype(np.float32) for path in kept}
    peft.save(str(tmp_path), CONFIG, lora, unflatten(given), base_name=checkpoint)
    assert peft.load(str(tmp_path), CONFIG)[0] == LoraConfig(**{**vars(lora), "alpha": 16.0})
    spec, _, specs = prepared("dpo", lora, SHARDED)
    config = started(checkpoint, lora=LoraOptions(path=str(tmp_path)))
    frozen = weights.load_frozen(spec, specs, config)
    trained = flatten(weights.load_trained(spec, specs, frozen, config))
    base = flatten(frozen["base"])
    assert trained.keys() == kept - {"embed/tokens"}
    for path in trained:
        np.testing.assert_array_equal(trained[path], given[path], err_msg=path)
    np.testing.assert_array_equal(base["embed/tokens"], given["embed/tokens"])
    np.testing.assert_array_equal(
        base["final_norm/scale"], flatten(hf.load(checkpoint)[1])["final_norm/scale"]
    )


@pytest.mark.parametrize(
    "param_dtype, reference_dtype, once",
    [
        ("float32", "bfloat16", True),
        ("float32", "float32", True),
        ("bfloat16", "float32", False),  # what was rounded away is not there any more
    ],
)
def test_a_start_reads_each_weight_once_and_is_the_same(
    checkpoint, monkeypatch, param_dtype, reference_dtype, once
):
    spec, _, specs = prepared(
        "dpo", None, SHARDED, reference_dtype, param_dtype=param_dtype, freeze=("embed",)
    )
    config = started(checkpoint)
    reads, load = [], hf.load
    monkeypatch.setattr(
        weights.hf, "load", lambda *args, **kw: reads.extend(kw["only"]) or load(*args, **kw)
    )
    frozen, trained = weights.load_start(spec, specs, config)
    assert (len(reads) == len(set(reads))) == once
    assert set(reads) == set(flatten(specs.frozen["base"]))
    alone = weights.load_frozen(spec, specs, config)
    apart = jax.device_get((alone, weights.load_trained(spec, specs, {}, config)))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((frozen, trained)), apart)
    assert jax.tree.map(lambda x: (x.dtype, x.sharding), frozen) == jax.tree.map(
        lambda x: (x.dtype, x.sharding), specs.frozen
    )
    held = [
        {
            part.data.unsafe_buffer_pointer()
            for x in jax.tree.leaves(tree)
            for part in x.addressable_shards
        }
        for tree in (frozen, trained)
    ]
    assert not set.intersection(*held)  # a step takes the buffers of what is trained


@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_random_weights_are_quantized_too(method):
    spec, _, specs = prepared("dpo", LoraConfig(2), quantize=method)
    frozen = weights.load_frozen(spec, specs, Config())
    assert jax.tree.structure(frozen) == jax.tree.structure(specs.frozen)
    kernel = frozen["base"]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.method == method and float(np.std(kernel.astype("float32"))) == pytest.approx(
        0.02, rel=0.05
    )
    assert initialize.count(frozen) == initialize.count(prepared("dpo", LoraConfig(2))[2].frozen)


def test_a_run_starts_from_a_peft_adapter(checkpoint, tmp_path):
    lora = LoraConfig(3, alpha=6.0, targets="attention/(query|value)", dora=True)
    model = build(CONFIG, lora=lora)
    roles = flatten(model.roles())
    shapes = {
        path: leaf
        for path, leaf in flatten(model.shapes()).items()
        if roles[path].part == "adapter"
    }
    draw = np.random.default_rng(1)
    adapter = {
        path: draw.normal(size=leaf.shape).astype(np.float32) for path, leaf in shapes.items()
    }
    peft.save(str(tmp_path), CONFIG, lora, unflatten(adapter), base_name=checkpoint)
    spec, _, specs = prepared("reward", peft.load(str(tmp_path), CONFIG)[0], SHARDED)
    config = started(checkpoint, lora=LoraOptions(path=str(tmp_path)))
    frozen = weights.load_frozen(spec, specs, config)
    trained = flatten(weights.load_trained(spec, specs, frozen, config))
    # the head, which the file lacks, is drawn
    assert trained.keys() == adapter.keys() | {"score/out/kernel"}
    for path, leaf in adapter.items():
        np.testing.assert_array_equal(trained[path], leaf)
        assert trained[path].sharding == flatten(specs.trained)[path].sharding


@pytest.mark.parametrize("name", ["reward", "reward_ranked", "ppo", "ppo_offline"])
@pytest.mark.parametrize("options", [{}, {"dora": True}])
def test_a_fresh_adapter_stands_beside_a_head_that_its_base_lacks(checkpoint, name, options):
    spec, _, specs = prepared(name, LoraConfig(2, **options), quantize="" if options else "nf4")
    frozen = weights.load_frozen(spec, specs, started(checkpoint))
    trained = weights.load_trained(spec, specs, frozen, started(checkpoint))
    assert jax.tree.structure(trained) == jax.tree.structure(specs.trained)
    assert set(trained) == {"layers", "score" if "reward" in name else "value"}


@pytest.mark.parametrize("lora", [None, LoraConfig(2)])
def test_the_value_head_starts_from_a_reward_model_s(checkpoint, tmp_path, lora):
    draw = np.random.default_rng(1)
    shapes = build(CONFIG, heads=("score",), unembed=False).shapes()
    params = jax.tree.map(lambda x: draw.normal(size=x.shape).astype(np.float32), shapes)
    hf.save(str(tmp_path), CONFIG, params, heads=("score",))
    weights.check_value_path(str(tmp_path), CONFIG)
    spec, _, specs = prepared("ppo", lora, SHARDED)
    config = started(checkpoint, value_path=str(tmp_path))
    frozen = weights.load_frozen(spec, specs, config)
    trained = weights.load_trained(spec, specs, frozen, config)
    head = trained["value"]["out"]
    np.testing.assert_array_equal(head["kernel"], params["score"]["out"]["kernel"])
    assert not np.asarray(head["bias"]).any()
    where = jax.tree.map(lambda x: x.sharding, specs.trained)
    assert jax.tree.map(lambda x: x.sharding, trained) == where
    plain = weights.load_trained(spec, specs, frozen, started(checkpoint))
    same = jax.tree.map(np.array_equal, {**trained, "value": 0}, {**plain, "value": 0})
    assert all(jax.tree.leaves(same))
    assert weights.check_headers(spec, config)[-1].startswith(str(tmp_path))


def test_a_reward_model_whose_head_does_not_fit_is_named(checkpoint, tmp_path):
    other = dataclasses.replace(CONFIG, hidden_size=128)
    for path, policy, words in (
        (checkpoint, CONFIG, "expected a sequence classifier"),
        (str(tmp_path), other, "states of 256, the policy's have 128"),
    ):
        shapes = build(CONFIG, heads=("score",), unembed=False).shapes()
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
        hf.save(str(tmp_path), CONFIG, zeros, heads=("score",))
        with pytest.raises(ValueError, match=words):
            weights.check_value_path(path, policy)


@pytest.mark.parametrize(
    "objective, head", [("reward", "score"), ("ppo", "value"), ("ppo", "value_mlp")]
)
def test_heads_are_trained_beside_an_adapter(objective, head):
    specs = prepared(objective, LoraConfig(2), value_head=head if objective == "ppo" else "value")[
        2
    ]
    assert {path.split("/")[0] for path in flatten(specs.trained)} == {"layers", head}
    assert all(
        path.split("/")[-1] in ("lora_a", "lora_b")
        for path in flatten(specs.trained)
        if path[:6] == "layers"
    )
