# SPDX-License-Identifier: Apache-2.0
import pytest

from align_jax.core import config as configs


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
        ("optimizer.learning_rate", -1.0, "at least 0"),
        ("optimizer.warmup_fraction", 1.5, "at most 1"),
        ("debug.profile_steps", (1,), "expected (first, last)"),
        ("debug.profile_steps", (3, 2), "debug.profile_steps = (3, 2): expected 1 <= first"),
        ("debug.profile_steps", (0, 2), "debug.profile_steps = (0, 2): expected 1 <= first"),
        ("debug.memory_profile_step", 0, "debug.memory_profile_step = 0: steps count from 1"),
        ("model.lora", None, "model.lora = None: expected its keys, rank, alpha"),
        ("optimizer", None, "optimizer = None: expected its keys, name, learning_rate"),
        ("log.every_steps", 0, "log.every_steps = 0: expected at least 1"),
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
