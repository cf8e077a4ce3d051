# SPDX-License-Identifier: Apache-2.0
"""Make the page of ``experiments/frontier.py``'s results: tables, sentences and a picture.

    python experiments/frontier_page.py RUNS docs/frontier.md

Writes the page, and beside it the picture as SVG.  No number of the page is typed by hand.

A frontier is the upper concave hull of a method's points (KL, reward) and of the start, flat behind
its last point: between two policies of one method lies the one that takes either by a coin, whose
reward is the mean and whose KL is at most the mean.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Row = Mapping[str, Any]
Point = tuple[float, float]  # KL in nats, reward
KLS = (1.0, 3.0, 10.0)  # nats at which frontiers are read
GRID = np.linspace(0.0, KLS[-1], 201)


def hull(points: Iterable[Point], start: float) -> np.ndarray:
    """Return the frontier's reward at each KL of ``GRID``.

    Args:
        points: of one method and seed.
        start: the reward at no KL.
    """
    upper: list[Point] = [(0.0, start)]
    for x, y in sorted((max(x, 0.0), y) for x, y in points):
        if y <= max(one for _, one in upper):
            continue
        while len(upper) > 1:
            (x0, y0), (x1, y1) = upper[-2:]
            if (y1 - y0) * (x - x0) > (y - y0) * (x1 - x0):
                break
            upper.pop()
        upper.append((x, y))
    return np.interp(GRID, *zip(*upper))


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Write a mean, and beside it the standard deviation over seeds."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def by(rows: Iterable[Row], *keys: str) -> dict[Any, list[Row]]:
    """Group rows by some of their fields, in their order."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        name = tuple(row[key] for key in keys)
        groups.setdefault(name if len(keys) > 1 else name[0], []).append(row)
    return groups


def frontiers(rows: Sequence[Row], start: float) -> dict[str, np.ndarray]:
    """Return each method's frontiers, [seeds, GRID]."""
    return {
        label: np.stack(
            [
                hull([(row["objective/kl"], row["reward"]) for row in own], start)
                for own in by(runs, "seed").values()
            ]
        )
        for label, runs in by(rows, "label").items()
    }


def frontier_section(rows: Sequence[Row], start: float, picture: str) -> list[str]:
    """Write the frontiers' table, best first."""
    found = frontiers(rows, start)
    gains = {label: (curves - start).mean(axis=1) for label, curves in found.items()}
    heads = [f"reward at {kl:g} nats" for kl in KLS]
    lines = [
        f"![Reward against KL, a point a measured policy, a line a method's frontier]({picture})",
        "",
        f"Best first: by the mean gain over the start's {start:.3f}, over KL from 0 to {KLS[-1]:g} "
        "nats (± standard deviation over seeds).",
        "",
        f"| method | seeds | mean gain | {' | '.join(heads)} | seconds a run |",
        "|---|---|---|" + "---|" * (len(KLS) + 1),
    ]
    for label in sorted(gains, key=lambda one: -gains[one].mean()):
        curves = found[label]
        cells = [spread([float(np.interp(kl, GRID, one)) for one in curves]) for kl in KLS]
        times = [row["seconds"] for row in rows if row["label"] == label and "seconds" in row]
        took = f"{statistics.median(times):.0f}" if times else ""
        gain = spread([float(one) for one in gains[label]])
        lines.append(f"| {label} | {len(curves)} | {gain} | {' | '.join(cells)} | {took} |")
    return lines


def points_table(rows: Sequence[Row], head: str) -> list[str]:
    """Write the last policies of ``METHOD: CONDITION`` labels: a row a condition."""
    lines = [f"| {head} | method | seeds | true reward | KL, nats |", "|---|---|---|---|---|"]
    for label, runs in by([row for row in rows if row["last"]], "label").items():
        method, condition = label.split(": ")
        reward, kl = ([row[name] for row in runs] for name in ("reward", "objective/kl"))
        lines.append(
            f"| {condition} | {method} | {len(runs)} | {spread(reward)} | {spread(kl, 2)} |"
        )
    return lines


