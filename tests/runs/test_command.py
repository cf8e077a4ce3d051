# SPDX-License-Identifier: Apache-2.0
"""What a program says on a terminal: a mistake's message alone, its status, a short help."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TINY = f"--config={ROOT}/configs/tiny.py:dpo"


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((), "missing --config, --workdir"),
        (("--config=nowhere.py", "--workdir=x"), "no config file at nowhere.py"),
        ((TINY, "--workdir=x", "--config.optimizer.learning_rte=1"), "did you mean"),
        ((TINY, "--workdir=x", "--config.optimizer.b1=2"), "config.optimizer.b1 = 2.0: expected"),
        ((TINY, "--workdir=x", "--config.data.train=nofile.jsonl"), "no such file"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(arguments, said):
    found = run("align_jax.train", *arguments)
    assert found.returncode == 2 and said in found.stderr
    assert "Traceback" not in found.stderr and len(found.stderr.splitlines()) <= 3
    assert found.stdout == ""


def test_debug_shows_the_traceback():
    found = run("align_jax.train", TINY, "--workdir=x", "--config.optimizer.b1=2", "--debug")
    assert found.returncode == 1 and "Traceback" in found.stderr


def test_help_is_short_and_no_failure():
    found = run("align_jax.train", "--help")
    assert found.returncode == 0 and found.stderr == ""
    assert "--workdir" in found.stdout and len(found.stdout.splitlines()) < 40
