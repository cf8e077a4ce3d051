# SPDX-License-Identifier: Apache-2.0
"""Every key of the config, and every option of every objective, with values that it may not have;
two at a time."""

import dataclasses
import math

import hypothesis
import junk
from hypothesis import strategies as st
from ml_collections import ConfigDict
from oracle import Wrong, fuzzed, judge

# read here, for its first use takes seconds, which are no key's
from transformers import AutoTokenizer  # noqa: F401

from align_jax import config as program
from align_jax import losses
from align_jax.core import config as configs
from align_jax.runs import setup

MODEL = dict(
    vocab_size=272, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
)  # fmt: skip
KEYS = [
    key.name for key in program.keys(configs.defaults()) if not key.name.startswith("objective.")
]
NAMES = sorted(losses.OBJECTIVES)


def good():
    config = configs.defaults()
    config.total_steps, config.batch_size, config.max_length = 2, 8, 64
    config.data.train, config.tokenizer = "builtin:preferences:train?size=64", "byte"
    with config.unlocked():
        config.model.config = ConfigDict(MODEL)
    return config


def put(config, name, value):
    """Set a key whatever its type, as a config file can."""
    *groups, last = name.split(".")
    for group in groups:
        config = config[group]
    with config.unlocked(), config.ignore_type():
        config[last] = value


def check(changes, options):
    """Raise Wrong where a number that is none, or another kind of value, has been taken."""
    for name, value in changes.items():
        found = options
        for part in name.split("."):
            if dataclasses.is_dataclass(found) and not hasattr(found, part):
                found = found.options
            found = getattr(found, part) if dataclasses.is_dataclass(found) else found[part]
        if isinstance(value, float) and not math.isfinite(value):
            raise Wrong(f"{name} = {value} is taken")
        if type(found) in (bool, int, str) and type(value) is not type(found):
            raise Wrong(f"{name} = {value!r} became {found!r}")
        if value is None and found is not None:
            raise Wrong(f"{name} = None became {found!r}")


def pass_border(changes):
    config = good()
    for name, value in changes.items():
        put(config, name, value)
    options = configs.read(config)
    setup.resolve_config(options, 8)
    return options


@fuzzed(short=40, share=3)
@hypothesis.given(
    changes=st.dictionaries(st.sampled_from(KEYS), junk.values, min_size=1, max_size=2)
)
def test_each_key_is_checked_and_named(changes):
    changes = {name: value for name, value in changes.items() if fits(value)}
    judge(
        "config keys",
        changes,
        lambda: pass_border(changes),
        # or the path that is no model's
        names=[
            *changes,
            *(name.rpartition(".")[2] for name in changes),
            *(repr(value)[:60] for value in changes.values() if isinstance(value, str)),
        ],
        check=lambda options: check(changes, options),
    )


def fits(value):
    """Whether a ConfigDict can hold a value at all."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and "." not in key for key in value)
    return not isinstance(value, int) or abs(value) < 10**300


@st.composite
def objectives(draw):
    name = draw(st.sampled_from(NAMES))
    own = sorted(losses.describe_options(name))
    count = draw(st.integers(1, 2))
    keys = [draw(st.sampled_from([*own, "betta", "name", "weights"])) for _ in range(count)]
    return {"objective.name": name} | {f"objective.{key}": draw(junk.values) for key in keys}


@fuzzed(short=40, share=2)
@hypothesis.given(changes=objectives())
def test_each_objective_s_options_are_checked_and_named(changes):
    def act():
        config = good()
        for name, value in changes.items():
            put(config, name, value)
        options = configs.read(config)
        setup.objective_terms(options)
        return options

    judge(
        "objectives' options",
        changes,
        act,
        names=["objective", *changes, *(name.rpartition(".")[2] for name in changes)],
        check=lambda options: check(changes, options),
    )
