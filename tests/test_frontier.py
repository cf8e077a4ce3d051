# SPDX-License-Identifier: Apache-2.0
"""The study of methods: its data and frontiers by hand, and the whole command in its small form."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "experiments"))
import frontier  # noqa: E402
import frontier_page  # noqa: E402


@pytest.mark.parametrize(
    ("points", "wanted"),
    [
        ([], [0.2, 0.2, 0.2, 0.2]),
        ([(2.0, 0.6)], [0.2, 0.4, 0.6, 0.6]),  # flat behind the last point
        ([(1.0, 0.3), (2.0, 0.6)], [0.2, 0.4, 0.6, 0.6]),  # a point below the chord is none
        ([(1.0, 0.5), (2.0, 0.6), (3.0, 0.1)], [0.2, 0.5, 0.6, 0.6]),  # nor one that is worse
        ([(3.0, 0.1)], [0.2, 0.2, 0.2, 0.2]),
    ],
)
def test_a_frontier_is_the_upper_hull_of_its_points(points, wanted):
    curve = frontier_page.hull(points, 0.2)
    found = np.interp([0.0, 1.0, 2.0, 10.0], frontier_page.GRID, curve)
    np.testing.assert_allclose(found, wanted, atol=1e-9)


def test_feedback_is_the_pairs_turned_split_and_thinned(tmp_path):
    pairs = [
        {"prompt": "p", "chosen": f"a{i}", "rejected": f"b{i}", "draw": i / 20} for i in range(20)
    ]
    frontier.write_rows(tmp_path / "pairs.jsonl", pairs)

    def rows(*fields):
        path = pathlib.Path(frontier.feedback(frontier.Data(*fields), tmp_path))
        return [json.loads(line) for line in path.read_text().splitlines()]

    flipped = rows("pairs", 0, 0.2)
    assert [row["chosen"][0] for row in flipped] == ["b"] * 4 + ["a"] * 16
    assert rows("completions", 3) == [{"prompt": "p", "completion": f"a{i}"} for i in range(3)]
    thinned = rows("unpaired", 0, 0.0, 0.1)
    assert sum(row["label"] for row in thinned) == 2 and len(thinned) == 22


def test_the_small_form_measures_goes_on_and_makes_its_page(tmp_path, testdata):
    pytest.importorskip("matplotlib")
    argv = [
        sys.executable,
        str(ROOT / "experiments" / "frontier.py"),
        "--small",
        f"--model={testdata}/models/TinyStories-656K",
        f"--stories={testdata}/text/tinystories_sample_262k.txt",
        f"--lexicon={testdata}/reward/vader_lexicon.txt",
        f"--output={tmp_path}",
        "--methods=IPO",
        "--seeds=0",
    ]
    flags = os.environ["ALIGN_JAX_TEST_FLAGS"].replace("device_count=8", "device_count=1")
    how = {"check": True, "timeout": 600, "env": os.environ | {"XLA_FLAGS": flags}}
    subprocess.run(argv, **how)
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    reward = {(row["label"], row["strength"]): row["reward"] for row in results}
    best = [reward["best of n", n] for n in (2, 4, 8, 16)]
    assert reward["start", 0] < best[0] < best[1] < best[2] < best[3]
    runs = [row for row in results if row["label"] == "IPO"]
    assert [row["step"] for row in runs] == [2, 4, 6] and runs[-1]["last"]
    assert all(np.isfinite(row["objective/kl"]) for row in runs)
    again = subprocess.run(argv, capture_output=True, text=True, **how)
    assert (tmp_path / "results.jsonl").read_text().count("\n") == len(results)
    assert "IPO" not in again.stdout  # nothing was computed again
    text = frontier_page.page(tmp_path, tmp_path / "page.md")
    assert "| IPO | 1 | " in text and (tmp_path / "page.svg").exists()
