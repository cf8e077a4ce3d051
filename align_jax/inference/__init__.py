# SPDX-License-Identifier: Apache-2.0
"""Inference: generation, scores of reward models, outside servers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from align_jax.inference import engines

ENGINES: Mapping[str, Callable[..., engines.Engine]] = {
    "local": engines.Local,
    "openai": engines.Server,
}
