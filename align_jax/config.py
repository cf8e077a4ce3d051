# SPDX-License-Identifier: Apache-2.0
"""Print every key of a run's config: value, default, unit, choices, meaning.

    python -m align_jax.config [KEY ...] [--config=configs/dpo_7b.py] [--config.any.key=value ...]
        [--json=FILE]

Without --config every key stands at its default.  A KEY, such as ``optimizer`` or
``rollout.server``, prints that group alone.  The objective's own options stand beside
``objective.name``; R marks what a resumed run may change.
"""

from __future__ import annotations

from absl import flags
from ml_collections import config_flags

from align_jax.runs import command, early

if __name__ == "__main__":  # here, because what is imported next takes seconds
    config_flags.DEFINE_config_file(
        "config", None, "Recipe, objective or file; its argument after a colon.", lock_config=True
    )
    flags.DEFINE_string("json", None, "Write the keys to this file instead.")
    arguments = command.read(arguments="keys or groups of keys, such as optimizer")

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from align_jax import losses
from align_jax.core import config as configs
from align_jax.core.choose import nearest
from align_jax.core.files import write_text
from align_jax.core.options import Checked, ObjectiveOptions


class Key(NamedTuple):
    """A key as it is printed.

    Attributes:
        name: dotted.
        value: in this config.
        default: without one.
        unit: of a number.
        choices: the values that it may have, or the names in its table.
        meaning: in one line.
        resume: whether a resumed run may change it.
    """

    name: str
    value: Any
    default: Any
    unit: str
    choices: tuple[Any, ...]
    meaning: str
    resume: bool = False


def keys(config: ConfigDict) -> list[Key]:
    """Return every key of a config, its objective's own options too, in the groups' order."""
    return list(_group(configs.parse(config), "", configs.may_change()))


def _group(options: Checked, prefix: str, free: set[str]) -> Iterator[Key]:
    unset = type(options)()
    for field in dataclasses.fields(options):
        value, name, rules = getattr(options, field.name), f"{prefix}{field.name}", field.metadata
        if isinstance(value, Checked):
            yield from _group(value, f"{name}.", free)
        elif isinstance(options, ObjectiveOptions) and field.name == "options":
            yield from _objective(options, prefix)
        else:
            choices = rules["choices"] or early.names_in(rules["table"])
            default = getattr(unset, field.name)
            yield Key(name, value, default, rules["unit"], choices, rules["meaning"], name in free)


def _objective(options: ObjectiveOptions, prefix: str) -> Iterator[Key]:
    for name, found in losses.describe_options(options.name).items():
        value = options.options.get(name, found.default)
        meaning = f"{found.meaning} ({found.range})" if found.range else found.meaning
        yield Key(f"{prefix}{name}", value, found.default, found.unit, (), meaning)


def table(found: Sequence[Key]) -> str:
    """Write keys as text: what each is now, and below it what it means."""
    longest = max(len(key.name) for key in found)
    lines = []
    for key in found:
        changed = "" if key.value == key.default else f" (default {key.default!r})"
        unit = f" {key.unit}" if key.unit else ""
        lines.append(
            f"{'R' if key.resume else ' '} {key.name:<{longest}}  {key.value!r}{unit}{changed}"
        )
        lines.append(f"  {'':<{longest}}    {key.meaning}")
        if key.choices:
            lines.append(f"  {'':<{longest}}    one of {', '.join(map(repr, key.choices))}")
    return "\n".join(lines)


def select(found: Sequence[Key], groups: Sequence[str]) -> list[Key]:
    """Return the keys of some groups, or all where none is named.

    Raises:
        ValueError: a group that has no key, with the nearest.
    """
    known = {name for key in found for name in _prefixes(key.name)}
    for group in groups:
        if group not in known:
            near = nearest(group, known)
            if "did you mean" not in near:  # hundreds
                near = nearest(group, {name.partition(".")[0] for name in known})
            raise ValueError(f"no key or group {group!r:.60}{near}")
    return [key for key in found if not groups or _prefixes(key.name) & set(groups)]


def _prefixes(name: str) -> set[str]:
    """Return a dotted name and every group that it stands in."""
    parts = name.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts) + 1)}


def main(groups: Sequence[str]) -> None:
    """Run from the command line."""
    config = configs.defaults() if flags.FLAGS.config is None else flags.FLAGS.config
    found = select(keys(config), groups)
    if (written := command.output_path("json")) is not None:
        rows = [key._asdict() for key in found]
        write_text(written, json.dumps(rows, indent=1, default=_plain) + "\n")
    else:
        print(table(found))


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)


if __name__ == "__main__":
    command.run(main, arguments)
