# SPDX-License-Identifier: Apache-2.0
"""The floors of the package: a module imports from floors below its own, or from its own folder."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "align_jax"
FLOORS = {
    "core": 0,
    "parallel": 1,
    "losses": 1,
    "data": 1,
    "models": 2,
    "inference": 3,
    "training": 3,
    "online": 4,
    "evals": 5,
    "": 6,
}  # "": the programs
FORBIDDEN = {
    "losses": ("flax", "align_jax.models"),
    "data": ("jax", "flax"),
    "core": ("flax", "orbax"),
}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def imports(path: pathlib.Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{name.name}" for name in node.names]
    return found


def folder(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else ""


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_module_imports_from_floors_below_or_its_own_folder(path):
    own = path.parts[0] if len(path.parts) > 1 else ""
    for name in imports(path):
        if not name.startswith("align_jax"):
            continue
        other = folder(name)
        assert other == own or FLOORS[other] < FLOORS[own], (
            f"{path} (floor {FLOORS[own]}) imports {name}"
        )


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_module_leaves_out_what_its_folder_must_not_know(path):
    for forbidden in FORBIDDEN.get(path.parts[0], ()):
        names = [
            name for name in imports(path) if name == forbidden or name.startswith(forbidden + ".")
        ]
        assert not names, f"{path} imports {names}"


@pytest.mark.parametrize("path", [p for p in MODULES if len(p.parts) > 1], ids=str)
def test_only_programs_and_core_config_read_config_dicts(path):
    if path == pathlib.Path("core/config.py"):
        return
    assert not [name for name in imports(path) if name.startswith("ml_collections")]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_file_is_short_and_carries_its_license(path):
    text = (PACKAGE / path).read_text()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert text.count("\n") <= 400
