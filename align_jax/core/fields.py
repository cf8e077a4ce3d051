# SPDX-License-Identifier: Apache-2.0
"""What the fields of a JSON object may be, told before anything is made of them.

A size that is text, a null or a float goes far before it breaks, and breaks with words about
something else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from align_jax.core.files import json_kind


class Kind(NamedTuple):
    """A kind of value.

    Attributes:
        words: what was expected, for the message.
        accepts: value -> whether it is one.
        names: the fields that must be one, where they are given.
    """

    words: str
    accepts: Callable[[Any], bool]
    names: tuple[str, ...]


def is_count(value: Any) -> bool:
    """Tell whether a value is a positive integer that an array's axis can have."""
    return type(value) is int and 0 < value < 2**31


def is_integer(value: Any) -> bool:
    """Tell whether a value is an integer, and no boolean."""
    return type(value) is int


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number, and one that a float can hold."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max  # False for NaN


def number_in(text: str) -> float | None:
    """Return the finite number that a text is; None where it is none."""
    try:
        number = float(text)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if is_number(number) else None


def is_above_zero(value: Any) -> bool:
    """Tell whether a value is a finite number above 0."""
    return is_number(value) and value > 0


def is_not_below_zero(value: Any) -> bool:
    """Tell whether a value is a finite number, 0 or above."""
    return is_number(value) and value >= 0


def is_bool(value: Any) -> bool:
    """Tell whether a value is true or false."""
    return type(value) is bool


def is_text(value: Any) -> bool:
    """Tell whether a value is text."""
    return type(value) is str


def is_object(value: Any) -> bool:
    """Tell whether a value is a JSON object."""
    return isinstance(value, Mapping)


def is_list_of(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return what tells whether a value is a list of such."""

    def is_list(value: Any) -> bool:
        return isinstance(value, (list, tuple)) and all(map(accepts, value))

    return is_list


def is_object_of(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return what tells whether a value is an object with such values."""

    def is_one(value: Any) -> bool:
        return is_object(value) and all(map(accepts, value.values()))

    return is_one


def or_null(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return what accepts null too."""

    def is_it(value: Any) -> bool:
        return value is None or accepts(value)

    return is_it


def faults(given: Mapping[str, Any], kinds: tuple[Kind, ...], where: str = "") -> list[str]:
    """Return what is wrong with the fields that are given: "hidden_size: expected ..., got ..."."""
    return [
        f"{where}{name}: expected {kind.words}, got {json_kind(given[name])}"
        for kind in kinds
        for name in kind.names
        if name in given and not kind.accepts(given[name])
    ]
