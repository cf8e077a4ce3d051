# SPDX-License-Identifier: Apache-2.0
"""List the programs: ``python -m align_jax``; tell who means to start one how."""

from __future__ import annotations

import ast
import pathlib
import shlex
import sys

from align_jax.core.choose import nearest

HELP = ("--help", "-h")


def programs() -> dict[str, str]:
    """Return each program's name and what it does, read from its file without importing it."""
    found = {}
    for path in sorted(pathlib.Path(__file__).parent.glob("[!_]*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        found[path.stem] = docstring.partition("\n\n")[0].replace("\n", " ")
    return found


def mistake(message: str) -> int:
    """Tell what was wrong; return the status."""
    print(f"python -m align_jax: {message}", file=sys.stderr)
    return 2


def main() -> None:
    """Run from the command line."""
    name, *rest = sys.argv[1:] or [""]
    if name in programs():
        sys.exit(mistake(f"a program of its own: python -m align_jax.{shlex.join([name, *rest])}"))
    if name and name not in HELP:
        sys.exit(mistake(f"no program {name!r}{nearest(name, programs())}"))
    print("python -m align_jax.PROGRAM --help tells its options.\n")
    for name, meaning in programs().items():
        print(f"  {name:<12}{meaning}")


if __name__ == "__main__":
    main()
