# SPDX-License-Identifier: Apache-2.0
"""Objectives that ask more of a run than a frozen copy and pairs: a teacher of another size and
vocabulary, offline and on the student's own samples; margins."""

import json
import pathlib
import runpy

import jax
import numpy as np
import pytest

from align_jax.core import config as configs
from align_jax.data.tokenizer import byte_tokenizer
from align_jax.interop import hf
from align_jax.models.model import build
from align_jax.online.rollout import Weights
from align_jax.parallel.sharding import put_batch
from align_jax.runs import loop, setup, weights
from align_jax.runs.source import make_source
from align_jax.training import partitioning, steps

TINY = pathlib.Path(__file__).parents[2] / "configs/tiny.py"
TEACHER = dict(
    model_type="qwen3",
    vocab_size=288,  # the student has 272
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=256,
    initializer_range=0.3,
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A random model of another family and size, with the student's tokenizer beside it."""
    folder = str(tmp_path_factory.mktemp("teacher"))
    config = hf.config_from(TEACHER)
    model = build(config, compute_dtype="float32", remat="none", attention="xla")
    hf.save(folder, config, model.init(jax.random.key(1)))
    byte_tokenizer().save_pretrained(folder)
    return folder


def tiny(objective):
    return runpy.run_path(str(TINY))["get_config"](objective)


def student(teacher, **keys):
    config = tiny("gkd")
    config.model.config.update(num_hidden_layers=1, hidden_size=32, intermediate_size=32)
    config.total_steps, config.batch_size, config.max_length = 5, 8, 96
    config.eval.every_steps = 0
    config.log.every_steps = 1
    config.optimizer.learning_rate = 1e-2
    config.reference.path = teacher
    config.update_from_flattened_dict(keys)
    return config


def losses_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_a_student_comes_nearer_to_a_teacher_of_another_size(teacher, tmp_path):
    loop.train(student(teacher), str(tmp_path))
    found = losses_of(tmp_path)
    assert found[-1] < 0.9 * found[0]


def test_on_the_students_own_samples_as_well(teacher, tmp_path):
    config = tiny("online_gkd")
    for key, value in student(teacher).model.config.items():
        config.model.config[key] = value
    config.total_steps, config.batch_size, config.max_length = 4, 8, 96
    config.rollout.prompts, config.rollout.responses_per_prompt = 8, 1
    config.objective.on_policy = 1.0
    config.eval.every_steps, config.log.every_steps = 0, 1
    config.optimizer.learning_rate = 1e-2
    config.reference.path = teacher
    held_out = loop.train(config, str(tmp_path))
    found = losses_of(tmp_path)
    assert len(found) == 4 and found[-1] < found[0]
    # measured on the student's own samples too, of the prompts held out
    assert 0.5 * found[-1] < held_out["eval/divergence"] < found[0]


FEW = {"data.train": "builtin:completions:train?size=64"}
ON_POLICY = {
    "objective.on_policy": 0.5,
    "rollout.responses_per_prompt": 1,
    "rollout.max_new_tokens": 12,
}


def test_where_there_are_held_out_answers_the_divergence_is_measured_on_them(teacher, tmp_path):
    """The held-out batches are those of the same student's run without samples."""
    runs = [
        setup.prepare(configs.read(student(teacher, **keys, **FEW)), str(tmp_path))
        for keys in ({}, ON_POLICY)
    ]
    assert [run.resolved.rollouts is None for run in runs] == [True, False]
    batches = [[run.eval.batch(number) for number in range(2)] for run in runs]
    jax.tree.map(np.testing.assert_array_equal, *batches)


def test_a_share_of_the_prompts_is_learned_on_own_samples_the_rest_on_the_datas_answers(
    teacher, tmp_path
):
    config = configs.read(student(teacher, **ON_POLICY))
    run = setup.prepare(config, str(tmp_path))
    specs = run.state_specs
    params = jax.tree.map(lambda x: 0.1 * jax.numpy.ones(x.shape, x.dtype), specs.trained)
    drawn = []
    for _ in range(2):
        batch = run.train.next(lambda: Weights(params))
        found = []
        for row, example in enumerate(batch.example_index):
            ids = batch.tokens[row][batch.loss_mask[row]]
            answer = list(run.examples[int(example)].responses[0].encode())[:12]
            found.append(ids.tolist()[: len(answer)] == answer)
        assert sum(found) == 4
        drawn.append(found)
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    "keys, words",
    [
        (ON_POLICY | {"objective.on_policy": 0.3}, "no whole number of them; 0.25 is"),
        (ON_POLICY | {"rollout.responses_per_prompt": 8}, "set it to 1"),
        (ON_POLICY | {"objective.sft_coef": 0.5}, "good or bad"),
        (ON_POLICY | {"reference.mode": "cached"}, "trains on new samples"),
        (ON_POLICY | {"objective.seq_kd": True, "objective.on_policy": 1.0}, "seq_kd .*no effect"),
        ({"objective.seq_kd": True, "rollout.responses_per_prompt": 8}, "set it to 1"),
    ],
)
def test_what_does_not_go_with_own_samples_is_refused(teacher, keys, words):
    with pytest.raises(ValueError, match=words):
        setup.resolve_config(configs.read(student(teacher, **keys)), 1)


