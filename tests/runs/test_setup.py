# SPDX-License-Identifier: Apache-2.0
"""Keys that do not go together, or do nothing, are refused by name before anything is read."""

import importlib.util
import json
import pathlib

import pytest

from align_jax import plan
from align_jax.core import config as configs
from align_jax.runs import config_file, setup

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def test_types_are_the_platforms_and_then_those_of_the_first_start(tmp_path):
    given = {"model": {"path": "somewhere"}, "data": {"train": "pairs.jsonl"}, "total_steps": 1}
    config = configs.read(configs.from_dict(given))
    here = setup.as_first_started(config, str(tmp_path))
    assert (here.model.compute_dtype, here.reference.dtype) == ("float32", "float32")
    planned = plan.for_planning(config)
    assert (planned.model.compute_dtype, planned.reference.dtype) == ("bfloat16", "bfloat16")
    elsewhere = {"model": {"compute_dtype": "bfloat16"}, "reference": {"dtype": "bfloat16"}}
    record = {"config": elsewhere, "versions": {}}
    (tmp_path / "config.json").write_text(json.dumps(record))
    resumed = setup.as_first_started(config, str(tmp_path))
    assert (resumed.model.compute_dtype, resumed.reference.dtype) == ("bfloat16", "bfloat16")


def resolve(name, **keys):
    spec = importlib.util.spec_from_file_location("tiny", CONFIGS / "tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(name)
    config.update_from_flattened_dict(keys)
    return setup.resolve_config(configs.read(config), 1)


@pytest.mark.parametrize(
    "name, keys, words",
    [
        ("online_dpo", {"reference.mode": "cached"}, "an online run trains on new samples"),
        ("ppo", {"reference.mode": "cached"}, "use in_graph"),
        ("simpo", {"reference.sync_every_steps": 2}, "compares with no reference"),
        ("grpo", {"reference.path": "other"}, "compares with no reference"),
        (
            "dpo",
            {"reference.path": "other", "reference.sync_every_steps": 2, "model.lora.rank": 2},
            "cannot be where a moving reference starts",
        ),
        ("ppo", {"objective.ptx_coef": 0.5}, "name a source"),
        ("ppo", {"data.text": "builtin:completions:train"}, "set config.objective.ptx_coef"),
        ("dpo", {"reference.guide": "other"}, "tgdpo does"),
        ("online_tgdpo", {}, "of a fixed data set"),
        ("grpo", {"rollout.responses_per_prompt": 1}, "must be at least 2"),
        ("grpo", {"rollout.stop_kl": 0.1}, "with one pass there are none"),
        ("dpo", {"model.load_balancing": 0.1}, "no mixture of experts"),
        ("dpo", {"model.value_head": "value_mlp"}, "needs no values"),
        ("grpo", {"model.value_warmup_steps": 3}, "value_warmup_steps = 3 has no effect"),
        ("grpo", {"model.value_path": "rm"}, "value_path = 'rm' has no effect"),
        (
            "ppo",
            {"model.value_path": "rm", "model.value_head": "value_mlp"},
            "set model.value_head = 'value'",
        ),
        ("ppo", {"model.freeze": ("embed", "^value")}, r"freeze = '\^value' holds the value head"),
        ("ppo", {"model.value_path": "/no/such"}, "no model folder at '/no/such'"),
        ("dpo", {"model.lora.dora": True}, "no effect without an adapter"),
        ("dpo", {"reference.mix": 0.5}, "does not move"),
        ("ppo", {"data.text_share": 0.5}, "no effect without data.text"),
        ("dpo", {"data.labels": "balanced"}, "trains on pairs, not on labels"),
        ("online_kto", {"data.frac_unique_desirable": 0.5}, "trains on samples"),
        (
            "kto",
            {"data.labels": "balanced", "data.frac_unique_undesirable": 0.5},
            "would undo the imbalance",
        ),
        ("kto", {"data.frac_unique_desirable": 0.0}, "frac_unique_desirable = 0"),
        (
            "dpo",
            {"data.threshold": "3"},
            "threshold = '3' has no effect: .* trains on pairs, not on l",
        ),
        ("kto", {"data.pairing": "all"}, "pairing = 'all' has no effect: .* not on pairs, as dpo"),
        ("grpo", {"data.min_difference": 0.5}, "trains on samples, not on pairs"),
        (
            "online_dpo",
            {"rollout.pairing": "random", "rollout.responses_per_prompt": 2},
            "no effect on 2 responses of a prompt",
        ),
        ("dpo", {"data.responses": 2}, "not on rankings, as reward_ranked does"),
        ("dpo", {"data.step_separator": ""}, "not on labeled steps, as reward_process does"),
        (
            "dpo",
            {"rollout.temperature": 0.5, "rollout.server.timeout_seconds": 1.0},
            r"rollout.server.timeout_seconds, config.rollout.temperature: no effect",
        ),
        ("dpo", {"reference.cache": "kept"}, "nothing of the reference is kept"),
        ("ppo", {"objective.kl_coef": 0.0, "objective.kl_target": 6.0}, "has no effect"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(name, keys, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        resolve(name, **keys)


@pytest.mark.parametrize("platform, chunk", [("cpu", 128), ("gpu", 512), ("tpu", 128)])
def test_a_gpu_takes_more_positions_of_the_head_at_once(monkeypatch, platform, chunk):
    config = configs.read(config_file.load("tiny:sft"))
    resolved = setup.resolve_config(config, 1)
    monkeypatch.setattr(setup.jax, "default_backend", lambda: platform)
    assert setup.make_step_spec(config, resolved, 1).chunk == chunk


LATE = [
    ({"debug.profile_steps": (40, 50)}, "debug.profile_steps: step 40 never comes: the run has 30"),
    ({"debug.memory_profile_step": 31}, "memory_profile_step: step 31 never comes"),
    ({"reference.sync_every_steps": 31}, "sync_every_steps: step 31 never comes"),
    (
        {"total_steps": 0, "total_epochs": 1e12},
        "total_epochs = 1e.12 are .* steps: expected at most",
    ),
    (
        {"checkpoint.best_metric": "eval/loss", "data.train": "builtin:completions:train?size=16"}
        | {"data.eval_fraction": 0.0, "objective": {"name": "sft"}},
        "nothing is held out to measure it on",
    ),
    ({"eval.stop_metric": "eval/loss", "eval.every_steps": 1}, "smaller is better .* '-eval/loss'"),
    (
        {"checkpoint.best_metric": "eval/loss", "eval.every_steps": 1},
        "config.checkpoint.best_metric = 'eval/loss': smaller is better there",
    ),
    (
        {"checkpoint.best_metric": "-eval/rewards/accuracies", "eval.every_steps": 1},
        "greater is better there: write 'eval/rewards/accuracies'",
    ),
    ({"data.date": "2026-01-31"}, "data.date = '2026-01-31' has no effect"),
]


@pytest.mark.parametrize("keys, words", LATE)
def test_steps_that_never_come_and_metrics_that_nothing_gives_are_refused(tmp_path, keys, words):
    few = {"data.train": "builtin:preferences:train?size=16", "batch_size": 8}
    config = config_file.changed(config_file.load("tiny:dpo"), **{**few, **keys})
    with pytest.raises(ValueError, match=words):
        setup.prepare(configs.read(config), str(tmp_path / "run"))
