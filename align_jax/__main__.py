# SPDX-License-Identifier: Apache-2.0
"""The command ``align-jax``: lists the programs, or becomes one of them.

    align-jax PROGRAM [arguments]     the same as python -m align_jax.PROGRAM [arguments]
    align-jax chat [arguments]        align-jax sample --chat [arguments]
    align-jax --version               the version

``python -m align_jax`` is this command where its script is not on the path.
"""

from __future__ import annotations

import ast
import os
import pathlib
import runpy
import sys

from align_jax import __version__
from align_jax.core.choose import nearest
from align_jax.core.typed import SCRIPT

HELP = ("--help", "-h")
CHAT = "chat"


def programs() -> dict[str, str]:
    """Return each program's name and what it does, read from its file without importing it."""
    found = {}
    for path in sorted(pathlib.Path(__file__).parent.glob("[!_]*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        found[path.stem] = docstring.partition("\n\n")[0].replace("\n", " ")
    return dict(sorted({**found, CHAT: "Talk to a model: sample --chat."}.items()))


def main() -> None:
    """Run from the command line."""
    own = SCRIPT if pathlib.Path(sys.argv[0]).stem == SCRIPT else "python -m align_jax"
    name, *rest = sys.argv[1:] or [""]
    if own == SCRIPT:  # as python -m does: the user's own parts lie here
        sys.path.insert(0, os.getcwd())
    if name == "--version":
        print(f"align_jax {__version__}")
        return
    if name in programs():
        program, *first = ("sample", "--chat") if name == CHAT else (name,)
        sys.argv[1:] = [*first, *rest]
        if sys.stderr.isatty() and not set(HELP) & set(rest):  # the imports take seconds
            print(f"{own} {name} ...", file=sys.stderr, flush=True)
        called = {"CALLED": f"{own} {name}"}  # for the program's messages
        runpy.run_module(f"align_jax.{program}", called, run_name="__main__", alter_sys=True)
        return
    if name and name not in HELP:
        print(f"{own}: no program {name!r}{nearest(name, programs())}", file=sys.stderr)
        sys.exit(2)
    lines = [f"  {program:<12}{meaning}" for program, meaning in programs().items()]
    try:
        print("\n".join([f"{own} PROGRAM --help tells its options.\n", *lines]), flush=True)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
