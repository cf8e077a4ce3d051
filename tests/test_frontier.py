# SPDX-License-Identifier: Apache-2.0
"""The study of methods: its data and frontiers by hand, and the whole command in its small form."""

import json
import os
import pathlib
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from align_jax import losses
from align_jax.training.steps import StepSpec

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

    flipped = rows("pairs", 20, 0.2)
    assert [row["chosen"][0] for row in flipped] == ["b"] * 4 + ["a"] * 16
    assert rows("completions", 3) == [{"prompt": "p", "completion": f"a{i}"} for i in range(3)]
    thinned = rows("unpaired", 20, 0.0, 0.1)
    assert sum(row["label"] for row in thinned) == 2 and len(thinned) == 22


def test_a_claim_agrees_only_where_prompts_and_seeds_leave_no_doubt():
    rng = np.random.default_rng(0)

    def frontier_of(gain, strengths=1):
        return frontier_page.Frontier(
            np.zeros(201), gain, rng.normal(gain, 0.01, 200), 2, strengths
        )

    gains = {"DPO": 0.2, "SFT on chosen": 0.1, "KTO": 0.205, "IPO": 0.1}
    middle = {name: frontier_of(gain) for name, gain in gains.items()}
    found = {"middle": middle, "frontier": middle | {"IPO": frontier_of(0.5, strengths=3)}}
    claim = frontier_page.Claim("", "", "DPO", "SFT on chosen")
    ends = {
        claim: "| agrees",
        claim._replace(better="SFT on chosen", worse="DPO"): "| disagrees",
        claim._replace(better="KTO", worse="DPO"): "| cannot tell",
        claim._replace(better="SFT on chosen", worse="DPO", as_good=True): "| disagrees",
        claim._replace(better="RLOO"): "not run: RLOO |",
        claim._replace(better="IPO", worse="DPO"): "| disagrees",  # 0.5 is of three tries
    }
    for one, end in ends.items():
        assert frontier_page.verdict(one, found, 0.01).endswith(end)
    assert "one seed" in frontier_page.verdict(claim, found, None)


@pytest.mark.parametrize(
    ("gains", "says"),
    [
        ({30: 0.1, 100: 0.19, 300: 0.2}, "from 100 pairs on"),
        ({30: 0.19, 100: 0.1, 300: 0.2}, "300 pairs, the most tried, are not yet shown"),  # a dip
        ({30: 0.1, 100: 0.2, 300: 0.1}, "300 pairs, the most tried, are not yet shown"),
    ],
)
def test_pairs_are_enough_where_no_more_of_them_gain_a_tenth(gains, says):
    found = {
        f"DPO: {count}": frontier_page.Frontier(np.zeros(201), gain, np.zeros(200), 1)
        for count, gain in gains.items()
    }
    assert says in frontier_page.enough(found)[0]


def test_seeds_differ_by_the_gains_of_equal_runs():
    rows = [
        {"study": "frontier", "label": "DPO", "strength": 0.1, "flops": 1.0, "seed": seed}
        | {"objective/kl": 0.0001, "reward": reward}
        for seed, reward in enumerate((0.1, 0.3))
    ]
    assert frontier_page.seed_spread(rows[:1], 0.0) is None
    assert frontier_page.seed_spread(rows, 0.0) == pytest.approx(0.02**0.5, rel=0.01)
    more = [*rows, rows[0] | {"strength": 0.5}]  # the second seed lacks a strength
    assert frontier_page.complete(more) == [[more[0], more[2]]]


def test_the_small_form_measures_goes_on_and_makes_its_page(tmp_path, testdata):
    # as if the command had been stopped before IPO
    done = {"study": "frontier", "label": "DPO", "strength": 0.1, "seed": 0, "last": True}
    (tmp_path / "results.jsonl").write_text(json.dumps(done) + "\n")
    argv = [
        sys.executable,
        str(ROOT / "experiments" / "frontier.py"),
        "--small",
        "--middle",
        f"--model={testdata}/models/TinyStories-656K",
        f"--stories={testdata}/text/tinystories_sample_262k.txt",
        f"--lexicon={testdata}/reward/vader_lexicon.txt",
        f"--output={tmp_path}",
        "--methods=DPO,IPO",
        "--seeds=0",
    ]
    flags = os.environ["ALIGN_JAX_TEST_FLAGS"].replace("device_count=8", "device_count=1")
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    subprocess.run(argv, check=True, timeout=600, env=env)
    file = tmp_path / "results.jsonl"
    results = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["label"] for row in results].count("DPO") == 1  # was not computed again
    reward = {(row["label"], row["strength"]): row["reward"] for row in results[1:]}
    best = [reward["best of n", n] for n in (2, 4)]
    assert reward["start", 0] < best[0] < best[1]
    runs = [row for row in results if row["label"] == "IPO"]
    assert [row["step"] for row in runs] == [2, 4, 6] and runs[-1]["last"]
    assert all(np.isfinite(row["objective/kl"]) for row in runs)
    file.write_text("".join(json.dumps(row) + "\n" for row in results[1:]))
    frontier_page.main(file, tmp_path)
    text = (tmp_path / "frontier.md").read_text()
    assert "| IPO | 1 | 1 | " in text and (tmp_path / "frontier.svg").exists()
    assert "not run: DPO" in text


def test_a_page_says_what_the_rows_beside_the_study_say(tmp_path):
    results = frontier_page.read(ROOT / "experiments" / "frontier.jsonl.gz")
    frontier_page.feedback_page(results, tmp_path / "feedback.md")
    page = (tmp_path / "feedback.md").read_text()
    assert page == (ROOT / "docs" / "feedback.md").read_text()


def test_one_compiled_step_takes_every_strength():
    def spec_of(objective, options, rate=0.1):
        return StepSpec(None, None, losses.resolve(objective, options), optax.sgd(rate), None)

    def made(label, spec, given, strength):
        run = types.SimpleNamespace(step_spec=spec)
        return frontier.with_strength(run, frontier.METHODS[label], given, jnp.float32(strength))

    spec = spec_of("orpo", {"lam": 0.1})
    assert [getattr(term.loss, "lam", None) for term in made("ORPO", spec, 0.1, 0.5).terms] == [
        0.5,
        None,
    ]
    assert spec.terms[0].loss.lam == 0.1
    spec, params = made("SFT on chosen", spec_of("sft", {}), 0.1, 0.5), {"w": jnp.ones(2)}
    updates, _ = spec.optimizer.update(params, spec.optimizer.init(params))
    wanted, _ = optax.sgd(0.5).update(params, optax.sgd(0.5).init(params))
    np.testing.assert_allclose(updates["w"], wanted["w"], rtol=1e-6)
    ppo = spec_of("ppo", {"kl_coef": 0.1})  # the rollouts put it into the rewards
    assert made("PPO, true reward", ppo, 0.1, 0.5).terms == ppo.terms
    with pytest.raises(ValueError, match="sft has no option 'beta'"):
        made("DPO", spec_of("sft", {}), 0.1, 0.5)
