# SPDX-License-Identifier: Apache-2.0
"""What ``python -m align_jax.config`` prints: every key, and what each means."""

import dataclasses
import importlib
import pathlib
import runpy

import pytest

from align_jax import config as program
from align_jax import losses
from align_jax.core import config as configs
from align_jax.core import options
from align_jax.runs import early

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def dotted(group, prefix=""):
    for name, value in group.items():
        if hasattr(value, "items") and value:
            yield from dotted(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_every_key_is_printed_once_with_its_meaning():
    found = program.keys(configs.defaults())
    names = [key.name for key in found]
    assert len(names) == len(set(names)) and all(key.meaning for key in found)
    own = {f"objective.{name}" for name in losses.describe_options("dpo")}
    assert set(names) == set(dotted(configs.defaults())) | own


def test_the_names_that_are_read_from_a_tables_file_are_the_tables():
    groups = [one for one in vars(options).values() if hasattr(one, "__dataclass_fields__")]
    tables = [
        field.metadata.get("table", "") for one in groups for field in dataclasses.fields(one)
    ]
    tables = [*filter(None, tables), *early.ALSO.values()]
    for module, name in (table.split(":") for table in tables):
        imported = getattr(importlib.import_module(module), name)
        assert early.names_in(f"{module}:{name}") == tuple(sorted(imported)), name
    assert len(tables) > 8


def test_a_changed_value_stands_beside_its_default():
    config = runpy.run_path(str(CONFIGS / "tiny.py"))["get_config"]("ipo")
    config.objective.beta = 0.25
    found = {key.name: key for key in program.keys(config)}
    assert (found["objective.beta"].value, found["objective.beta"].default) == (0.25, 0.1)
    text = program.table(program.select(list(found.values()), ["objective", "optimizer.schedule"]))
    assert "objective.beta" in text and "0.25 per nat (default 0.1)" in text
    assert "optimizer.schedule" in text and "'cosine', 'linear'" in text
    assert "optimizer.b1" not in text


def test_an_unknown_group_is_told_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'optimizer'"):
        program.select(program.keys(configs.defaults()), ["optimiser"])
