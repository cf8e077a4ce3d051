# SPDX-License-Identifier: Apache-2.0
"""A config as YAML: the same keys as in a Python file, mistakes with their line."""

import pathlib
import runpy
import sys

import pytest

from align_jax.core import config as configs
from align_jax.runs.config_file import ConfigFile, ConfigMistake, changed, load

TINY = pathlib.Path(__file__).parents[2] / "configs" / "tiny.py"
GOOD = """# as configs/tiny.py:ipo, with a few keys changed
seed: 3
total_steps: 7
batch_size: 8
model:
  config: {hidden_size: 32, num_hidden_layers: 1}
  compute_dtype: float32
  freeze: [embed]
data:
  train: pairs.jsonl
  columns: {chosen: good}
objective:
  beta: 1
  name: ipo
optimizer:
  learning_rate: 1e-4
  b2: .95
rewards: {regex: {pattern: "[a-z]"}}
"""


def read(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return load(str(path))


def test_yaml_is_read_as_a_python_file_is(tmp_path):
    config = configs.read(read(tmp_path, GOOD))
    made = configs.defaults().unlock()
    made.update(runpy.run_path(str(TINY))["get_config"]("ipo"))
    assert (config.seed, config.total_steps, config.optimizer.learning_rate) == (3, 7, 1e-4)
    assert config.objective.options == {**configs.read(made).objective.options, "beta": 1}
    assert config.model.freeze == ("embed",) and config.optimizer.b2 == 0.95
    assert dict(config.model.config) == {"hidden_size": 32, "num_hidden_layers": 1}
    assert dict(config.data.columns) == {"chosen": "good"} and "regex" in config.rewards
    assert configs.defaults() == read(tmp_path, "")


def test_a_length_that_is_given_takes_the_place_of_the_recipes_in_another_unit(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--config=dpo", "--config.total_steps=3"])
    read_back = ConfigFile().parse("dpo")  # absl sets what the command line gives afterwards
    assert (read_back.total_epochs, read_back.total_steps) == (0.0, 0)
    assert load("dpo").total_epochs == 1.0
    start = load("tiny:dpo")
    assert (start.total_steps, start.total_epochs) == (30, 0.0)
    given = configs.read(changed(start, total_epochs=2.0, seed=1))
    assert (given.total_steps, given.total_epochs) == (0, 2.0)
    with pytest.raises(ValueError, match="exactly one must be positive"):
        configs.read(changed(start, total_steps=3, total_epochs=1.0))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "seed: 1\noptimizer:\n  learning_rte: 1\n",
            ":3: .*'optimizer.learning_rte'; did you mean",
        ),
        ("learning_rate: 1\n", ":1: .*did you mean 'config.optimizer.learning_rate'"),
        ("optimizer:\n  b1: 2\n", r":2: config.optimizer.b1 = 2.0: expected less than 1"),
        ("\nseed: x\nbatch_size: 1.5\n", r":2: .*an integer\n.*:3: config.batch_size = 1.5: exp"),
        ("seed: 1\nbatch_size: 2\nseed: 2\n", ":3: seed stands on line 1, too"),
        ("optimizer: adam\n", ":1: config.optimizer is a group of keys.*'adam'"),
        ("- a\n- b\n", ":1: expected a mapping"),
        ("a: [1\n", ":2: no YAML: "),
        ("objective:\n  name: dp0\n", ":2: .*did you mean 'dpo'"),
        ("objective:\n  name: ipo\n  bta: 1\n", ":3: .*did you mean 'beta'"),
        ("seed: !!python/object/apply:os.system ['true']\n", ":1: no YAML: could not determine"),
        ("model:\n  path: null\n", ":2: config.model.path = None: expected a text"),
        ("seed: 1\n---\nseed: 2\n", "no YAML: but found another document"),
    ],
)
def test_a_mistake_is_told_with_its_line(text, said, tmp_path):
    with pytest.raises(ConfigMistake, match=f"config.yaml{said}" if said[0] in ":(" else said):
        read(tmp_path, text)


def test_an_argument_and_a_missing_file_are_refused(tmp_path):
    (tmp_path / "dpo.yaml").write_text("seed: 1\n")
    with pytest.raises(ConfigMistake, match="takes no argument"):
        load(f"{tmp_path}/dpo.yaml:dpo")
    with pytest.raises(ConfigMistake, match="did you mean '.*dpo.yaml'"):
        load(str(tmp_path / "dpp.yaml"))


@pytest.mark.parametrize("value, said", [("yes", "True: expected a number"), ("1" * 400, "finite")])
def test_what_would_become_a_number_is_refused(tmp_path, value, said):
    with pytest.raises(ConfigMistake, match=rf"yaml:2: config.optimizer.learning_rate.*{said}"):
        read(tmp_path, f"optimizer:\n  learning_rate: {value}\n")


def test_a_checkpoint_takes_the_place_of_a_recipes_random_model(monkeypatch):
    own, path = "--config.model.config.hidden_size=8", "--config.model.path=m"

    def parse(*words):
        monkeypatch.setattr(sys, "argv", ["train", "--config=tiny", *words])
        return ConfigFile().parse("tiny").model

    for words in ([own, path], [path, "--config.model.family=gpt2"]):
        with pytest.raises(ConfigMistake, match="model.path = 'm' names a checkpoint"):
            parse(*words)
    with pytest.raises(ConfigMistake, match="model.config.hidden_size has no effect"):
        changed(load("tiny"), model={"path": "m", "config": {"hidden_size": 8}})
    assert parse(own).config and not parse(path).config
    assert not changed(load("tiny"), **{"model.path": "m"}).model.config