def enough(rows: Sequence[Row]) -> list[str]:
    """Say from how many pairs on a method's gain at a KL is within a tenth of its best."""
    last, lines = [row for row in rows if row["last"]], []
    for method in dict.fromkeys(row["label"].split(": ")[0] for row in last):
        own = by((row for row in last if row["label"].startswith(f"{method}: ")), "label")
        reward = {
            int(label.split(": ")[1]): statistics.mean(row["reward"] for row in runs)
            for label, runs in own.items()
        }
        best = max(reward.values())
        first = min(count for count, value in reward.items() if value >= 0.9 * best)
        lines.append(
            f"- {method}: with {first:,} pairs the true reward is within a tenth of the best "
            f"({reward[first]:.3f} of {best:.3f}, which {max(reward, key=reward.get):,} pairs "  # type: ignore[arg-type]
            "gave)."
        )
    return lines


def overoptimized(rows: Sequence[Row]) -> list[str]:
    """Write the learned reward beside the true one, over a run's steps."""
    learned = [row for row in rows if "rewards/model" in row]
    lines = ["| method | step | learned reward | true reward | KL, nats |", "|---|---|---|---|---|"]
    for (label, step), runs in by(learned, "label", "step").items():
        cells = [
            spread([row[name] for row in runs], digits)
            for name, digits in (("rewards/model", 2), ("reward", 3), ("objective/kl", 2))
        ]
        lines.append(f"| {label} | {step} | {' | '.join(cells)} |")
    return lines


def draw(rows: Sequence[Row], start: float, path: pathlib.Path) -> None:
    """Draw the points and frontiers."""
    import matplotlib  # here, because it is only installed with the plots
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "align_jax"  # the same picture of the same results
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    colors = matplotlib.colormaps["tab20"].colors
    for number, (label, curves) in enumerate(frontiers(rows, start).items()):
        own, color = [row for row in rows if row["label"] == label], colors[number % len(colors)]
        x, y = ([row[name] for row in own] for name in ("objective/kl", "reward"))
        axes.scatter(x, y, s=10, color=color, alpha=0.6)
        axes.plot(GRID, curves.mean(axis=0), color=color, label=label, linewidth=1.2)
    axes.set(
        xlim=(0, KLS[-1]),
        xlabel="KL from the start, nats an answer",
        ylabel="true reward, held-out prompts",
    )
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, metadata={"Date": None})


def page(folder: pathlib.Path, output: pathlib.Path) -> str:
    """Return the page's text, and draw its picture."""

    def read(name: str) -> list[Row]:
        return [json.loads(line) for line in (folder / name).read_text().splitlines()]

    pairs, results = read("pairs.jsonl"), read("results.jsonl")
    studies = by(results, "study")
    start = studies["start"][0]["reward"]
    agree = statistics.mean(row["gap"] > 0 for row in pairs)
    hours = sum(row["seconds"] for row in results if row.get("seconds") and row["last"]) / 3600
    lines = [
        "# Which method, and how many pairs",
        "",
        "The controlled-sentiment experiment (arXiv 2305.18290, section 6.1) with a model small "
        "enough for two CPU cores: it continues a story's sentence by the next; the true reward is "
        "the answer's sentiment by a lexicon, in (-1, 1).  Preferences are drawn from it by "
        f"Bradley-Terry between the start's own samples: {len(pairs):,} pairs, {agree:.0%} of "
        f"which prefer what has more true reward.  {studies['start'][0]['prompts']:.0f} prompts of "
        f"other stories are held out; {hours:.1f} hours of training.",
        "",
        "```",
        "python experiments/frontier.py --model=TINYSTORIES_656K --stories=STORIES.txt \\",
        "    --lexicon=vader_lexicon.txt --output=RUNS --studies=frontier,pairs,noise,imbalance",
        "python experiments/frontier_page.py RUNS docs/frontier.md",
        "```",
    ]
    if rows := studies.get("frontier"):
        picture = output.with_suffix(".svg")
        draw(rows, start, picture)
        lines += ["", "## Reward for the divergence it costs", ""]
        lines += frontier_section(rows, start, picture.name)
    if rows := studies.get("pairs"):
        lines += ["", "## How many pairs", "", *points_table(rows, "pairs"), "", *enough(rows)]
        lines += ["", "## The learned reward and the true one", "", *overoptimized(rows)]
    if rows := studies.get("noise"):
        lines += ["", "## Flipped labels", "", *points_table(rows, "flipped")]
    if rows := studies.get("imbalance"):
        lines += ["", "## Fewer desirable answers", "", *points_table(rows, "desirable answers")]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python experiments/frontier_page.py RUNS PAGE.md")
    target = pathlib.Path(sys.argv[2])
    target.write_text(page(pathlib.Path(sys.argv[1]), target))
