# SPDX-License-Identifier: Apache-2.0
"""List the programs: ``python -m align_jax``."""

from __future__ import annotations

import ast
import pathlib


def programs() -> dict[str, str]:
    """Return each program's name and what it does, read from its file without importing it."""
    found = {}
    for path in sorted(pathlib.Path(__file__).parent.glob("[!_]*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        found[path.stem] = docstring.partition("\n\n")[0].replace("\n", " ")
    return found


def main() -> None:
    """Run from the command line."""
    print("python -m align_jax.PROGRAM --help tells its options.\n")
    for name, meaning in programs().items():
        print(f"  {name:<12}{meaning}")


if __name__ == "__main__":
    main()
