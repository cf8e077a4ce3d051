# SPDX-License-Identifier: Apache-2.0
import typing
from collections.abc import Mapping
from typing import Any

import pytest

from align_jax.core import config as configs
from align_jax.core.options import Checked, Config


def of(config, group):
    """Return the group of a dotted name."""
    for part in filter(None, group.split(".")):
        config = config[part]
    return config


def good():
    config = configs.defaults()
    config.total_steps, config.data.train, config.model.path = (
        10,
        "builtin:preferences:train",
        "somewhere",
    )
    config.data.layout = "plain"
    return config


def test_a_complete_config_is_valid():
    configs.read(good())


def test_a_misspelled_key_is_an_error():
    with pytest.raises((AttributeError, KeyError), match="learning_rte|optimizer"):
        good().optimizer.learning_rte = 1.0


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("total_epochs", 1.0, "exactly one must be positive"),
        ("total_steps", 0, "exactly one must be positive"),
        ("data.train", "", "data.train is empty"),
        ("microbatches", 3, "not divisible by microbatches"),
        ("row_length", 2048, "belong to data.layout"),
        ("model.path", "", "model.config"),
        ("model.quantize", "int8", "needs model.lora.rank"),
        ("model.quantize", "int4", "expected one of"),
        ("reference.mix", 1.5, "at most 1"),
        ("optimizer.learning_rate", -1.0, "more than 0"),
        ("optimizer.warmup_fraction", 1.5, "at most 1"),
        ("debug.profile_steps", (1,), "expected (first, last)"),
        ("debug.profile_steps", (3, 2), "debug.profile_steps = (3, 2): expected 1 <= first"),
        ("debug.profile_steps", (0, 2), "debug.profile_steps = (0, 2): expected 1 <= first"),
        ("debug.memory_profile_step", 0, "debug.memory_profile_step = 0: steps count from 1"),
        ("model.lora", None, "model.lora = None: expected its keys, rank, alpha"),
        ("optimizer", None, "optimizer = None: expected its keys, name, learning_rate"),
        ("log.every_steps", 0, "log.every_steps = 0: expected at least 1"),
        ("seed", -1, "seed = -1: expected at least 0"),
        ("total_steps", 2**31, "total_steps = 2147483648: expected at most 2147483647"),
        ("total_examples", 63, "total_examples"),
        ("model.freeze", ("embed", "("), "model.freeze = '(': no regular expression: missing )"),
        ("model.lora.targets", "*", "model.lora.targets = '*': no regular expression"),
        ("model.lora.alpha", 0.0, "model.lora.alpha = 0.0: expected more than 0"),
        ("reference.family", "qwen2", "family = 'qwen2' has no effect without reference.config"),
        ("reference.mix", 0.0, "reference.mix = 0.0: expected more than 0"),
        ("data.eval_fraction", 1.0, "data.eval_fraction = 1.0: expected less than 1"),
        ("data.groups_per_row", 1e9, "expected at most 4096"),
        ("data.prefetch", 10**9, "expected at most 1024"),
        ("objective.weights", (1.0, 0.0), "objective.weights = (1.0, 0.0): expected numbers above"),
        ("optimizer.final_fraction", 2.0, "expected at most 1"),
        ("optimizer.eps", 0.0, "optimizer.eps = 0.0: expected more than 0"),
        ("checkpoint.local_every_steps", 7, "no effect without checkpoint.local"),
        ("rollout.threshold", "media", "threshold = 'media': expected a number, 'mean'"),
        ("data.train", None, "data.train = None: expected a text"),
        ("batch_size", None, "batch_size = None: expected an integer"),
        ("optimizer.b1", None, "optimizer.b1 = None: expected a number"),
    ],
)
def test_a_mistake_is_found_and_named(key, value, said):
    config = good()
    group, _, name = key.rpartition(".")
    setattr(of(config, group), name, value)
    with pytest.raises(ValueError, match="config has mistakes") as error:
        configs.read(config)
    assert said in str(error.value)


# a value, and the types of keys of which some take it
TAKEN = [
    (None, ()),
    (float("nan"), ()),
    (float("-inf"), ()),
    (-1, (int, float)),
    (2**31, (float,)),
    (1.5, (float,)),
    ("", (str,)),
    (("a",), (tuple[str, ...],)),
    (((),), ()),
    ({"a": 1}, (Mapping[str, Any],)),
]
BELOW_ZERO = {"rollout.missing_eos_penalty", "debug.memory_profile_step"}
BELOW_ZERO |= {f"mesh.{axis}" for axis in ("data", "fsdp", "expert", "sequence", "tensor")}


def keys(kind=Config, prefix=""):
    """Return each key with its type."""
    for name, type_of in typing.get_type_hints(kind).items():
        if isinstance(type_of, type) and issubclass(type_of, Checked):
            yield from keys(type_of, f"{prefix}{name}.")
        elif prefix + name != "objective.options":
            yield prefix + name, type_of


@pytest.mark.parametrize("value, types", TAKEN)
def test_each_key_takes_a_value_of_its_type_and_range_or_names_itself(value, types):
    config = good()
    for key, _ in keys():
        group, _, name = key.rpartition(".")
        with config.ignore_type():
            setattr(of(config, group), name, value)
    with pytest.raises(ValueError) as error:
        configs.parse(config)
    taken = {key for key, _ in keys() if f"  config.{key} = " not in str(error.value)}
    own = {key for key, type_of in keys() if type_of in types}
    assert taken <= own and bool(taken) == bool(types)
    assert value != -1 or taken == BELOW_ZERO


def test_all_mistakes_are_told_at_once():
    config = good()
    config.batch_size, config.reference.dtype = 0, "float8"
    with pytest.raises(ValueError) as error:
        configs.read(config)
    assert "batch_size = 0" in str(error.value) and "reference.dtype = 'float8'" in str(error.value)


@pytest.mark.parametrize(
    "total, expected",
    [(("total_steps", 7), 7), (("total_epochs", 2.5), 25), (("total_examples", 320), 5)],
)
def test_the_run_s_length_is_resolved_by_one_function(total, expected):
    config = good()
    config.total_steps = 0
    setattr(config, *total)
    assert configs.read(config).total_steps_of(steps_per_epoch=10) == expected


def test_a_saved_config_comes_back_equal():
    config = good()
    config.model.freeze = ("embed", "layers/attention")
    with config.unlocked():
        config.objective.beta = 0.3
    again = configs.from_dict(__import__("json").loads(config.to_json_best_effort()))
    assert again == config


def test_a_dict_of_texts_holds_texts():
    config = good()
    with config.unlocked():
        config.data.roles, config.data.columns = {"bot": 1}, {"prompt": ["q"]}
    with pytest.raises(ValueError) as error:
        configs.read(config)
    for key in ("data.roles", "data.columns"):
        assert f"config.{key} = " in str(error.value)
    assert str(error.value).count("expected a dict of texts") == 2
