# SPDX-License-Identifier: Apache-2.0
"""The one entry of all programs: flags, --help, what is said of a mistake, the exit status.

    0    done
    1    something happened: a full disk, a server that does not answer, a loss that is not finite
    2    a mistake in what the user gave: a flag, a key, a file
    130  interrupted

Programs that take --config and no arguments have a short form:
``train dpo --model=M --data=FILE`` is
``train --config=dpo --config.model.path=M --config.data.train=FILE --workdir=runs/dpo``.

A mistake is its message alone, on standard error; ``--debug`` shows the traceback too.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import math
import os
import pathlib
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from absl import flags, logging

from align_jax.core import config as configs
from align_jax.core import typed
from align_jax.core.choose import nearest
from align_jax.interop import hub
from align_jax.runs import early
from align_jax.runs.config_file import ConfigFile, list_keys, nearest_key, value_message, words


class Usage(flags.Error, ValueError):
    """Flags that do not go together, values out of range, results that cannot be written."""


# What the library raises for something that the user gave; anything else has happened.
MISTAKES = (
    ValueError,
    KeyError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    flags.Error,
)
SHORT = {"model": "model.path", "data": "data.train", "eval_data": "data.eval"}  # flag -> key
HELP = ("--help", "-h", "-help", "--helpfull", "--helpshort", "-?")


def read(
    *, arguments: str = "", check: Callable[[], None] | None = None, reads: bool = False
) -> list[str]:
    """Read the flags; --help and mistakes are answered here, and end the program.

    A program calls this before it imports what takes seconds.

    Args:
        arguments: what may stand beside the flags, in a word for the help; "" = nothing.
        check: refuses flags that do not go together.
        reads: the model and the data that the config names are read.

    Returns:
        What stands beside the flags, for ``run``.
    """
    typed.take_interrupts()
    flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
    program = typed.program()
    if isinstance(sys.stdout, io.TextIOWrapper):  # no terminal has every character
        sys.stdout.reconfigure(errors="backslashreplace")
    if any(word in HELP for word in sys.argv[1:]):
        run(lambda _: print(usage(program, arguments)), [])
    debug = "--debug" in sys.argv[1:]
    if "config" in flags.FLAGS:
        flags.FLAGS["config"].parser = ConfigFile(reads)
    try:
        if "config" in flags.FLAGS and not arguments:
            sys.argv[1:] = spelled_out(sys.argv[1:])
        for word in sys.argv[1:]:
            if re.match(r"--?[^=\s]{100}", word):  # absl would look for its like until it fails
                raise Usage(f"no flag {word[:60]}...; --help shows all flags")
        _read_without_config()
        if sys.stderr.isatty() and not hasattr(sys.modules["__main__"], "CALLED"):
            print(
                f"{program} ...", file=sys.stderr, flush=True
            )  # a config and imports take seconds
        rest = flags.FLAGS(sys.argv)[1:]
        _check(rest, arguments)
    except flags.Error as error:
        if debug:
            raise
        print(f"{program}: {_cut(_flag_message(error))}", file=sys.stderr)
        sys.exit(2)
    with _told(program):
        if check is not None:
            check()
        if "config" in flags.FLAGS and not arguments:
            options = configs.read(flags.FLAGS.config)
            early.check(options, reads=reads)
            early.check_objective(options)
            if reads:
                early.check_model(options)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells much of little
    gc.disable()  # of what is imported next nothing is to be collected
    return rest


def _read_without_config() -> None:
    """Find mistakes in a program's other flags, before a config is made, which imports JAX.

    Raises:
        flags.Error: as absl finds them.
    """
    given = sys.argv[1 : sys.argv.index("--") if "--" in sys.argv else None]
    own = "config" in flags.FLAGS and any(re.match("--?config(=|$)", word) for word in given)
    if own:
        others = flags.FlagValues()
        for name in flags.FLAGS:
            flag = flags.FLAGS[name]
            if name == flag.name != "config":  # a short name comes with the flag
                others[name] = copy.deepcopy(flag)
        others([sys.argv[0], *(word for word in given if not re.match(r"--?(no)?config\b", word))])


def run(main: Callable[[Sequence[str]], None], rest: Sequence[str]) -> NoReturn:
    """Run a program's main and leave with the status.

    Args:
        main: takes what stands on the command line beside the flags.
        rest: that, as ``read`` returned it.
    """
    gc.freeze()  # imports stay, and a trace makes a hundred thousand objects that live long
    gc.set_threshold(20_000, 20, 20)
    gc.enable()
    with _told(typed.program()):
        typed.give_interrupts()
        try:
            main(rest)
            sys.stdout.flush()
        finally:
            typed.take_interrupts()
    sys.exit(0)


@contextlib.contextmanager
def _told(program: str) -> Iterator[None]:
    """Leave with a message and a status where something goes wrong."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        _leave(130)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(0)
    except Exception as error:
        if "--debug" in sys.argv[1:]:
            raise
        if isinstance(error, MISTAKES):
            print(f"{program}: {_with_its_flags(_cut(words(error)))}", file=sys.stderr)
            _leave(2)
        print(
            f"{program}: {type(error).__name__}: {words(error)}\n(--debug shows where)",
            file=sys.stderr,
        )
        _leave(1)


