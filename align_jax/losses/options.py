# SPDX-License-Identifier: Apache-2.0
"""An objective's option: type, range, unit and meaning, declared once, in the annotation.

    Beta = Annotated[float, Option("scale of the log-ratios", unit="per nat", above=0)]

    def dpo(pair, *, beta: Beta = 0.1)            class Kto(Loss): beta: Beta = 0.1

A type checker sees a float, ``help()`` shows it all, ``declared`` reads it for the programs, and a
value out of range is refused.  Modules that declare options do without
``from __future__ import annotations``, which would leave ``help()`` the names alone.
"""

import dataclasses
import functools
import math
import numbers
import types
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

import numpy as np

WORDS: dict[type, str] = {float: "a number", int: "an integer", bool: "True or False"}


@dataclasses.dataclass(frozen=True, repr=False)
class Option:
    """What is known of an option.

    Attributes:
        meaning: in one line.
        unit: of a number.
        low, high: the least and the greatest value.
        above, below: what the value must exceed, and stay under.
        choices: the values that it may have; () = any in the range.
        default: where nothing is said.
        kinds: types of its values: a subset of float, int, bool, str, None.
        only: another option -> its values with which alone this one counts.
        unless: another option -> its values with which this one has no effect.
    """

    meaning: str
    unit: str = ""
    low: int | float | None = None
    high: int | float | None = None
    above: int | float | None = None
    below: int | float | None = None
    choices: tuple[Any, ...] = ()
    default: Any = None
    kinds: tuple[type, ...] = ()
    only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    unless: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

    @property
    def range(self) -> str:
        """The allowed values in words; "" where any number is.

        >>> Option("", low=0, below=0.5).range, Option("", above=0).range
        ('in [0, 0.5)', 'above 0')
        """
        if self.choices:
            return "one of " + ", ".join(map(repr, self.choices))
        given = [
            f"{word} {bound:g}"
            for word, bound in (
                ("at least", self.low),
                ("above", self.above),
                ("at most", self.high),
                ("below", self.below),
            )
            if bound is not None
        ]
        if len(given) < 2:
            return "".join(given)
        first = f"({self.above:g}" if self.low is None else f"[{self.low:g}"
        last = f"{self.below:g})" if self.high is None else f"{self.high:g}]"
        return f"in {first}, {last}"

    @property
    def text(self) -> str:
        """Meaning, unit, range and what it hangs on, in a line."""
        hangs = [
            f"only with {name} {' or '.join(map(repr, values))}"
            for name, values in self.only.items()
        ]
        facts = ", ".join(part for part in (self.unit, self.range, *hangs) if part)
        return f"{self.meaning} ({facts})" if facts else self.meaning

    def __repr__(self) -> str:
        return repr(self.text)  # what ``help()`` shows of an annotation

    def accepts(self, value: Any) -> bool:
        """Tell whether a value has the type and lies in the range."""
        if value is None:
            return types.NoneType in self.kinds
        if self.choices:
            return isinstance(value, self.kinds) and value in self.choices
        if bool in self.kinds:
            return isinstance(value, (bool, np.bool_))
        kind = numbers.Real if float in self.kinds else numbers.Integral
        if isinstance(value, bool) or not isinstance(value, kind):
            return False
        try:
            number = float(value)
        except OverflowError:  # of an integer
            return False
        return (
            math.isfinite(number)
            and (self.low is None or number >= self.low)
            and (self.high is None or number <= self.high)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def check(self, name: str, value: Any) -> None:
        """Raise a ValueError, with the range, where a value is not accepted."""
        if self.accepts(value):
            return
        expected = self.range
        if not self.choices:
            words = [f"{WORDS[kind]} {self.range}".strip() for kind in self.kinds if kind in WORDS]
            expected = " or ".join([*words, "None"] if types.NoneType in self.kinds else words)
        raise ValueError(f"{name} = {value!r:.100}: expected {expected}")

    def check_effect(self, name: str, value: Any, others: Mapping[str, Any]) -> None:
        """Raise a ValueError where a value that is not the default has no effect.

        Args:
            name: of the option.
            value: its value.
            others: all options' values.
        """
        if value == self.default:
            return
        for other, values in self.only.items():
            if others[other] not in values:
                raise ValueError(
                    f"{name} = {value!r:.100} has no effect with {other} = {others[other]!r}; it "
                    f"needs {other} = {' or '.join(map(repr, values))}"
                )
        for other, values in self.unless.items():
            if others[other] in values:
                raise ValueError(
                    f"{name} = {value!r:.100} has no effect with {other} = {others[other]!r}; give "
                    f"{other} another value, or leave {name} at {self.default!r}"
                )


def declared(options: type["Options"]) -> dict[str, Option]:
    """Read the options of a class."""
    kind: Any = options  # mypy takes a class for one of its values, which have no hash
    return dict(_declared(kind))


@functools.cache  # a config is read many times, a class is what it is
def _declared(options: Any) -> dict[str, Option]:
    return {
        field.name: read(field.type, field.default)
        for field in sorted(dataclasses.fields(options), key=lambda x: x.name not in options.own)
    }


def read(annotation: Any, default: Any = None) -> Option:
    """Make an Option whole from an ``Annotated[type, Option]`` and a default."""
    kind, option = get_args(annotation)
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    kinds = tuple({type(choice) for choice in choices}) or get_args(kind) or (kind,)
    return dataclasses.replace(option, default=default, choices=choices, kinds=kinds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """A frozen value whose fields are options."""

    own: ClassVar[tuple[str, ...]] = ()  # fields that are listed before those inherited

    def values(self) -> dict[str, Any]:
        """Return every option with its value."""
        return {name: getattr(self, name) for name in declared(type(self))}


Kind = TypeVar("Kind", bound=Options)


def make(kind: type[Kind], values: Mapping[str, Any]) -> Kind:
    """Make a value of the options that it has among those given; the others keep their defaults.

    Raises:
        ValueError: one of them is out of range.
    """
    own = {name: option for name, option in declared(kind).items() if name in values}
    for name, option in own.items():
        option.check(name, values[name])
    return kind(**{name: _as_number(values[name], option) for name, option in own.items()})


def _as_number(value: Any, option: Option) -> Any:
    """Make a float of an integer where the option is one."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return float(value) if whole and float in option.kinds else value
