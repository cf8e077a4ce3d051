# SPDX-License-Identifier: Apache-2.0
"""The report: words, tables and a page from what runs have written; the page in a browser."""

import json
import pathlib
import re
import shutil
import subprocess

import pytest

from align_jax import report
from align_jax.losses import OBJECTIVES
from align_jax.runs import reported

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), "")
HALF = "a\ud83d \u2028 \x1b[2J \x85"  # half a character, and those that end lines or move a cursor
EVIL = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)> & \u2028"


def _run(folder, beta, offset, steps=4, samples=True):
    folder.mkdir(parents=True)
    config = {"objective": {"name": "dpo", "beta": beta}, "model": {"path": "tiny"}}
    record = {
        "config": {**config, "total_steps": steps},
        "devices": {"count": 8, "kind": "cpu"},
        "git_commit": "0123456789abcdef",
    }
    (folder / "config.json").write_text(json.dumps(record))
    rows = [{"step": 0, "time": 0.0, "eval/loss": 0.7, "eval/rewards/accuracies": 0.5}]
    for step in range(1, steps + 1):
        rows.append(
            {
                "step": step,
                "time": 900.0 * step,
                "loss": 0.7 - 0.1 * step + offset,
                "rewards/margins": None,
                "reward": 0.1 * step,
                "kl": 0.2 * step,
                "num_tokens": 10 * step,
                "tokens_per_second": 100.0 * step,
                "own/metric": 1.0,
            }
        )
    last = {"eval/loss": 0.25 + offset, "eval/rewards/accuracies": 0.9 - offset}
    rows.append({"step": steps, "time": 900.0 * steps + 1, **last})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = [
        {"step": step, "prompt": f"q{n}", "output": f"{EVIL} {step}", "reward": 0.5, "tokens": 3}
        for step in (1, steps)
        for n in range(3)
    ]
    if samples:
        (folder / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in said))
    return str(folder)


def test_two_runs_are_compared_in_words_and_tables(tmp_path):
    workdirs = [_run(tmp_path / "a", 0.1, 0.0), _run(tmp_path / "b", 0.5, 0.05)]
    path = report.write(reported.read_runs(workdirs), f"{tmp_path}/out")
    assert path.name == "report.html"
    text = (tmp_path / "out/report.md").read_text()
    assert "| a | dpo | tiny | 4 of 4 | 40 | 1.00 | 250 |  | 8 cpu | 0123456789 |" in text
    assert "| objective.beta | 0.1 | 0.5 |" in text and "total_steps |" not in text
    assert "| loss | 0.7 → 0.25 | 0.7 → 0.3 |" in text
    assert "objective.beta is 0.1 in a, 0.5 in b." in text
    assert "Held-out rewards/accuracies ends best in a, at 0.9 (b 0.85)." in text
    assert "Held-out loss ends best" not in text  # their scales differ with beta
    page = path.read_text()
    assert not re.search(r"(src|href)=['\"]?(https?:)?//", page) and EVIL not in page
    assert page.count("<script") == 2 and "default-src 'none'" in page


def test_runs_that_end_alike_are_all_the_best(tmp_path):
    runs = reported.read_runs([_run(tmp_path / name, 0.1, 0.0) for name in "ab"])
    assert "Held-out loss ends best in a and b, at 0.25." in reported.sentences(runs)


def test_half_characters_and_numbers_that_are_none_are_reported(tmp_path):
    workdir = pathlib.Path(_run(tmp_path / "a", 0.1, 0.0))
    row = {"step": 1, "prompt": [{"role": "user", "content": HALF}], "output": HALF}
    (workdir / "samples.jsonl").write_text(json.dumps({**row, "reward": float("nan")}) + "\n")
    page = report.write(reported.read_runs([str(workdir)]), f"{tmp_path}/out").read_text("utf-8")
    data = page.partition('id="data">')[2].partition("</script>")[0]
    assert HALF in json.dumps(json.loads(data), ensure_ascii=False).replace("\\u001b", "\x1b")


def test_runs_are_told_apart_and_one_named_twice_is_refused(tmp_path):
    folders = [_run(tmp_path / name / "run", 0.1, 0.0, samples=False) for name in "ab"]
    assert [run.name for run in reported.read_runs(folders)] == ["a/run", "b/run"]
    with pytest.raises(ValueError, match="named twice"):
        reported.read_runs([folders[0], folders[0] + "/"])


def test_a_folder_that_is_no_workdir_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no metrics.jsonl"):
        reported.read_runs([str(tmp_path)])


def test_files_of_samples_stand_side_by_side(tmp_path):
    rows = [{"prompt": "q", "output": "old", "other": "new", "win": 1.0}]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = report.read_columns([f"mine={tmp_path}/s.jsonl"])
    assert [name for name, _ in columns] == ["mine", "mine: the other"]
    data = reported.page_data([], columns)
    assert [one["rows"][0]["output"] for one in data["samples"]] == ["old", "new"]
    assert data["samples"][0]["rows"][0]["said"] == "win 1"
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n')
    for item, said in (("mine", "expected NAME=FILE"), ("x={}/bad.jsonl", "expected prompt and")):
        with pytest.raises(ValueError, match=said):
            report.read_columns([item.format(tmp_path)])


def test_what_an_objective_improves_has_a_direction():
    ways = {"up": 1, "down": -1}
    for name, row in OBJECTIVES.items():
        metric, way = row.metric.split()
        if metric != "entropy":  # kept up by a term of a sum, and no aim
            assert reported.direction(f"eval/{metric}") == ways[way], name