def spelled_out(words: Sequence[str]) -> list[str]:
    """Return a command line with its short form spelled out.

    >>> spelled_out(["kto", "--model", "m", "--data=rows.jsonl", "--workdir=w", "--config.seed=1"])
    ['--config=kto', '--config.model.path=m', '--config.data.train=rows.jsonl', '--workdir=w', \
'--config.seed=1']
    >>> spelled_out(["tiny:dpo"])
    ['--config=tiny:dpo']
    """
    if not words or words[0].startswith("-") or not words[0]:
        return _with_keys(words)
    rest = _with_keys(words[1:])
    folder = [] if any(re.match("--?workdir(=|$)", word) for word in rest) else _folder(words[0])
    return [f"--config={words[0]}", *rest, *folder]


def _with_keys(words: Sequence[str]) -> list[str]:
    """Return words with the keys in the place of their short flags."""
    found, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        key = SHORT.get(name.lstrip("-")) if name.startswith("-") else None
        if key is None:
            found.append(word)
        elif equals or rest and not rest[0].startswith("--"):
            found.append(f"--config.{key}={value if equals else rest.pop(0)}")
        else:
            raise Usage(f"{word}: expected a value")
    return found


def _folder(config: str) -> list[str]:
    """Return the flag of the folder where the short form trains, where a program asks for one."""
    asked = "workdir" in flags.FLAGS and flags.FLAGS["workdir"].validators
    name = re.sub(r"[^\w+-]+", "_", config.removesuffix(".py").removesuffix(".yaml")).strip("_")
    return [f"--workdir=runs/{name}"] if asked else []


def usage(program: str, arguments: str) -> str:
    """Return a program's help: what it does, its flags with their defaults, the config's keys."""
    main = sys.modules["__main__"]
    named = re.compile(r"(?:python -m align_jax\.|align-jax )(\w+)")
    about = named.sub(lambda found: _like(program, found[1]), main.__doc__ or program)
    lines = [about.strip(), "", "Flags:"]
    for flag in flags.FLAGS.get_flags_for_module(main):
        default = "" if flag.default in (None, "", [], False) else f" (default {flag.default})"
        text = re.sub(r"[.;]*\s+repeat this option.*", "; may be repeated.", flag.help)
        lines.append(f"  --{flag.name:<20} {text}{default}")
    lines.append(f"  --{'debug':<20} Show the traceback of an error.")
    if "config" in flags.FLAGS:
        about = f"Any key; {_like(program, 'config')} GROUP tells what each is:"
        space = " " * 25
        for short, key in {} if arguments else SHORT.items():
            lines.append(f"  --{short:<20} Short for --config.{key}.")
        lines.append(f"  --{'config.KEY=VALUE':<20} {about}")
        lines += textwrap.wrap(list_keys(), 100, initial_indent=space, subsequent_indent=space)
    if arguments:
        lines += ["", f"Arguments: {arguments}"]
    return "\n".join(lines)


def _like(program: str, other: str) -> str:
    """Return another program's name, written as this one's was typed."""
    return re.sub(r"\w+$", "sample --chat" if other == "chat" else other, program)


def output_path(name: str, *, folder: bool = False) -> pathlib.Path | None:
    """Return where a flag says that a result goes; None where it is not given.

    Args:
        name: of the flag, whose value is a path.
        folder: the result is a folder, not a file.

    Raises:
        Usage: nothing can be written there.
    """
    value = flags.FLAGS[name].value
    return writable(value, f"--{name}", folder=folder) if value else None


def rows_path(name: str, source: str) -> None:
    """Refuse a file for rows of JSON that they cannot be written to.

    Args:
        name: of the flag, whose value is a path.
        source: of the flag that names the rows that are read.

    Raises:
        Usage: it is the file that is read, its name is another kind of file's, or it cannot be
            written.
    """
    path, read = flags.FLAGS[name].value, flags.FLAGS[source].value
    if not path:
        return
    if read and os.path.exists(read) and os.path.exists(path) and os.path.samefile(path, read):
        raise Usage(f"--{name}={path} is the file that --{source} names: it would be lost")
    ending = os.path.splitext(path)[1]
    if ending in (".csv", ".tsv", ".parquet", ".arrow", ".feather", ".gz", ".bz2", ".xz"):
        raise Usage(f"--{name}={path}: JSON is written, which no {ending} holds: end it in .jsonl")
    output_path(name)


