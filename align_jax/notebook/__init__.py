# SPDX-License-Identifier: Apache-2.0
"""The front door for notebooks and scripts: what the programs do, with rows and results as Python
has them.  ``import align_jax`` offers its names."""

from align_jax.notebook.asked import recipe, recipes, show_batch
from align_jax.notebook.result import Result, load
from align_jax.notebook.training import train

__all__ = ["Result", "load", "recipe", "recipes", "show_batch", "train"]
