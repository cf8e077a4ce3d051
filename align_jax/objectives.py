# SPDX-License-Identifier: Apache-2.0
"""Print the table of objectives, with the meaning, unit, range and default of every option.

python -m align_jax.objectives [NAME ...] [--json=FILE]
"""

from __future__ import annotations

from absl import flags

from align_jax.runs import command

if __name__ == "__main__":  # here, because what is imported next takes seconds
    flags.DEFINE_string("json", None, "Write the rows to this file as well.")
    arguments = command.read(arguments="names of objectives; none = all")

import json
from collections.abc import Sequence
from typing import Any

from align_jax.core.choose import choose
from align_jax.core.files import write_text
from align_jax.losses import OBJECTIVES


def rows(names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the table's rows as plain values; all of them, or the named ones in that order.

    Raises:
        ValueError: an unknown name.
    """
    found = []
    for name in names or OBJECTIVES:
        row = choose(OBJECTIVES, name, "objective")
        found.append(
            {
                "name": name,
                "formula": row.formula,
                "data": row.data,
                "reference": row.reference,
                "needs": [*row.needs, *(["mismatched"] if row.mismatched else [])],
                "metric": row.metric,
                "paper": row.paper,
                "use": row.use,
                "options": row.options,
                "meanings": {name: option.text for name, option in row.declared.items()},
            }
        )
    return found


def text(table: Sequence[dict[str, Any]]) -> str:
    """Lay rows out for reading, one block an objective."""
    lines = []
    for row in table:
        needs = f", needs {', '.join(row['needs'])}" if row["needs"] else ""
        reference = "with a reference" if row["reference"] else "no reference"
        facts = f"{row['data']}, {reference}{needs}; improves {row['metric']}; {row['paper']}"
        lines += [f"{row['name']:<18} {row['formula']}", f"{'':<18} {facts}"]
        lines += [f"{'':<18} use: {row['use']}"]
        for name, default in row["options"].items():
            lines.append(f"{'':<18} {f'{name}={default!r}':<29} {row['meanings'][name]}")
    return "\n".join(lines)


def main(names: Sequence[str]) -> None:
    """Run from the command line."""
    table, written = rows(names), command.output_path("json")
    print(text(table))
    if written is not None:
        write_text(written, json.dumps(table, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    command.run(main, arguments)
