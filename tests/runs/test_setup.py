# SPDX-License-Identifier: Apache-2.0
"""Keys that do not go together, or do nothing, are refused by name before anything is read."""

import importlib.util
import pathlib

import pytest

from align_jax.core import config as configs
from align_jax.runs import setup

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


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
        ("ppo", {"objective.kl_coef": 0.0, "objective.kl_target": 6.0}, "has no effect"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(name, keys, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        resolve(name, **keys)
