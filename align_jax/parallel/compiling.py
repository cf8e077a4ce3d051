# SPDX-License-Identifier: Apache-2.0
"""What the compiler is asked for beyond its defaults, by platform."""

from __future__ import annotations

import functools

import jax
from jax.sharding import Mesh

# Of the CPU's two libraries for products the compiler takes YNNPACK; with this it takes Eigen, and
# a step of 7M parameters 14 % less CPU time.
_BY_PLATFORM = {"cpu": {"xla_cpu_experimental_ynn_fusion_type": ""}}


def options(mesh: Mesh) -> dict[str, str] | None:
    """Return the compiler's options for a step on this mesh; None: its defaults."""
    platform = mesh.devices.flat[0].platform
    return _known(platform) if platform in _BY_PLATFORM else None


@functools.cache
def _known(platform: str) -> dict[str, str] | None:
    """Return a platform's options where the installed compiler knows them: they are its own
    experiments, and come and go."""
    wanted = _BY_PLATFORM[platform]
    try:
        jax.jit(lambda: 0, compiler_options=wanted).lower().compile()
    except jax.errors.JaxRuntimeError:
        return None
    return wanted