def test_a_long_run_is_thinned(tmp_path):
    (run,) = reported.read_runs([_run(tmp_path / "a", 0.1, 0.0, steps=5000, samples=False)])
    data = reported.page_data([run], [])
    assert all(len(line["points"]) <= 1500 for one in data["panels"] for line in one["lines"])
    assert data["runs"][0]["clock"][-1][0] == 5000


def test_the_page_of_a_run_that_goes_on_reads_itself_again(tmp_path, monkeypatch):
    runs = reported.read_runs([_run(tmp_path / "a", 0.1, 0.0)])
    live = report.write(runs, f"{tmp_path}/out", refresh=5).read_text()
    assert '<meta http-equiv="refresh" content="5">' in live and "step 4 of 4" in live
    assert 'http-equiv="refresh"' not in report.write(runs, f"{tmp_path}/out").read_text()


@pytest.mark.parametrize(
    ("config", "steps", "rows", "ended"),
    [
        ({"total_steps": 4}, 0, [(3, 0.5)], False),
        ({"total_steps": 4}, 0, [(4, None)], True),
        ({"total_steps": 4}, 0, [(0, 0.5), (4, None)], False),  # its last evaluation comes
        ({"total_steps": 0}, 4, [(0, 0.5), (4, None), (4, 0.6)], True),  # counted in epochs
        ({}, 0, [(4, None)], False),
        ({"eval": {"stop_metric": "eval/x", "patience": 2}}, 9, [(1, 0.5), (2, 0.4)], False),
        ({"eval": {"stop_metric": "eval/x", "patience": 2}}, 9, [(1, 3), (2, 2), (3, 1)], True),
    ],
)
def test_a_run_has_ended_once_its_last_evaluation_is_there(config, steps, rows, ended):
    made = [{"step": n, **({"loss": 1.0} if x is None else {"eval/x": x})} for n, x in rows]
    assert reported.Run("a", {"config": config, "steps": steps}, made, []).ended == ended


TRIED = """<script>addEventListener("load", () => setTimeout(() => {
  const wrong = [], want = (that, name) => that || wrong.push(name);
  const plots = [...document.querySelectorAll("figure")];
  const first = plots[0].querySelector(":scope > svg");
  const box = first.getBoundingClientRect(), at = (share) => box.left + box.width * share;
  const fire = (kind, share, svg = first) => svg.dispatchEvent(new PointerEvent(
    kind, { clientX: at(share), clientY: box.top + 60, button: 0, bubbles: true }));
  const said = () => document.body.dataset.tried = wrong.join("; ") || "all well";
  const other = plots.find((one) => one.textContent.includes("reward against KL"))
    .querySelector(":scope > svg");
  const range = () => [...other.querySelectorAll("text")].map((one) => one.textContent).join();
  const kept = sessionStorage.getItem("kept");
  if (kept) { want(range() === kept, "zoom after a reload"); return said(); }
  want(document.title.startsWith("Report"), "title");
  want(plots.length >= 6, "plots " + plots.length);
  want(plots.every((one) => one.querySelector("path.curve")), "a plot without a curve");
  want(document.documentElement.scrollWidth <= innerWidth, "wider than the window");
  fire("pointermove", 0.5);
  want(document.getElementById("tip").textContent.includes("step"), "tip");
  const labels = () => [...first.querySelectorAll("text")].map((one) => one.textContent).join();
  want(!document.querySelector("path.raw"), "short curves as they are");
  const before = labels();
  fire("pointerdown", 0.3); fire("pointermove", 0.6); fire("pointerup", 0.6);
  want(labels() !== before, "zoom"); want(!document.getElementById("reset").hidden, "reset");
  document.getElementById("reset").click();
  want(labels() === before, "whole range");
  const curves = () => first.querySelectorAll("path.curve").length, all = curves();
  document.querySelector(".chip").click(); want(curves() < all, "hidden run");
  document.querySelector(".chip").click(); want(curves() === all, "shown run");
  const axis = document.querySelector("#bar select");
  axis.value = "tokens"; axis.dispatchEvent(new Event("change"));
  want(labels() !== before, "tokens");
  const theme = document.getElementById("theme");
  theme.click(); theme.click();
  want(document.documentElement.classList.contains("dark"), "dark");
  const rows = () => document.querySelectorAll("#samples > div").length, many = rows();
  const search = document.querySelector("input[type=search]");
  search.value = "q1"; search.dispatchEvent(new Event("input"));
  want(rows() < many && document.querySelector("#samples mark"), "search");
  const whole = range();
  fire("pointerdown", 0.4, other); fire("pointermove", 0.6, other); fire("pointerup", 0.6, other);
  want(range() !== whole, "zoom of what is not over steps");
  if (wrong.length) return said();
  sessionStorage.setItem("kept", range());
  location.reload();
}, 200));
addEventListener("error", (event) => document.body.dataset.tried = event.message);</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here, nor could launch/test.sh fetch it")
@pytest.mark.parametrize(("count", "width"), [(1, 400), (2, 900), (6, 1500)])
def test_the_page_works_in_a_browser(count, width, tmp_path):
    workdirs = [_run(tmp_path / f"r{n}", 0.1 + n, 0.01 * n) for n in range(count)]
    page = report.write(reported.read_runs(workdirs), f"{tmp_path}/out")
    page.write_text(page.read_text().replace("</body>", f"{TRIED}</body>"))
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={width},900",
    ]
    command += ["--virtual-time-budget=2000", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    tried = re.search('data-tried="([^"]*)"', done.stdout)
    assert tried and tried[1] == "all well", tried or done.stderr[-2000:]
    assert "owned" not in re.sub(
        r"(?s)<script.*?</script>", "", done.stdout.split("<title>")[1][:99]
    )


def test_the_wheel_holds_the_page():
    files = (pathlib.Path(__file__).parents[1] / "setup.cfg").read_text()
    assert "align_jax.runs = report.html" in files
