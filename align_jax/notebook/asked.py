# SPDX-License-Identifier: Apache-2.0
"""What a user asks for, as a config and sources."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from align_jax import inspect
from align_jax.core import config as configs
from align_jax.core.config import ConfigDict
from align_jax.core.options import Config
from align_jax.data.given import given
from align_jax.data.sources import Source
from align_jax.notebook.mistakes import told
from align_jax.runs import config_file
from align_jax.runs.config_file import ConfigMistake
from align_jax.runs.inspection import Inspection

AnyConfig: TypeAlias = Any  # a name, a ConfigDict, a Config, or nested dicts of keys


class Asked(NamedTuple):
    """A run that was asked for: its config, and the rows from Python that names in it stand for."""

    config: Config
    given: Mapping[str, Source]


@told
def recipe(name: str = "dpo") -> ConfigDict:
    """Return a recipe's config, to be looked at and changed.

    Args:
        name: a recipe (``"dpo_7b"``, ``"tiny:dpo"``), an objective (``"kto"``: the recipe
            ``start``, an adapter for your model and data), or a config file.

    Raises:
        ValueError: there is none, with the nearest.

    >>> import align_jax
    >>> config = align_jax.recipe("tiny:ipo")
    >>> config.optimizer.learning_rate = 3e-4
    >>> config.objective.name, config.objective.beta
    ('ipo', 0.1)
    """
    try:
        return config_file.load(name)
    except ConfigMistake as error:
        raise ValueError(str(error).replace("--config=", "config ", 1)) from error


def recipes() -> list[str]:
    """Return the recipes' names.

    >>> import align_jax
    >>> align_jax.recipes()[:3]
    ['dpo_70b', 'dpo_7b', 'dpo_7b_8k']
    """
    return list(config_file.recipes())


def ask(
    config: AnyConfig,
    data: Any,
    eval_data: Any,
    model: str | os.PathLike[str],
    keys: Mapping[str, Any],
) -> Asked:
    """Put together what the arguments of ``train`` ask for.

    Raises:
        ValueError: a mistake in the config or the rows.
        TypeError: data that is none.
    """
    found = recipe(config) if isinstance(config, str) else config
    changes: dict[str, Any] = {}
    sources: dict[str, Source] = {}
    for argument, key, rows in (
        ("data", "data.train", data),
        ("eval_data", "data.eval", eval_data),
    ):
        if rows is None:
            continue
        if isinstance(rows, (str, os.PathLike)):
            changes[key] = os.fspath(rows)
        else:
            source = given(rows, argument)
            changes[key], sources[source.spec] = source.spec, source
    if model:
        changes["model.path"] = os.fspath(model)
    if "rewards" in keys:
        keys = {**keys, "rewards": _named_rewards(keys["rewards"])}
    try:
        made = config_file.changed(config_file.changed(found, **changes), **keys)
    except ConfigMistake as error:
        raise ValueError(str(error)) from error
    return Asked(configs.read(made), sources)


def _named_rewards(rewards: Any) -> Any:
    """Return rewards by name: a function, or several, or reward -> weight, may be given as they
    are."""
    if callable(rewards) or isinstance(rewards, str):
        rewards = [rewards]
    if not isinstance(rewards, Mapping):
        rewards = dict.fromkeys(rewards, 1.0)
    return dict(_named(*one) if callable(one[0]) else one for one in rewards.items())


def _named(function: Callable[..., Any], weight: float) -> tuple[str, dict[str, Any]]:
    """Return a function's name, and where a run that goes on finds it."""
    name = getattr(function, "__qualname__", "")
    if not name.isidentifier():
        raise ValueError(
            f"{function!r:.60}: expected a function with a name of its own, at the top of a module "
            "or a notebook"
        )
    path = f"{function.__module__}:{name}"
    return name, {"kind": "function", "path": path, "weight": weight}


@told
def show_batch(
    config: AnyConfig = "dpo",
    data: Any = None,
    eval_data: Any = None,
    *,
    model: str | os.PathLike[str] = "",
    workdir: str = "",
    examples: int = 3,
    step: int = 1,
    **keys: Any,
) -> Inspection:
    """Show what a run will train on, before it does; nothing is trained or compiled.

    A notebook displays it in colors, ``print`` writes it.

    Args:
        config, data, eval_data, model, keys: as ``train`` takes them.
        workdir: of a run that goes on; "" = one that begins.
        examples: how many to show.
        step: of the batch whose examples are shown; 1 = the first.

    Raises:
        ValueError, KeyError, FileNotFoundError, TypeError: as ``train`` does.

    >>> import align_jax
    >>> rows = [{"prompt": f"{n}?", "chosen": "Yes.", "rejected": "No."} for n in range(40)]
    >>> shown = align_jax.show_batch("tiny:dpo", rows, batch_size=8)
    >>> shown.held_out["examples"], shown.examples[0].source[:5]
    (2, 'data[')
    """
    asked = ask(config, data, eval_data, model, keys)
    return inspect.show_batch(
        asked.config, workdir, examples=examples, step=step, given=asked.given
    )
