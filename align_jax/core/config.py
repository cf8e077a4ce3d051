# SPDX-License-Identifier: Apache-2.0
"""From options to the config that files and flags change, and back: the only reader of ConfigDict.

A config file starts from ``defaults()``; the dict is locked, so a misspelled key fails on the
command line and in the file alike.  ``read`` makes the frozen ``options.Config`` of it, having
checked everything that the config alone can tell, and reports every mistake in one error.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from align_jax.core.choose import nearest
from align_jax.core.options import Checked, Config, ObjectiveOptions


def defaults() -> ConfigDict:
    """Return a config with every key at its default, locked."""
    return _to_config_dict(Config()).lock()


def _to_config_dict(options: Checked) -> ConfigDict:
    made = ConfigDict()
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if isinstance(value, Checked):
            made[field.name] = _to_config_dict(value)
        elif isinstance(options, ObjectiveOptions) and field.name == "options":
            made.update(value)
        else:
            made[field.name] = ConfigDict(value) if isinstance(value, Mapping) else value
    return made


def to_dict(options: Checked) -> dict[str, Any]:
    """Return options as nested dicts with the config's keys, for records."""
    return _to_config_dict(options).to_dict()


def from_dict(values: Mapping[str, Any]) -> ConfigDict:
    """Return the config that was saved as nested dicts, keys of a newer version at defaults."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return ConfigDict({key: plain(inner) for key, inner in value.items()})
        return tuple(map(plain, value)) if isinstance(value, list) else value

    def fill(config: ConfigDict, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            group = config.get(key)
            if isinstance(group, ConfigDict) and isinstance(value, Mapping):
                fill(group, value)
                continue
            with config.ignore_type():  # types are checked together, each key by its name
                config[key] = plain(value)

    config = defaults().unlock()
    fill(config, values)
    return config.lock()


def parse(config: ConfigDict) -> Config:
    """Turn a config into frozen options, each key's type and range checked by itself.

    Raises:
        ValueError: listing each key, what was expected, what was got and the nearest fix.
    """
    wrong: list[str] = []
    options = _parse(Config, config.to_dict(), "", wrong)
    _raise(wrong)
    return options


def read(config: ConfigDict | Config) -> Config:
    """Turn a config into frozen options; everything that the config alone can tell is checked.

    Of options that are read already, what keys of a group say together is checked once more.

    Raises:
        ValueError: listing each key, what was expected, what was got and the nearest fix.
    """
    options = config if isinstance(config, Config) else parse(config)
    _raise(list(_group_mistakes(options, "")))
    return options


def _raise(wrong: list[str]) -> None:
    if wrong:
        lines = "\n".join(f"  config.{line}" for line in wrong)
        raise ValueError(f"the config has mistakes:\n{lines}")


Options = typing.TypeVar("Options", bound=Checked)


def _parse(
    kind: type[Options], values: Mapping[str, Any], prefix: str, wrong: list[str]
) -> Options:
    """Make one class of options, adding each key's mistakes to ``wrong``."""
    types: dict[str, Any] = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    given = dict(values)
    if issubclass(kind, ObjectiveOptions):
        own = {name: given.pop(name) for name in list(given) if name not in fields}
        given["options"] = own
    for name in sorted(given.keys() - fields.keys()):
        wrong.append(f"{prefix}{name} is no key{nearest(name, fields)}")
    made: dict[str, Any] = {}
    for name, field in fields.items():
        if name not in given:
            continue
        value: Any = given[name]
        expected: Any = types[name]
        if isinstance(expected, type) and issubclass(expected, Checked):
            if not isinstance(value, Mapping):
                keys = ", ".join(_keys(expected))
                wrong.append(f"{prefix}{name} = {value!r}: expected its keys, {keys}")
                continue
            made[name] = _parse(expected, value, f"{prefix}{name}.", wrong)
            continue
        value = tuple(value) if isinstance(value, list) else value
        problem = _type_mistake(value, expected) or _range_mistake(value, field.metadata)
        if problem:
            wrong.append(f"{prefix}{name} = {value!r:.100}: {problem}")
        else:
            made[name] = _as_floats(value, expected)
    return kind(**made)


def _keys(kind: type[Checked]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _as_floats(value: Any, expected: Any) -> Any:
    """Make floats of integers where a key holds numbers."""
    if expected is float:
        return float(value)
    if isinstance(value, tuple) and float in typing.get_args(expected):
        return tuple(float(item) for item in value)
    return value


_KINDS: Mapping[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "True or False"),
    int: ((int,), "an integer"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
    tuple: ((tuple,), "a tuple"),
}


def _type_mistake(value: Any, expected: Any) -> str:
    origin: Any = typing.get_origin(expected) or expected
    classes, name = _KINDS.get(origin, ((Mapping,), "a dict"))
    fits = isinstance(value, classes) and not (isinstance(value, bool) and origin is not bool)
    if not fits:
        return f"expected {name}"
    if origin is tuple:
        inner = typing.get_args(expected)[0]
        found = [problem for item in tuple(value) if (problem := _type_mistake(item, inner))]
        return f"{found[0]} in each place" if found else ""
    if typing.get_args(expected) == (str, str):
        if not all(isinstance(one, str) for pair in value.items() for one in pair):
            return "expected a dict of texts"
    return ""


LARGEST = 2**31 - 1  # steps and sizes are counted in 32 bits


def _range_mistake(value: Any, rules: Mapping[str, Any]) -> str:
    if isinstance(value, (int, float)) and not abs(value) <= sys.float_info.max:
        return "expected a finite number"
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"expected at most {LARGEST}"
    if rules["choices"] and value not in rules["choices"]:
        return f"expected one of {', '.join(map(repr, rules['choices']))}"
    if rules["low"] is not None and value < rules["low"]:
        return f"expected at least {rules['low']}"
    if rules["above"] is not None and value <= rules["above"]:
        return f"expected more than {rules['above']}"
    if rules["below"] is not None and value >= rules["below"]:
        return f"expected less than {rules['below']}"
    if rules["high"] is not None and value > rules["high"]:
        return f"expected at most {rules['high']}"
    return ""


def _group_mistakes(options: Checked, prefix: str) -> Iterator[str]:
    for line in options.check():
        yield prefix + line
    for field in dataclasses.fields(options):
        if isinstance(value := getattr(options, field.name), Checked):
            yield from _group_mistakes(value, f"{prefix}{field.name}.")


def may_change(
    kind: type[Checked] = Config, prefix: str = "", *, all_keys: bool = False
) -> set[str]:
    """Return the keys that a resumed run may change, dotted (``option(resume=True)``)."""
    found: set[str] = set()
    types: dict[str, Any] = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        free = all_keys or field.metadata["resume"]
        inner = types[field.name]
        if isinstance(inner, type) and issubclass(inner, Checked):
            found |= may_change(inner, f"{prefix}{field.name}.", all_keys=free)
        elif free:
            found.add(prefix + field.name)
    return found
