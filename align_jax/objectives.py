# SPDX-License-Identifier: Apache-2.0
"""Print the table of objectives: ``python -m align_jax.objectives [NAME ...] [--json=FILE]``."""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from align_jax.losses import OBJECTIVES


def rows(names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the table's rows as plain values; all of them, or the named ones in that order.

    Raises:
        KeyError: an unknown name.
    """
    unknown = [name for name in names if name not in OBJECTIVES]
    if unknown:
        raise KeyError(f"unknown objectives {unknown}; known: {list(OBJECTIVES)}")
    found = []
    for name in names or OBJECTIVES:
        row = OBJECTIVES[name]
        found.append(
            {
                "name": name,
                "formula": row.formula,
                "data": row.data,
                "reference": row.reference,
                "needs": [*row.needs, *(["mismatched"] if row.mismatched else [])],
                "metric": row.metric,
                "paper": row.paper,
                "options": row.options,
            }
        )
    return found


def text(table: Sequence[dict[str, Any]]) -> str:
    """Lay rows out for reading, one block an objective."""
    blocks = []
    for row in table:
        options = ", ".join(f"{name}={value!r}" for name, value in row["options"].items()) or "none"
        needs = f", needs {', '.join(row['needs'])}" if row["needs"] else ""
        reference = "with a reference" if row["reference"] else "no reference"
        blocks.append(
            "\n".join(
                [
                    f"{row['name']:<18} {row['formula']}",
                    f"{'':<18} {row['data']}, {reference}{needs}; improves {row['metric']}; "
                    f"{row['paper']}",
                    f"{'':<18} options: {options}",
                ]
            )
        )
    return "\n".join(blocks)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m align_jax.objectives", description="Print the objectives."
    )
    parser.add_argument("names", nargs="*", help="objectives to print; all by default")
    parser.add_argument(
        "--json", metavar="FILE", type=pathlib.Path, help="write the rows to FILE as well"
    )
    arguments = parser.parse_args(argv)
    try:
        table = rows(arguments.names)
    except KeyError as error:
        parser.error(error.args[0])
    print(text(table))
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
