# SPDX-License-Identifier: Apache-2.0
"""A workdir remembers its configuration and refuses another."""

import json
import os
import re
import subprocess

import pytest

from align_jax.storage import workdir

CONFIG = {
    "seed": 0,
    "total_steps": 10,
    "model": {"path": "x", "remat": "full", "lora": {"rank": 0}},
    "mesh": {"data": 1},
    "data": {"train": ("a", "b")},
    "objective": {"name": "dpo", "beta": 0.1},
}
MAY_CHANGE = {"total_steps", "mesh.data", "model.remat", "old_key"}


def _changed(group, key, value):
    return CONFIG | ({group: CONFIG[group] | {key: value}} if group else {key: value})


def _started(folder):
    workdir.write_record(folder, CONFIG | {"old_key": 2})
    (folder / "checkpoints" / "4").mkdir(parents=True)


def test_the_commit_of_a_tree_is_asked_for_without_a_lock(tmp_path, monkeypatch):
    file = tmp_path / "workdir.py"
    file.write_text("a")
    git = ["git", "-c", "user.name=n", "-c", "user.email=n@n"]
    for asked in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *asked], cwd=tmp_path, check=True)
    monkeypatch.setattr(workdir, "__file__", str(file))
    (index,) = tmp_path.glob(".git/index")
    os.utime(file, (1, 1))  # looked at anew, as of any file that was touched
    before = index.read_bytes()
    assert re.fullmatch("[0-9a-f]{40}", workdir.git_commit())
    assert index.read_bytes() == before
    file.write_text("ab")
    assert re.fullmatch(r"[0-9a-f]{40}\+", workdir.git_commit())


def test_the_record_holds_what_is_needed_to_repeat_the_run(tmp_path):
    workdir.write_record(tmp_path, CONFIG)
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["config"]["objective"] == {"name": "dpo", "beta": 0.1}
    assert (
        record["versions"]["jax"]
        and record["devices"]["count"] == 8
        and record["devices"]["platform"] == "cpu"
    )
    assert len(record["git_commit"].rstrip("+")) in (0, 40)


def test_another_configs_checkpoints_are_refused_with_the_keys(tmp_path):
    _started(tmp_path)
    other = _changed("objective", "beta", 0.2) | {"seed": 1, "new_key": 3}
    with pytest.raises(ValueError) as error:
        workdir.check(tmp_path, other, MAY_CHANGE - {"old_key"})
    for line in (
        "objective.beta: 0.1 there, 0.2 here",
        "seed: 0 there, 1 here",
        "new_key: None there, 3 here",
        "old_key: 2 there, no such key here",
        "Go on with --config.objective.beta=0.1 --config.seed=0, or",
    ):
        assert line in str(error.value)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="holds checkpoints, and no config.json"):
        workdir.check(tmp_path, CONFIG, MAY_CHANGE)


@pytest.mark.parametrize(
    "group, key, value",
    [
        (None, "total_steps", 20),
        ("mesh", "data", 4),
        ("model", "remat", "none"),
        ("data", "train", ["a", "b"]),
    ],
)
def test_a_run_may_go_on_where_nothing_that_it_computes_changes(tmp_path, group, key, value):
    _started(tmp_path)
    workdir.check(tmp_path, _changed(group, key, value), MAY_CHANGE)


@pytest.mark.parametrize(
    "group, key, value",
    [("model", "lora", {"rank": 4}), ("data", "train", ["a"]), ("model", "path", "y")],
)
def test_what_changes_the_computation_may_not(tmp_path, group, key, value):
    _started(tmp_path)
    with pytest.raises(ValueError, match=f"{group}.{key}"):
        workdir.check(tmp_path, _changed(group, key, value), MAY_CHANGE)


def test_a_workdir_without_checkpoints_takes_any_config(tmp_path):
    workdir.check(tmp_path / "new", CONFIG, MAY_CHANGE)
    workdir.write_record(tmp_path, CONFIG)
    workdir.check(tmp_path, _changed("objective", "beta", 0.5), MAY_CHANGE)
