# SPDX-License-Identifier: Apache-2.0
"""A model family of the user's own, ``module:name``: read and checked before anything is computed.

The checkpoint that is exported says its family itself (``OWN_FAMILY`` in config.json), so whoever
opens it finds the user's file; other programs pass over the key.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

from align_jax.core.choose import choose, nearest
from align_jax.core.tree import flatten
from align_jax.models import Family, find_family
from align_jax.models.config import OWN_FAMILY, ModelConfig
from align_jax.models.layers import ACTIVATIONS
from align_jax.models.model import build
from align_jax.models.tensor_map import TensorMap, parse


def named(hf: Mapping[str, Any], family: str = "") -> str:
    """Return the user's own family that reads a configuration; "" where the table's does.

    Args:
        hf: the configuration.
        family: what the user asked for; a name of the table's leaves the choice to ``hf``.

    Raises:
        ValueError: ``hf`` names something else than a ``module:name``.
    """
    said = hf.get(OWN_FAMILY, "")
    if not isinstance(said, str) or (said and ":" not in said):
        raise ValueError(f"{OWN_FAMILY}: expected 'module:name' of a family, got {said!r}")
    return family if ":" in family else said


def read(hf: Mapping[str, Any], name: str) -> ModelConfig:
    """Turn a configuration into ours with the user's own family.

    Args:
        hf: the configuration, whose fields are the family's own affair.
        name: the family, ``module:name``.

    Raises:
        ValueError: no such family; what its functions raise; a tensor map that is not that of the
            decoder which its configuration describes, with the parameters.
    """
    row = find_family(name)
    config = _asked(f"{name}: from_hf", row.from_hf, hf)
    if not isinstance(config, ModelConfig):
        raise ValueError(
            f"{name}: from_hf returned a {type(config).__name__}; expected a ModelConfig "
            "(align_jax.models.config)"
        )
    choose(ACTIVATIONS, config.activation, f"{name}: activation")
    config = dataclasses.replace(config, family=name, hf=json.dumps(dict(hf), sort_keys=True))
    _check_maps(config, row)
    return config


def _asked(what: str, function: Callable[..., Any], given: Any) -> Any:
    try:
        return function(given)
    except Exception as error:  # whatever a user's function raises
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{what}: {kind}{error}") from error


@functools.lru_cache
def _check_maps(config: ModelConfig, row: Family) -> None:
    """Refuse a tensor map that is not of this decoder's parameters."""
    what = f"{config.family}: tensor_maps"
    entries: list[TensorMap] = _asked(what, row.tensor_maps, config)
    shapes = flatten(build(config, unembed=True).shapes())
    found = {entry.path for entry in entries}
    wrong = [
        f"{path} is no parameter of this decoder{nearest(path, shapes.keys() - found)}"
        for path in sorted(found - shapes.keys())
    ]
    wrong += [f"{path} has no tensor" for path in sorted(shapes.keys() - found)]
    for entry in entries:
        if entry.path not in shapes:
            continue
        shape = shapes[entry.path].shape[entry.stacked + entry.by_expert :]
        ours = _asked(f"{what}: {entry.axes!r}", lambda one: parse(one, config).our_shape, entry)
        if ours != shape:
            wrong.append(f"{entry.path} is {shape}, {entry.axes!r} makes {ours} of {entry.name}")
    if wrong:
        raise ValueError(f"{what}: {'; '.join(wrong)}")
