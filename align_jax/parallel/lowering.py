# SPDX-License-Identifier: Apache-2.0
"""Lowering a jitted function from shapes alone, for devices that need not be there."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh


def lower(
    function: Any, mesh: Mesh, *arguments: Any, platform: str | None = None, **static: Any
) -> jax.stages.Lowered:
    """Lower a jitted function as a run would compile it.

    Args:
        function: what ``jax.jit`` returned.
        mesh: the ambient mesh, perhaps over a topology's devices.
        arguments: the function's, shapes with shardings (static ones as they are).
        platform: "tpu" for a topology's devices; None: the devices' own.
        static: further static arguments.
    """
    with jax.set_mesh(mesh):
        return function.trace(*arguments, **static).lower(
            lowering_platforms=None if platform is None else (platform,)
        )
