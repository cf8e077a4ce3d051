# SPDX-License-Identifier: Apache-2.0
"""The README's links, programs, configs and keys exist."""

import functools
import operator
import pathlib
import re

import pytest

from align_jax import losses
from align_jax.core import config as configs

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TEXT = README + (ROOT / "docs/coming_from.md").read_text()  # whose links the site's build checks


@pytest.mark.parametrize(
    "target",
    sorted(
        set(re.findall(r"\]\(([^)#:]+)\)", README))
        | set(re.findall(r"(?:configs|launch|docs)/[\w./]+\w", README))
    ),
)
def test_what_the_readme_points_to_exists(target):
    assert (ROOT / target).exists()


@pytest.mark.parametrize(
    "program",
    sorted(
        set(
            re.findall(
                r"(?:python -m align_jax\.|`align-jax |^align-jax )(\w+)", TEXT, re.MULTILINE
            )
        )
    ),
)
def test_a_program_that_the_readme_names_exists(program):
    assert "__main__" in (ROOT / "align_jax" / f"{program}.py").read_text()


@pytest.mark.parametrize(
    "key",
    sorted(
        set(
            re.findall(
                r"`((?:model|reference|data|optimizer|mesh|checkpoint|eval|log|rollout)\.[a-z_.]+\w)`",
                TEXT,
            )
        )
    ),
)
def test_a_config_key_that_the_readme_names_exists(key):
    modules = (
        "data.sources",
        "data.formats",
        "data.datasets",
        "data.chat",
        "data.truncation",
        "data.packing",
        "data.layout",
        "data.pipeline",
    )
    if key not in modules:
        functools.reduce(operator.getitem, key.split("."), configs.defaults())


@pytest.mark.parametrize(
    "option", sorted(set(re.findall(r"`objective\.([a-z_]+)`", TEXT)) - {"name", "weights"})
)
def test_an_objective_s_option_that_the_readme_names_exists(option):
    assert any(option in row.options for row in losses.OBJECTIVES.values())
