# SPDX-License-Identifier: Apache-2.0
"""The wheel: every package, the recipes by name, the licence, the command; one version."""

import configparser
import os
import pathlib
import runpy
import shutil
import subprocess
import sys
import zipfile

import pytest

import align_jax
from align_jax import __main__ as command
from align_jax.runs import config_file

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built in a copy of what it is made of."""
    copy, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("align_jax", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = "import sys, setuptools.build_meta as b; b.build_wheel(sys.argv[1])"
    command = [sys.executable, "-W", "ignore", "-c", build, str(made)]
    subprocess.run(command, cwd=copy, check=True, capture_output=True, timeout=120)
    [built] = made.glob("*.whl")
    return built


def test_the_wheel_holds_all_that_a_checkout_runs_with(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [folder] = {name.split("/")[0] for name in names if ".dist-info" in name}
        entry = archive.read(f"{folder}/entry_points.txt").decode()
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "align_jax").rglob("*.py")}
    expected |= {f"align_jax/recipes/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    expected |= {"align_jax/py.typed", "align_jax/runs/report.html"}
    assert expected == {name for name in names if not name.startswith(folder)}
    assert f"{folder}/licenses/LICENSE" in names
    assert "align-jax = align_jax.__main__:main" in entry
    assert wheel.name.startswith(f"align_jax-{align_jax.__version__}-")


def test_the_installed_command_reads_recipes_by_name(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    start = "import sys, align_jax.__main__ as m; sys.argv[0] = 'align-jax'; m.main()"
    found = subprocess.run(
        [sys.executable, "-c", start, "config", "optimizer.learning_rate", "--config=dpo_7b"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.split()[:2] == ["optimizer.learning_rate", "5e-07"]


def test_who_reads_the_list_may_leave_early():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "align_jax"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=-1, text=True, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("terminal, line", [(False, ""), (True, "align-jax train ...\n")])
def test_a_terminal_has_a_line_before_the_imports(terminal, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["align-jax", "train", "dpo"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(runpy, "run_module", lambda *_, **__: print("imported", file=sys.stderr))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    command.main()
    assert capsys.readouterr().err == f"{line}imported\n"


def test_the_packages_are_those_that_there_are():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folders = [path.parent for path in (ROOT / "align_jax").rglob("__init__.py")]
    names = {str(path.relative_to(ROOT)).replace(os.sep, ".") for path in folders}
    assert set(setup["options"]["packages"].split()) == names | {"align_jax.recipes"}


def test_a_recipe_s_file_and_its_name_are_one():
    assert config_file.recipes().keys() == {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert config_file.load("dpo_7b") == config_file.load(str(ROOT / "configs/dpo_7b.py"))
    assert config_file.load("online_dpo") == config_file.load("start:online_dpo")
