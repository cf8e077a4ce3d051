# SPDX-License-Identifier: Apache-2.0
"""The docs' pages build without a warning, their rows are read, their commands run.

Blocks marked ``console`` are run as they stand, in a folder of their own, with a made model in the
place of the one that they name; those marked ``sh`` are not (a cloud, a compilation of a minute).
"""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import types

import pytest

import align_jax
from align_jax.data import formats

ROOT = pathlib.Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests/faults"))

import processes  # noqa: E402

NAMED = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the model that the pages name
PAGES = sorted([*(ROOT / "docs/tutorials").glob("*.md"), ROOT / "docs/install.md"])


def test_the_site_builds_without_a_warning(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert "label_smoothing" in (tmp_path / "site/reference/objectives/index.html").read_text()


def test_every_format_has_an_example_that_is_read_as_it():
    lines = (ROOT / "docs/formats.jsonl").read_text().splitlines()
    examples = {one["format"]: one["row"] for one in map(json.loads, lines)}
    assert list(examples) == list(formats.FORMATS) and len(lines) == len(examples)
    for name, row in examples.items():
        assert formats.detect([row]) == name
        assert formats.read(row, name, chat=True)


def test_the_lines_beside_trl_s_ask_for_runs(tiny_chat, monkeypatch):
    here, theirs = re.findall(
        r"^```python\n(.*?)^```",
        (ROOT / "docs/coming_from.md").read_text(),
        re.DOTALL | re.MULTILINE,
    )
    compile(theirs, "coming_from.md", "exec")
    asked = []

    def show(config, rows, **keys):
        small = {"batch_size": 8, "max_length": 64}
        if config == "grpo":
            small["rollout.max_new_tokens"] = 8
        shown = align_jax.show_batch(config, rows, **keys, **small)
        asked.append((config, shown.about[0].partition(":")[0], len(shown.examples)))
        return types.SimpleNamespace(evaluate=dict, export=str)

    monkeypatch.setattr(align_jax, "train", show)
    page = types.ModuleType("coming_from")
    monkeypatch.setitem(sys.modules, "coming_from", page)
    vars(page).update(
        MODEL=tiny_chat,
        pairs=[{"prompt": f"{n}?", "chosen": "Yes.", "rejected": "No."} for n in range(40)],
        thumbs=[{"prompt": f"{n}?", "completion": "Yes.", "label": n % 2 == 0} for n in range(40)],
        sums=[{"prompt": f"{n} + 1", "answer": str(n + 1)} for n in range(40)],
    )
    exec(here, vars(page))
    assert asked == [(name, name, 3) for name in ("dpo", "kto", "reward", "grpo")]


def commands(page):
    """Return a page's commands: whole scripts for the shell, and the programs' arguments."""
    for block in re.findall(r"^```console\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        script = ""
        for line in block.replace("\\\n", " ").splitlines(keepends=True):
            if line.startswith("align-jax "):
                yield script
                yield shlex.split(line)[1:]
                script = ""
            else:
                script += line
        yield script


def quickly(words):
    """Return a program's arguments with fewer rows, where the page says nothing of them."""
    if words[0] != "train" or not words[1].startswith("--config=tiny:"):
        return words
    return [*words[:2], "--config.batch_size=4", "--config.eval.max_examples=4", *words[2:]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_s_commands_run(page, tiny_chat, tmp_path):
    shell = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MODEL": tiny_chat,
        "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    ran = 0
    for command in commands(page):
        if isinstance(command, str):
            subprocess.run(
                ["bash", "-euc", command.replace(NAMED, tiny_chat)],
                cwd=tmp_path,
                env=shell,
                check=True,
                timeout=120,
            )
            continue
        words = quickly([word.replace("$MODEL", tiny_chat) for word in command])
        started = processes.fork("align_jax", words, log=tmp_path / "log", folder=tmp_path)
        processes.wait(started, tmp_path / "log")
        ran += 1
    assert ran
