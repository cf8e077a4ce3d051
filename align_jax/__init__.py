# SPDX-License-Identifier: Apache-2.0
"""align_jax: language-model alignment from preferences, for TPU pods, in JAX and Flax.

    train         train on rows, frames, data sets or files       show_batch    look at them first
    load          open what a run has trained                     Result        what both return
    recipe        a recipe's config, to change                    recipes       their names
    Config        every option, frozen                            Example       what a row becomes
    OBJECTIVES, REWARDS, FORMATS, FAMILIES, OPTIMIZERS            the tables
    losses        the objectives as functions of arrays

A name is imported when it is first used, so that ``import align_jax`` takes no time.
"""

from __future__ import annotations

from align_jax.core import typed

if typed.is_starting():  # a program's imports take seconds: Ctrl-C ends them with one line
    typed.take_interrupts()

import importlib
import os
import sys
import types
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"  # setup.cfg reads it from here

# it would complain that PyTorch is missing: not needed
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

if TYPE_CHECKING:
    from align_jax import losses
    from align_jax.core.options import Config
    from align_jax.core.schema import Example
    from align_jax.data.formats import FORMATS
    from align_jax.losses import OBJECTIVES
    from align_jax.models import FAMILIES
    from align_jax.notebook import Result, load, recipe, recipes, show_batch, train
    from align_jax.online.rewards import REWARDS
    from align_jax.training.optim import OPTIMIZERS

_FROM = {
    "Config": "core.options",
    "Example": "core.schema",
    "FAMILIES": "models",
    "FORMATS": "data.formats",
    "OBJECTIVES": "losses",
    "OPTIMIZERS": "training.optim",
    "REWARDS": "online.rewards",
    "Result": "notebook",
    "load": "notebook",
    "losses": "",
    "recipe": "notebook",
    "recipes": "notebook",
    "show_batch": "notebook",
    "train": "notebook",  # a function, though a program's file has the same name: see _Package
}
__all__ = [
    "Config",
    "Example",
    "FAMILIES",
    "FORMATS",
    "OBJECTIVES",
    "OPTIMIZERS",
    "REWARDS",
    "Result",
    "load",
    "losses",
    "recipe",
    "recipes",
    "show_batch",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module 'align_jax' has no attribute {name!r}")
    if not _FROM[name]:
        return importlib.import_module(f"align_jax.{name}")
    globals()[name] = found = getattr(importlib.import_module(f"align_jax.{_FROM[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_FROM})


class _Package(types.ModuleType):
    """This package: who imports the program's file ``align_jax.train`` (a collector of tests does)
    does not put it in the function's place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "train" or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
