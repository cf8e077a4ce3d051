# SPDX-License-Identifier: Apache-2.0
"""The report: tables and curves from what a run has written."""

import json

import pytest

from align_jax import report


def _run(folder, beta, offset):
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(
            {
                "config": {
                    "objective": {"name": "dpo", "beta": beta},
                    "model": {"path": "tiny"},
                    "total_steps": 4,
                },
                "devices": {"count": 8, "kind": "cpu"},
                "git_commit": "0123456789abcdef",
            }
        )
    )
    rows = [{"step": 0, "time": 0.0, "eval/loss": 0.7}]
    rows += [
        {
            "step": step,
            "time": 900.0 * step,
            "loss": 0.7 - 0.1 * step + offset,
            "rewards/margins": None,
            "num_tokens": 10 * step,
            "tokens_per_second": 100.0 * step,
        }
        for step in range(1, 5)
    ]
    rows += [{"step": 4, "time": 3601.0, "eval/loss": 0.25 + offset}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("image", ["svg", "png"])
def test_two_runs_are_compared(tmp_path, image):
    pytest.importorskip("matplotlib")
    _run(tmp_path / "a", 0.1, 0.0)
    _run(tmp_path / "b", 0.5, 0.05)
    runs = [report.read_run(str(tmp_path / name)) for name in "ab"]
    assert report.write(runs, f"{tmp_path}/out", smooth=2, image=image).name == "report.md"
    text = (tmp_path / "out/report.md").read_text()
    assert "| a | dpo | tiny | 4 of 4 | 40 | 1.00 | 250 |  | 8 cpu | 0123456789 |" in text
    assert "| objective.beta | 0.1 | 0.5 |" in text and "total_steps |" not in text
    assert "| b | eval/loss | 0.7 | 0.3 | 0.3 (step 4) | 0.7 (step 0) |" in text
    assert sorted(path.name for path in (tmp_path / "out/curves").iterdir()) == [
        f"loss.{image}",
        f"tokens_per_second.{image}",
    ]  # no panel for a metric that has no value
    assert (tmp_path / "out/report.html").read_text().count("<img") == 2


def test_a_folder_that_is_no_workdir_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no metrics.jsonl"):
        report.read_run(str(tmp_path))