def test_rewards_of_which_nothing_is_learned_are_refused(teacher):
    config = tiny("online_gkd")
    with pytest.raises(ValueError, match="set config.objective.on_policy"):
        setup.resolve_config(configs.read(config), 1)


def test_minillm_needs_no_reward_and_comes_nearer_to_its_teacher(teacher, tmp_path):
    config = tiny("minillm")
    config.rewards = configs.ConfigDict()
    for key, value in student(teacher).model.config.items():
        config.model.config[key] = value
    config.total_steps, config.batch_size, config.max_length = 6, 8, 112
    config.rollout.responses_per_prompt, config.rollout.max_new_tokens = 4, 8
    config.eval.every_steps, config.log.every_steps = 0, 1
    config.optimizer.learning_rate = 1e-2
    config.reference.path = teacher
    config.objective.ptx_coef, config.data.text = 0.1, "builtin:completions:train?size=32"
    held_out = loop.train(config, str(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [row["divergence"] for row in rows if "loss" in row]
    assert len(found) == 6 and found[-1] < 0.95 * found[0]
    assert 0.5 * found[-1] < held_out["eval/divergence"] < found[0]
    assert np.isfinite(held_out["eval/reverse_kl"])
    texts = [row["ptx_nll"] for row in rows if "loss" in row]
    assert 0.5 * texts[-1] < held_out["eval/ptx_nll"] < texts[0]
    assert "reward" not in rows[0] or rows[0]["reward"] == 0


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"reference.mode": "cached"}, "whole distributions"),
        ({"reference.sync_every_steps": 2}, r"family \('qwen3', 'llama'\), .* of its kind"),
        ({"max_length": 500, "model.config.max_position_embeddings": 512}, "has 256 positions"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(teacher, keys, words):
    with pytest.raises(ValueError, match=words):
        setup.resolve_config(configs.read(student(teacher, **keys)), 1)


def test_a_teacher_with_another_tokenizer_is_refused(teacher, tmp_path):
    config = student(teacher)
    for token, folder in (("<|new|>", "tokenizer"), ("<|old|>", "teacher")):
        other = byte_tokenizer()
        other.add_tokens([token])
        other.save_pretrained(tmp_path / folder)
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "teacher" / file).symlink_to(pathlib.Path(teacher) / file)
    config.tokenizer = str(tmp_path / "tokenizer")
    config.reference.path = str(tmp_path / "teacher")
    config.model.config.vocab_size = 288
    with pytest.raises(ValueError, match=r"another tokenizer.*'<\|old\|>'"):
        setup.resolve_config(configs.read(config), 1)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(teacher, tmp_path):
    keys = {"model.path": teacher, "objective.beta": 0.3, **FEW}
    run = setup.prepare(configs.read(student(teacher, **keys)), str(tmp_path))
    spec, specs, mesh = run.step_spec, run.state_specs, run.mesh
    with jax.set_mesh(mesh):
        frozen = weights.load_frozen(spec, specs, run.config)
        state = steps.init_state(spec, weights.load_trained(spec, specs, frozen, run.config))
        batch = put_batch(mesh, run.train.batch(0))
        found = partitioning.jit_eval_step(spec, mesh)(state, frozen, batch)
    total, weight = found["divergence"]
    np.testing.assert_allclose(total / weight, 0.0, atol=1e-5)
    assert weight > 0


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("rpo", {}, r"none of the \d+ pairs has a margin"),
        ("bco", {"density_ratio": True}, r"none of the \d+ examples has one; give a column weight"),
    ],
)
def test_an_objective_of_a_column_refuses_rows_without(name, options, words, tmp_path):
    config = tiny(name)
    config.data.train += "?size=16"
    config.data.columns = {}
    config.objective.update(options)
    with pytest.raises(ValueError, match=words):
        setup.prepare(configs.read(config), str(tmp_path))


def test_a_guide_is_read_as_a_cached_reference_is(teacher, tmp_path):
    """tgdpo's token rewards are of reference.guide, whatever the reference is."""
    found = {}
    for key, more in (("guide", {}), ("path", {"reference.mode": "cached"})):
        config = tiny("tgdpo")
        config.model.config.update(num_hidden_layers=1, hidden_size=32, intermediate_size=32)
        keys = {"data.train": "builtin:preferences:train?size=16", "batch_size": 8}
        keys |= {"data.eval_fraction": 0.0, "data.layout": "plain", f"reference.{key}": teacher}
        config.update_from_flattened_dict(keys | more)
        run = setup.prepare(configs.read(config), str(tmp_path / key))
        with jax.set_mesh(run.mesh):
            found[key] = make_source(run, 0, {}).next(lambda: None)
    given = found["guide"].guide_token_logps
    assert found["guide"].reference_token_logps is None and (given < 0).any()
    np.testing.assert_allclose(given, found["path"].reference_token_logps, rtol=1e-6)
    assert not np.allclose(given, found["path"].guide_token_logps)  # the starting weights
