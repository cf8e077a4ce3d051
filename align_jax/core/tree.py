# SPDX-License-Identifier: Apache-2.0
"""Trees of parameters as nested dicts, and their leaves by path:
``"layers/attention/query/kernel"``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested dict's leaves by path; anything that is no mapping is a leaf.

    >>> flatten({"mlp": {"up": 1, "down": 2}})
    {'mlp/up': 1, 'mlp/down': 2}
    """
    leaves: dict[str, Any] = {}
    for key, node in tree.items():
        path = f"{prefix}{key}"
        leaves.update(flatten(node, f"{path}/") if isinstance(node, Mapping) else {path: node})
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested dict of leaves by path.

    >>> unflatten({"mlp/up": 1, "mlp/down": 2})
    {'mlp': {'up': 1, 'down': 2}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
