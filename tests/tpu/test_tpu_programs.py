# SPDX-License-Identifier: Apache-2.0
"""What a run compiles beside its train step, planned for TPUs that are not there."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import runpy

import pytest
from ml_collections import ConfigDict

pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu")

from align_jax import plan
from align_jax.core.options import Config
from align_jax.planner.advice import advise
from align_jax.planner.cost_model import estimate, tree_bytes
from align_jax.planner.programs import lowered_programs, other_programs
from align_jax.planner.topology import describe_topology

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
MODEL = dict(
    vocab_size=1536,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)


def _config(objective: str, rewards=None, **changes) -> Config:
    config = runpy.run_path(str(CONFIGS / "tiny.py"))["get_config"](objective)
    config.model.config, config.model.compute_dtype, config.batch_size = (
        ConfigDict(MODEL),
        "bfloat16",
        8,
    )
    for key, value in changes.items():
        group, name = key.split("__")
        config[group][name] = value
    if rewards:
        config.rewards = ConfigDict(rewards)
    return plan.for_planning(config)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "config.json").write_text(
        json.dumps(dict(MODEL, model_type="llama", hidden_size=512))
    )
    return str(folder)


def _online(reward_model: str, tensor: int):
    topology = describe_topology("v5e:2x2")
    rewards = {
        "model": {"path": reward_model, "rows": 8, "max_length": 64, "compute_dtype": "bfloat16"}
    }
    config = _config("ppo", rewards, rollout__rows=32, rollout__tensor=tensor)
    run = plan.make_run(config, topology)
    return topology, run, {program.name: program for program in other_programs(run)}


def test_an_online_run_samples_scores_and_rescores_beside_all_that_it_holds(reward_model):
    topology, run, programs = _online(reward_model, 2)
    assert list(programs) == ["prefill", "decode", "reward model", "rescore", "rescore reference"]
    assert not run.rewards["model"].note  # its own config was read: twice as wide as the policy
    for program in programs.values():
        assert {"parameters", "optimizer", "reference", "rewards"} <= program.resident.keys()
    # bfloat16, half of each on two of four devices
    weights = tree_bytes(programs["decode"].resident["generation"])
    assert weights == pytest.approx(4 * tree_bytes(run.specs.trained) / 2 / 2, rel=0.02)
    assert {name: program.runs for name, program in programs.items()} == {
        "prefill": 1,
        "decode": 16,
        "reward model": 4,
        "rescore": 1,
        "rescore reference": 1,
    }
    found = estimate(programs["decode"], topology, run.mesh)
    assert found.fits and dict(found.mesh)["tensor"] == 2
    assert found.memory.kinds["cache"] > 0 and found.memory.kinds["generation"] == weights
    assert found.received < 0.1 * weights, found.collectives  # the weights stay where they are
    assert advise(found, run.config, run.rows_a_device) == []
    gathering = dataclasses.replace(found, mesh={**found.mesh, "fsdp": 4})
    assert "config.rollout.tensor" in advise(gathering, run.config, run.rows_a_device)[0]


def test_generation_as_training_lies_gathers_weights_for_every_token(reward_model):
    _, run, programs = _online(reward_model, 0)
    assert "generation" not in programs["decode"].resident
    weights = tree_bytes(run.specs.trained) / 2  # a quarter of each, in bfloat16
    assert programs["decode"].lower_bound["fsdp"] == pytest.approx(3 * weights, rel=0.02)


@pytest.mark.parametrize("name, models", [("xpo", 1), ("nash_md", 2)])
def test_what_the_samples_meet_is_sampled_and_scored_too(reward_model, name, models):
    rewards = {"model": {"path": reward_model, "rows": 8, "max_length": 64}}
    config = _config(name, rewards, rollout__rows=32)
    run = plan.make_run(config, describe_topology("v5e:2x2"))
    programs = {program.name: program for program in other_programs(run)}
    names = ["prefill", "decode", "prefill opponent", "decode opponent", "reward model"]
    assert list(programs) == names
    own, other = programs["decode"], programs["decode opponent"]
    assert other.flops.policy == pytest.approx(models * own.flops.policy, rel=1e-6)
    assert other.lower_bound["fsdp"] == pytest.approx(models * own.lower_bound["fsdp"], rel=1e-3)
    samples = run.rollouts.samples
    assert programs["reward model"].runs == 2 * samples // 8 and own.runs == other.runs


@pytest.mark.parametrize(
    "name, keys, runs",
    [  # of 8 prompts, four samples each where nothing else is said, in calls of 8 rows
        ("grpo", {"objective__advantages": "greedy"}, [4, 64, 1, 16, 5]),
        (
            "reinforce",
            {"objective__advantages": "greedy", "rollout__responses_per_prompt": 1},
            [2, 32, 2],
        ),
        ("gkd", {"objective__on_policy": 0.5, "rollout__responses_per_prompt": 1}, [1, 16]),
        (
            "gkd",
            {"objective__seq_kd": True, "rollout__responses_per_prompt": 1, "rollout__rows": 4},
            [2, 32],
        ),
        ("minillm", {}, [4, 64]),
    ],
)
def test_a_greedy_sample_a_prompt_counts_and_answers_of_the_data_do_not(
    reward_model, name, keys, runs
):
    learns_rewards = "advantages" in str(keys)
    rewards = {"model": {"path": reward_model, "rows": 8, "max_length": 64}}
    keys = {"rollout__responses_per_prompt": 4, "rollout__prompts": 8, "rollout__rows": 8} | keys
    player = " teacher" if "objective__seq_kd" in keys else ""
    config = _config(name, rewards if learns_rewards else None, rollout__max_new_tokens=16, **keys)
    run = plan.make_run(config, describe_topology("v5e:2x2"))
    programs = {program.name: program.runs for program in other_programs(run)}
    names = [f"prefill{player}", f"decode{player}"] + ["prefill greedy", "decode greedy"] * (
        len(runs) == 5
    )
    names += ["reward model"] * learns_rewards
    assert [name for name in programs if "rescore" not in name] == names
    assert [programs[name] for name in names] == runs


def test_a_cached_reference_is_computed_by_a_program_of_its_own():
    config = _config("dpo", reference__mode="cached")
    run = plan.make_run(config, describe_topology("v5e:2x2"))
    programs = {program.name: program for program in other_programs(run)}
    assert list(programs) == ["eval", "reference"]
    assert (
        tree_bytes(programs["eval"].resident["reference"])
        == 0
        < tree_bytes(programs["reference"].resident["reference"])
    )
    assert programs["reference"].flops.policy == programs["eval"].flops.reference == 0
    assert programs["reference"].flops.model == pytest.approx(programs["eval"].flops.policy)


def test_a_reward_model_that_cannot_be_read_is_said_to_be_assumed():
    config = _config("ppo", {"model": {"path": "./nowhere", "rows": 8}}, rollout__tensor=2)
    run = plan.make_run(config, describe_topology("v5e:2x2"))
    assert (
        "./nowhere cannot be read here: taken to be of the policy's shape"
        in run.rewards["model"].note
    )


def test_a_program_that_the_run_has_not_is_an_error():
    run = plan.make_run(_config("dpo"), describe_topology("v5e:2x2"))
    with pytest.raises(ValueError, match=r"this run has no \['prefill'\]; it has train, eval"):
        lowered_programs(run, ["prefill"])