def writable(value: str, what: str, *, folder: bool = False) -> pathlib.Path:
    """Return a path that a result can be written to; what works for hours asks before.

    Folders that are missing on the way are made.

    Args:
        value: the path.
        what: was given, for the message: "--output", "workdir".
        folder: the result is a folder, not a file.

    Raises:
        Usage: nothing can be written there.
    """
    path = pathlib.Path(value)
    if "://" in value:
        return path  # its storage is asked when it is written
    if max(map(len, path.parts), default=0) > 255:
        raise Usage(f"{what}={value[:60]}...: a name of more than 255 characters")
    if path.exists() and path.is_dir() != folder:
        kind = ("a folder", "a file") if folder else ("a file", "a folder")
        raise Usage(f"{what}={value}: expected {kind[0]}, but there is {kind[1]}")
    above, new = path if folder else path.parent, not path.exists()
    try:
        if folder:
            above = next(one for one in (path, *path.absolute().parents) if one.exists())
            with tempfile.TemporaryFile(dir=above):
                pass
        else:
            above.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
            if new:
                path.unlink()
    except OSError as error:
        raise Usage(f"{what}={value}: cannot be written to {above}: {error.strerror}") from error
    return path


def check_there(model: str, workdir: str, *rows: str) -> None:
    """Refuse a checkpoint, a run's folder or sources of rows that are not there; "" = not given.

    Raises:
        FileNotFoundError, ValueError: as what reads them.
    """
    if model:
        hub.is_here(model)
    if workdir:
        early.find_record(workdir)
    for spec in rows:
        early.check_source(spec)


def define_dtype(of: str) -> None:
    """Define ``--dtype``, the same in every program that loads a checkpoint to compute with it."""
    flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "bfloat16", "float16"],
        f"{of}; default: on a CPU the checkpoint's own, elsewhere bfloat16.",
        module_name=sys.argv[0],
    )


def one_of(first: str, second: str) -> None:
    """Refuse both of two flags, and neither.

    Raises:
        Usage: with their names.
    """
    if bool(flags.FLAGS[first].value) == bool(flags.FLAGS[second].value):
        raise Usage(f"give one of --{first} and --{second}")


def belong(names: Sequence[str], to: str, given: bool) -> None:
    """Refuse flags that would have no effect.

    Args:
        names: of the flags.
        to: what they belong to, for the message.
        given: whether that was asked for.

    Raises:
        Usage: one of them is given all the same.
    """
    for name in names:
        if flags.FLAGS[name].present and not given:
            raise Usage(f"--{name} belongs to {to}, and would have no effect here")


def _check(rest: Sequence[str], arguments: str) -> None:
    """Refuse arguments that a program does not take, and flags that are empty or not finite.

    Raises:
        Usage: naming them.
    """
    if rest and not arguments:
        raise Usage(f"unknown arguments {' '.join(rest)}: flags begin with --")
    for flag in flags.FLAGS.get_flags_for_module(sys.modules["__main__"]):
        blank = isinstance(flag.value, str) and not flag.value.strip()
        if flag.present and flag.default is None and blank:
            raise Usage(f"--{flag.name} is empty")
        if isinstance(flag.value, float) and not math.isfinite(flag.value):
            raise Usage(f"--{flag.name}={flag.value}: expected a finite number")


def _flag_message(error: flags.Error) -> str:
    """Return what was wrong on the command line, in its words."""
    text = words(error)
    if of_config := value_message(error):
        return of_config
    if missing := re.findall(r"Flag --(\w+) must have a value other than None", text):
        return f"missing {', '.join(f'--{name}' for name in missing)}; --help shows all flags"
    if isinstance(error, flags.UnrecognizedFlagError):
        name = error.flagname
        own = flags.FLAGS.get_flags_for_module(sys.modules["__main__"])
        names = [*(f"--{flag.name}" for flag in own), "--help"]
        close = nearest(f"--{name}", names)
        if "did you mean" not in close and "config" in flags.FLAGS:  # a key, perhaps
            close = nearest_key(name).replace("mean '", "mean '--")
            names += [f"--{short}" for short in SHORT]
            if "'--config." not in close and not any(f"'{one}'" in close for one in names):
                close = ""  # an argument of the function alone
        return f"no flag --{name}" + (
            close if "did you mean" in close else "; --help shows all flags"
        )
    return re.sub(r"^flag (--\w+=)", r"\1", text)


def _with_its_flags(message: str) -> str:
    """Say of a message's flags that they are other programs', where this one takes no config."""
    if "config" in flags.FLAGS or "--config." not in message:
        return message
    return (
        f"{message}\n(--config.* are flags of the programs that take --config, such as train; here "
        "change the rows, or look for its like in --help)"
    )


def _cut(message: str) -> str:
    """Cut the words of a message that nobody reads: what was pasted by mistake."""
    return re.sub(r"(\S{500})\S+", r"\1...", message)


def _leave(status: int) -> NoReturn:
    """Exit; one of several processes at once, since JAX would wait minutes for its peers."""
    jax = sys.modules.get("jax")
    if jax is not None and sys.excepthook is not sys.__excepthook__:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
