# SPDX-License-Identifier: Apache-2.0
"""Every hint is a flag that works: what a message of the package names, a program or config has."""

import ast
import functools
import operator
import pathlib
import re

import pytest

from align_jax import losses
from align_jax.core import config as configs
from align_jax.core.options import Config

PACKAGE = pathlib.Path(__file__).parents[1] / "align_jax"
DEFAULTS = configs.defaults()
ALL = {"config", "debug", "help", "version", "dtype"}  # of runs.command and the command itself
OTHERS = {"dirty", "quick", "logprobs"}  # git's, launch/test.sh's, vLLM's
NO_KEYS = re.compile(
    r"model\.(layers|language_model|decoder\.layers|safetensors)|\w+\.jsonl?|data\.formats"
)  # tensors, files, a module
GROUPS = "|".join(name for name, value in DEFAULTS.items() if hasattr(value, "items"))
KEY = re.compile(
    rf"(?<![\w./-])(?:--)?(?:config\.)?((?:{GROUPS})\.[a-z_][a-z_.0-9]*[a-z0-9])(?![\w/(])"
)
SETTING = re.compile(r"^\s*=\s*(?:'([^'{}]*)'|([\w.]+))")


def literals(path):
    """Yield each text of a module that is no docstring, with its line; a field's value is {}."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    inside = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield node.lineno, "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docstrings | inside:
                yield node.lineno, node.value


TEXTS = {
    f"{path.relative_to(PACKAGE)}:{line}": text
    for path in sorted(PACKAGE.rglob("*.py"))
    for line, text in literals(path)
}


@functools.cache
def flags_of_programs():
    found = {}
    for path in PACKAGE.glob("[!_]*.py"):
        found[path.stem] = set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", path.read_text()))
    return found


def of_option(key):
    """Return a key's metadata; None for a group, a free dict or an objective's own option."""
    node = Config()
    *groups, name = key.split(".")
    for group in groups:
        node = getattr(node, group)
    return type(node).__dataclass_fields__[name].metadata


def mistakes(text):
    """Return what a text names that is not there."""
    wrong = []
    every = set().union(*flags_of_programs().values()) | ALL | OTHERS
    for flag in re.findall(r"(?<![\w-])--([a-z]\w*)(?![\w.])", text):
        if flag not in every:
            wrong.append(f"--{flag}")
    for found in KEY.finditer(text.replace("{}", "")):
        key = found[1]
        if NO_KEYS.fullmatch(key):
            continue
        *groups, name = key.split(".")
        if groups[0] == "objective" and name not in DEFAULTS.objective:
            if not any(name in row.options for row in losses.OBJECTIVES.values()):
                wrong.append(key)
            continue
        try:
            functools.reduce(operator.getitem, key.split("."), DEFAULTS)
        except (KeyError, TypeError):
            if groups[0] != "rewards" and key.rpartition(".")[0] not in ("model.config",):
                wrong.append(key)
            continue
        setting = SETTING.match(text[found.end() :])
        if setting and (choices := of_option(key).get("choices")):
            value = setting[1] if setting[1] is not None else setting[2]
            if value not in map(str, choices):
                wrong.append(f"{key}={value}")
    return wrong


def test_the_finder_finds():
    assert mistakes("set config.data.invalyd=drop") == ["data.invalyd"]
    assert mistakes("set --config.data.invalid=dropp, or --verbosse=1") == [
        "--verbosse",
        "data.invalid=dropp",
    ]
    assert not mistakes("--config.data.invalid=drop leaves them out; --workdir=x names it")


def test_every_flag_and_key_that_a_message_names_exists_and_takes_the_value():
    wrong = {place: found for place, text in TEXTS.items() if (found := mistakes(text))}
    assert not wrong


@pytest.mark.parametrize(
    "path", ["README.md", "CONTRIBUTING.md", "docs/pod.md", "docs/design.md", "docs/online.md"]
)
def test_the_documents_flags_exist(path):
    text = (PACKAGE.parent / path).read_text()
    every = set().union(*flags_of_programs().values()) | ALL
    for program, flag in re.findall(r"align[_-]jax[. ](\w+)[^\n|`]*? --(\w+)", text):
        assert flag in every, f"{program} --{flag}"
