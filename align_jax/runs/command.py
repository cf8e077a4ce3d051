# SPDX-License-Identifier: Apache-2.0
"""The one entry of all programs: flags, --help, what is said of a mistake, the exit status.

    0    done
    1    something happened: a full disk, a server that does not answer, a loss that is not finite
    2    a mistake in what the user gave: a flag, a key, a file
    130  interrupted

A mistake is its message alone, on standard error; ``--debug`` shows the traceback too.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import flags, logging

# What the library raises for something that the user gave; anything else has happened.
MISTAKES = (
    ValueError,
    KeyError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    flags.Error,
)
HELP = ("--help", "-h", "-help", "--helpfull", "--helpshort", "-?")


class Usage(ValueError):
    """Flags that do not go together, or arguments that a program does not take."""


def run(main: Callable[[Sequence[str]], None], *, arguments: str = "") -> NoReturn:
    """Read the flags, run a program's main and leave with the status.

    Args:
        main: takes what stands on the command line beside the flags.
        arguments: what that may be, in a word for the help; "" = nothing.
    """
    flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
    program = f"python -m {sys.modules['__main__'].__spec__.name}"  # type: ignore[union-attr]
    if any(word in HELP for word in sys.argv[1:]):
        print(usage(program, arguments))
        sys.exit(0)
    debug = "--debug" in sys.argv[1:]
    try:
        rest = flags.FLAGS(sys.argv)[1:]
        if rest and not arguments:
            raise Usage(f"unknown arguments {rest}: flags begin with --")
        if "config" in flags.FLAGS and flags.FLAGS.config is not None:
            _ = flags.FLAGS.config.is_locked  # a missing file is told when a key is asked for
    except Exception as error:  # a config file runs here: whatever it raises is the user's
        if debug:
            raise
        print(f"{program}: {_flag_message(error)}", file=sys.stderr)
        sys.exit(2)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells much of little
    try:
        main(rest)
    except KeyboardInterrupt:
        _leave(130)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, MISTAKES):
            print(f"{program}: {_message(error)}", file=sys.stderr)
            _leave(2)
        print(
            f"{program}: {type(error).__name__}: {_message(error)}\n(--debug shows where)",
            file=sys.stderr,
        )
        _leave(1)
    sys.exit(0)


def usage(program: str, arguments: str) -> str:
    """Return a program's help: what it does, and its flags with their defaults."""
    main = sys.modules["__main__"]
    lines = [(main.__doc__ or program).strip(), "", "Flags:"]
    for flag in flags.FLAGS.get_flags_for_module(main):
        default = "" if flag.default in (None, "", [], False) else f" (default {flag.default})"
        lines.append(f"  --{flag.name:<20} {flag.help}{default}")
    lines.append(f"  --{'debug':<20} Show the traceback of an error.")
    if "config" in flags.FLAGS:
        lines += ["  --config.KEY=VALUE    Any key of the config: python -m align_jax.config"]
    if arguments:
        lines += ["", f"Arguments: {arguments}"]
    return "\n".join(lines)


def _message(error: Exception) -> str:
    """Return an error's words; a KeyError's would be quoted."""
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])
    return str(error) or type(error).__name__


def _flag_message(error: Exception) -> str:
    """Return what was wrong on the command line, in its words."""
    text = _message(error)
    if missing := re.findall(r"Flag --(\w+) must have a value other than None", text):
        return f"missing {', '.join(f'--{name}' for name in missing)}; --help shows all flags"
    if "Failed loading config file" in text:
        attempted = re.search(r"Attempted.*?\n\s*(\S+)", text, re.DOTALL)
        return f"no config file at {attempted[1] if attempted else text}"
    if isinstance(error, AttributeError):  # ml_collections' own did-you-mean
        words = re.findall(r"['\"](\w+)['\"]", text.replace("\\'", "'"))
        nearest = f"; did you mean {words[1]!r}?" if len(words) > 1 else ""
        return f"the config has no key {words[0]!r}{nearest}" if words else text
    return text


def _leave(status: int) -> NoReturn:
    """Exit; one of several processes at once, since JAX would wait minutes for its peers."""
    jax = sys.modules.get("jax")
    if jax is not None and sys.excepthook is not sys.__excepthook__:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
