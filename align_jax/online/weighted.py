# SPDX-License-Identifier: Apache-2.0
"""The weighted sum of rewards that a config names: ``{"numeric": 1.0, "model": {"weight": 0.5,
"path": ...}}``."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from align_jax.online.rewards import Extras, RewardFunction


@dataclasses.dataclass(frozen=True)
class WeightedRewards:
    """A weighted sum of reward functions.

    Attributes:
        terms: (name, weight, function) of each.
    """

    terms: tuple[tuple[str, float, RewardFunction], ...]

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], extras: Extras | None = None
    ) -> tuple[Float[np.ndarray, "n"], dict[str, Float[np.ndarray, "n"]]]:
        """Score completions.

        Args:
            prompts: the prompts as text.
            completions: as many completions.
            extras: the columns of their rows.

        Returns:
            The weighted sum, float32 [n], and each reward by itself, unweighted.

        Raises:
            ValueError: a function that returns another number of scores, or one that is not a
                finite number.
        """
        extras = [{}] * len(prompts) if extras is None else extras
        total, parts = np.zeros(len(completions), np.float32), {}
        for name, weight, fn in self.terms:
            scores = np.asarray(fn(prompts, completions, extras), np.float32)
            if scores.shape != total.shape:
                raise ValueError(
                    f"reward {name!r} gave scores of shape {scores.shape} for "
                    f"{len(completions)} "
                    "completions; it must return one number for each"
                )
            if not np.isfinite(scores).all():
                bad = int(np.flatnonzero(~np.isfinite(scores))[0])
                raise ValueError(
                    f"reward {name!r} gave {scores[bad]} for the completion "
                    f"{completions[bad][:80]!r}"
                )
            parts[name] = scores
            total = total + np.float32(weight) * scores
        return total, parts


def read(
    rewards: Mapping[str, int | float | Mapping[str, Any]],
    table: Mapping[str, Callable[..., RewardFunction]],
) -> list[tuple[str, float, str, dict[str, Any]]]:
    """Read the weighted sum that a config's ``rewards`` describes; nothing is loaded.

    Args:
        rewards, table: as ``resolve`` takes them.

    Returns:
        (name, weight, row of the table, that row's options) of each.

    Raises:
        KeyError, TypeError, ValueError: as ``resolve``.
    """
    if not rewards:
        raise ValueError(f"no reward was named; known: {sorted(table)}")
    terms = []
    for name, given in rewards.items():
        options = {"weight": given} if isinstance(given, (int, float)) else dict(given)
        weight, kind = float(options.pop("weight", 1.0)), options.pop("kind", name)
        if kind not in table:
            near = difflib.get_close_matches(kind, table, 1)
            raise KeyError(
                f"unknown reward {kind!r}; known: {sorted(table)}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
        try:
            inspect.signature(table[kind]).bind(**options)
        except TypeError as error:
            raise TypeError(
                f"reward {name!r}: {error}; {kind} takes {inspect.signature(table[kind])}"
            ) from None
        terms.append((name, weight, kind, options))
    return terms


def resolve(
    rewards: Mapping[str, int | float | Mapping[str, Any]],
    table: Mapping[str, Callable[..., RewardFunction]],
    mesh: Mesh | None = None,
) -> WeightedRewards:
    """Build the weighted sum that a config's ``rewards`` describes.

    Args:
        rewards: name -> weight, or options; of the options ``weight`` (default 1) and ``kind`` (a
            row of the table; default: the name) are read here, the rest goes to the row's function.
        table: the rows, ``align_jax.online.REWARDS``.
        mesh: given to the rows that run a model; None: the default device.

    Raises:
        KeyError: an unknown kind, with the nearest known one.
        TypeError: an option that the row does not take, or one missing.
        ValueError: no reward at all.
    """
    terms = []
    for name, weight, kind, options in read(rewards, table):
        on_mesh = {"mesh": mesh} if "mesh" in inspect.signature(table[kind]).parameters else {}
        terms.append((name, weight, table[kind](**options, **on_mesh)))
    return WeightedRewards(tuple(terms))
