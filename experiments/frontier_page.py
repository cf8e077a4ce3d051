# SPDX-License-Identifier: Apache-2.0
"""Make the pages of ``experiments/frontier.py``'s results: tables, claims, sentences, pictures.

    python experiments/frontier_page.py RUNS/results.jsonl docs

Writes docs/frontier.md and docs/how_many_pairs.md, each with its picture as SVG, and
docs/feedback.md.  No number of a page is typed by hand.

    results.jsonl ─ a point: a policy's (KL, reward), mean over seeds ─ frontier ─ gain ─ claims

A frontier is the upper concave hull of a method's points and of the start, flat behind its last
point: between two policies of one method lies the one that takes either by a coin, whose reward is
the mean and whose KL is at most the mean.  A gain is the frontier's mean height above the start,
over KL from 0 to the last of ``KLS``.  Its interval comes from drawing the held-out prompts anew,
the same for all methods, and moving each run by what seeds differ.
"""

from __future__ import annotations

import collections
import gzip
import json
import pathlib
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import frontier
import numpy as np

Row = Mapping[str, Any]
Point = tuple[float, float]  # KL in nats, reward
KLS = (1.0, 3.0, 10.0)  # nats at which frontiers are read
GRID = np.linspace(0.0, KLS[-1], 201)
DRAWS = 200
LEARNED = "PPO, learned reward"


def hull(points: Iterable[Point], start: float) -> np.ndarray:
    """Return the frontier's reward at each KL of ``GRID``.

    Args:
        points: of one method.
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


def by(rows: Iterable[Row], *keys: str) -> dict[Any, list[Row]]:
    """Group rows by some of their fields, in their order."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        name = tuple(row.get(key, 0) for key in keys)
        groups.setdefault(name if len(keys) > 1 else name[0], []).append(row)
    return groups


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Write a mean, and beside it the standard deviation over seeds."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def points(rows: Iterable[Row]) -> list[Point]:
    """Return where policies are."""
    return [(row["objective/kl"], row["reward"]) for row in rows]


def seed_spread(rows: Iterable[Row], start: float) -> float | None:
    """Return by how much the gains of equal runs of several seeds differ: the standard deviation,
    pooled; None where nothing has several seeds."""
    gains: dict[Any, list[float]] = {}
    trained = [row for row in rows if "flops" in row]
    for (*run, _), own in by(trained, "study", "label", "strength", "seed").items():
        gain = float((hull(points(own), start) - start).mean())
        gains.setdefault(tuple(run), []).append(gain)
    variances = [statistics.variance(several) for several in gains.values() if len(several) > 1]
    return statistics.mean(variances) ** 0.5 if variances else None


def complete(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the rows of each seed of a method, of those seeds that have its most strengths."""
    seeds = list(by(rows, "seed").values())
    strengths = [len({row["strength"] for row in own}) for own in seeds]
    return [own for own, count in zip(seeds, strengths) if count == max(strengths)]


class Frontier(NamedTuple):
    """What a method reaches.

    Attributes:
        curve: reward at each KL of ``GRID``, mean over seeds.
        gain: its mean above the start's.
        draws: of the gain, [DRAWS].
        seeds: of which it is made.
        strengths: of each seed.
    """

    curve: np.ndarray
    gain: float
    draws: np.ndarray
    seeds: int
    strengths: int = 1

    @property
    def interval(self) -> str:
        """The gain, and the middle 95 % of its draws where there are any."""
        low, high = np.quantile(self.draws, (0.025, 0.975))
        return f"{self.gain:.3f}" + (f" ({low:.3f} to {high:.3f})" if low < high else "")


def frontiers(rows: Sequence[Row], start: Row, seeds_differ: float | None) -> dict[str, Frontier]:
    """Return each label's frontier.

    Args:
        rows: of one study.
        start: the start's result.
        seeds_differ: see ``seed_spread``; None counts as nothing.
    """
    rng, count = np.random.default_rng(0), len(start["rewards"])
    drawn = rng.integers(0, count, (DRAWS, count))
    begin = np.asarray(start["rewards"])[drawn].mean(axis=1)

    def drawn_gains(own: Sequence[Row]) -> np.ndarray:
        kls = [row["objective/kl"] for row in own]
        moved = [np.asarray(row["rewards"])[drawn].mean(axis=1) for row in own]
        return np.asarray(
            [(hull(zip(kls, at), low) - low).mean() for *at, low in zip(*moved, begin)]
        )

    found = {}
    for label, rows_of in by(rows, "label").items():
        seeds = complete(rows_of)
        curve = np.mean([hull(points(own), start["reward"]) for own in seeds], axis=0)
        gain = float((curve - start["reward"]).mean())
        draws = np.full(DRAWS, gain)
        if all("rewards" in row for row in rows_of):  # best of n is no trained policy
            draws = np.mean([drawn_gains(own) for own in seeds], axis=0)
            draws += (seeds_differ or 0.0) / len(seeds) ** 0.5 * rng.standard_normal(DRAWS)
        strengths = len({row["strength"] for row in seeds[0]})
        found[label] = Frontier(curve, gain, draws, len(seeds), strengths)
    return found


def frontier_section(rows: Sequence[Row], found: Mapping[str, Frontier]) -> list[str]:
    """Write the frontiers' table, best first."""
    heads = [f"reward at {kl:g} nats" for kl in KLS]
    lines = [
        "| method | seeds | strengths | gain (95 %) | " + " | ".join(heads) + " | KL measured |",
        "|---|---|---|---|" + "---|" * (len(KLS) + 1),
    ]
    for label in sorted(found, key=lambda one: -found[one].gain):
        one, own = found[label], [row for row in rows if row["label"] == label]
        own = sum(complete(own), [])
        cells = [f"{np.interp(kl, GRID, one.curve):.3f}" for kl in KLS]
        kls = [row["objective/kl"] for row in own]
        lines.append(
            f"| {label} | {one.seeds} | {one.strengths} | {one.interval} | {' | '.join(cells)} | "
            f"{min(kls):.1f} to {max(kls):.1f} |"
        )
    return lines


def speed_section(rows: Sequence[Row]) -> list[str]:
    """Write what each method spends until it is as good as the best of n samples of the start."""
    goals = {
        row["strength"]: row["reward"]
        for row in rows
        if row["label"] == "best of n" and row["strength"] in (2, 4)
    }
    heads = [f"best of {n}: {reward:.3f}" for n, reward in goals.items()]
    lines = ["| method | " + " | ".join(heads) + " |", "|---|" + "---|" * len(goals)]
    for label, own in by((row for row in rows if "flops" in row), "label").items():
        cells = []
        for goal in goals.values():
            there = [row for row in own if row["reward"] >= goal]
            least = min(there, key=lambda row: row["flops"], default=None)
            cells.append(
                f"{least['flops'] / 1e12:.2f} TFLOP, {least['seconds']:.0f} s, "
                f"{least['objective/kl']:.1f} nats"
                if least
                else "not reached"
            )
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


class Claim(NamedTuple):
    """A paper's claim that one method gains more than another, or as much but for a tenth."""

    paper: str
    says: str
    better: str
    worse: str
    study: str = "frontier"
    as_good: bool = False


_NOISE = "robust DPO, arXiv 2403.00409"
CLAIMS = (
    Claim(
        "DPO, arXiv 2305.18290, section 6.1",
        "DPO's frontier lies above PPO's, learned reward",
        "DPO",
        LEARNED,
    ),
    Claim("the same", "and above PPO's with the true reward", "DPO", "PPO, true reward"),
    Claim("the same", "and above fine-tuning on the chosen", "DPO", "SFT on chosen"),
    Claim("KTO, arXiv 2402.01306, section 4", "KTO is as good as DPO", "KTO", "DPO", as_good=True),
    Claim(
        "the same",
        "even with a tenth of the desirable answers, weighted",
        "KTO, a tenth of the desirable",
        "DPO",
        as_good=True,
    ),
    Claim(
        "KTO, section 4",
        "weights help where a tenth of the desirable answers is left",
        "KTO, weight 10: 10%",
        "KTO, weight 1: 10%",
        "imbalance",
    ),
    Claim(
        "the same",
        "and where half is left",
        "KTO, weight 2: 50%",
        "KTO, weight 1: 50%",
        "imbalance",
    ),
    Claim("RLOO, arXiv 2402.14740", "RLOO is better than PPO", "RLOO", "PPO, true reward"),
    Claim("arXiv 2405.08448", "online beats offline at equal KL: DPO", "online DPO", "DPO"),
    Claim("the same", "KTO (the paper has no KTO)", "online KTO", "KTO"),
    Claim(_NOISE, "at 20 % flipped better than DPO", "robust DPO: 20%", "DPO: 20%", "noise"),
    Claim(_NOISE, "at 40 % flipped better than DPO", "robust DPO: 40%", "DPO: 40%", "noise"),
)


def verdict(
    claim: Claim, found: Mapping[str, Mapping[str, Frontier]], seeds_differ: float | None
) -> str:
    """Say whether the numbers agree, by the rule that the page tells."""
    study, names = found.get(claim.study, {}), (claim.better, claim.worse)
    if missing := [one for one in names if one not in study]:
        return f"not run: {', '.join(missing)} |"
    more, less = (study[one] for one in names)
    if more.strengths != less.strengths:  # who tries more often reaches farther
        more, less = (found["middle"][one] for one in names)
    allowed = 0.1 * less.gain if claim.as_good else 0.0
    low, high = np.quantile(more.draws - less.draws, (0.025, 0.975))
    numbers = f"{more.gain - less.gain:+.3f} ({low:+.3f} to {high:+.3f})"
    if seeds_differ is None:
        return f"{numbers} | cannot tell: one seed"
    if low > -allowed:
        return f"{numbers} | agrees"
    if high < -allowed:
        return f"{numbers} | disagrees"
    return f"{numbers} | cannot tell"


def claims_section(
    found: Mapping[str, Mapping[str, Frontier]],
    seeds_differ: float | None,
    studies: Sequence[str] = ("frontier",),
) -> list[str]:
    """Write each claim of these studies beside the papers'."""
    lines = [
        "The difference of two methods' gains decides, with its 95 % interval (prompts drawn anew, "
        + (
            f"and a run's gain moved by the {seeds_differ:.3f} by which seeds differ here"
            if seeds_differ
            else "seeds not yet counted: nothing has run with several"
        )
        + "): all above 0, the claim agrees; all below, it disagrees; else the numbers cannot "
        "tell.  *As good* allows a tenth of the other's gain.  Where one was run with more "
        "strengths than the other, both are taken at their middle one.  The papers' models are "
        "larger, and their PPO, rates and data are others: what disagrees here disagrees at this "
        "scale and with these settings.",
        "",
        "| paper | claim | difference of gains | verdict |",
        "|---|---|---|---|",
    ]
    for claim in CLAIMS:
        if claim.study in studies:
            said = verdict(claim, found, seeds_differ)
            lines.append(f"| {claim.paper} | {claim.says} | {said} |")
    return lines


def conditions_table(found: Mapping[str, Frontier], rows: Sequence[Row], head: str) -> list[str]:
    """Write ``METHOD: CONDITION`` labels: a row a condition."""
    lines = [
        f"| {head} | method | seeds | gain (95 %) | reward at 3 nats | last reward | last KL | "
        "different last answers | their tokens |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for label, one in found.items():
        method, condition = label.split(": ")
        last = [row for row in rows if row["label"] == label and row["last"]]
        reward, kl, distinct, length = (
            [row[name] for row in last] for name in ("reward", "objective/kl", "distinct", "length")
        )
        lines.append(
            f"| {condition} | {method} | {one.seeds} | {one.interval} | "
            f"{np.interp(3.0, GRID, one.curve):.3f} | {spread(reward)} | {spread(kl, 2)} | "
            f"{statistics.mean(distinct):.0%} | {statistics.mean(length):.0f} |"
        )
    return lines


def enough(found: Mapping[str, Frontier]) -> list[str]:
    """Say from how many pairs on a method's gain is within a tenth of its best."""
    lines = []
    for method in dict.fromkeys(label.split(": ")[0] for label in found):
        gain = {
            int(label.split(": ")[1]): one.gain
            for label, one in found.items()
            if label.startswith(f"{method}: ")
        }
        best = max(gain.values())
        near = [count for count in gain if all(gain[n] >= 0.9 * best for n in gain if n >= count)]
        first = min(near, default=max(gain))
        shares = ", ".join(f"{count:,}: {gain[count] / best:.0%}" for count in sorted(gain))
        said = (
            f"from {first:,} pairs on the gain is within a tenth of the best"
            if first < max(gain)
            else f"{first:,} pairs, the most tried, are not yet shown to be enough"
        )
        lines.append(f"- {method}: {said}.  Of the best gain, {best:.3f}, pairs gave: {shares}.")
    return lines


def overoptimized(rows: Sequence[Row]) -> list[str]:
    """Write the learned reward beside the true one, as a run goes away from the start."""
    learned = [row for row in rows if "rewards/model" in row]
    lines = [
        "| run | KL coefficient | step | KL, nats | learned reward | true reward |",
        "|---|---|---|---|---|---|",
    ]
    for (label, strength, step), runs in by(learned, "label", "strength", "step").items():
        cells = [
            spread([row[name] for row in runs], digits)
            for name, digits in (("objective/kl", 2), ("rewards/model", 2), ("reward", 3))
        ]
        lines.append(f"| {label} | {strength:g} | {step} | {' | '.join(cells)} |")
    return lines


def of_scorers(rows: Sequence[Row]) -> list[str]:
    """Write where policies end that were trained on the mean of so many reward models."""
    lines = [
        "| reward models | KL coefficient | seeds | last KL, nats | learned reward | true reward | "
        "best true reward on the way |",
        "|---|---|---|---|---|---|---|",
    ]
    for (label, strength), own in by(rows, "label", "strength").items():
        last = [row for row in own if row["last"]]
        best = [max(row["reward"] for row in run) for run in by(own, "seed").values()]
        cells = [
            spread([row[name] for row in last], digits)
            for name, digits in (("objective/kl", 2), ("rewards/model", 2), ("reward", 3))
        ]
        lines.append(
            f"| {label} | {strength:g} | {len(last)} | {' | '.join(cells)} | {spread(best)} |"
        )
    return lines


def falls(rows: Sequence[Row]) -> str:
    """Count the runs in which the learned reward rises to the end while the true one falls."""
    runs = by([row for row in rows if "rewards/model" in row], "label", "strength", "seed")
    count = sum(
        own[-1]["rewards/model"] > own[-2]["rewards/model"]
        and own[-1]["reward"] < own[-2]["reward"]
        for own in runs.values()
        if len(own) > 1
    )
    return (
        f"In {count} of {len(runs)} runs the learned reward still rises over the last third of the "
        "steps while the true one falls."
    )


def draw(
    rows: Sequence[Row], found: Mapping[str, Frontier], path: pathlib.Path, labels: Sequence[str]
) -> None:
    """Draw the points and frontiers of some labels."""
    import matplotlib  # here, because it is only installed with the plots
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "align_jax"  # the same picture of the same results
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    colors = matplotlib.colormaps["tab20"].colors
    for number, label in enumerate(labels):
        own, color = [row for row in rows if row["label"] == label], colors[number % len(colors)]
        x, y = ([row[name] for row in own] for name in ("objective/kl", "reward"))
        axes.scatter(x, y, s=10, color=color, alpha=0.6)
        axes.plot(GRID, found[label].curve, color=color, label=label, linewidth=1.2)
    axes.set(
        xlim=(0, KLS[-1]),
        xlabel="KL from the start, nats an answer",
        ylabel="true reward, held-out prompts",
    )
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, metadata={"Date": None})


def with_all(study: str, rows: Sequence[Row], middle: Sequence[Row]) -> list[Row]:
    """Add to a study what the frontier's runs are of it: all pairs, no label flipped, all or
    weighted answers; of the middle strength."""
    also = {
        "pairs": {name: f"{name}: {frontier.Data('').pairs}" for name in ("DPO", "KTO", LEARNED)},
        "noise": {name: f"{name}: 0%" for name in ("DPO", "IPO", "KTO")},
        "imbalance": {
            "KTO": "KTO, weight 1: 100%",
            "KTO, half of the desirable": "KTO, weight 2: 50%",
            "KTO, a tenth of the desirable": "KTO, weight 10: 10%",
        },
    }[study]
    more = [{**row, "label": also[row["label"]]} for row in middle if row["label"] in also]
    return [*rows, *more] if rows else []


def missing(results: Sequence[Row], seeds: Sequence[int] = (0, 1, 2)) -> list[str]:
    """List how much of the whole study has been run."""
    done = {
        (row["study"], row["label"], row["strength"], row["seed"]) for row in results if row["last"]
    }
    lines = ["| study | " + " | ".join(f"seed {seed}" for seed in seeds) + " |"]
    lines += ["|---|" + "---|" * len(seeds)]
    for study in frontier.STUDIES:
        cells = []
        for seed in seeds:
            wanted = frontier.jobs([study], [], [seed], frontier.SCALES[False], middle=False)
            ran = sum((one.study, one.label, one.strength, seed) in done for one in wanted)
            cells.append(f"{ran} of {len(wanted)} runs")
        lines.append(f"| {study} | {' | '.join(cells)} |")
    return lines


COMMAND = [
    "```",
    "python experiments/frontier.py --model=TINYSTORIES_656K --stories=STORIES.txt \\",
    "    --lexicon=vader_lexicon.txt --output=RUNS \\",
    f"    --studies={','.join(frontier.STUDIES)}",
    "python experiments/frontier_page.py RUNS/results.jsonl docs",
    "```",
]


class Results(NamedTuple):
    """What the pages are made of."""

    rows: list[Row]
    start: Row
    studies: dict[str, list[Row]]
    found: dict[str, dict[str, Frontier]]
    seeds_differ: float | None


def read(file: pathlib.Path) -> Results:
    """Read a study's results, JSON lines or those in gzip, and compute its frontiers."""
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    rows = [json.loads(line) for line in data.splitlines()]
    studies = by(rows, "study")
    start, of_all = studies["start"][0], studies.get("frontier", [])
    seeds_differ = seed_spread(rows, start["reward"])
    studies["middle"] = [
        row
        for row in of_all
        if row["label"] in frontier.METHODS
        and row["strength"] == frontier.METHODS[row["label"]].values[1]
    ]
    for study in ("pairs", "noise", "imbalance"):
        if all_rows := with_all(study, studies.get(study, []), studies["middle"]):
            studies[study] = all_rows
    found = {
        study: frontiers(own, start, seeds_differ)
        for study, own in studies.items()
        if study != "start"
    }
    return Results(rows, start, studies, found, seeds_differ)


def introduction(results: Results) -> list[str]:
    """Say what was done, and how much of it."""
    hours = sum(row["cpu_seconds"] for row in results.rows if "flops" in row and row["last"]) / 3600
    scale, dpo = frontier.SCALES[False], frontier.METHODS["DPO"]
    runs = collections.Counter(row["jax"] for row in results.rows if "jax" in row and row["last"])
    versions = " and ".join(f"{version} ({count})" for version, count in sorted(runs.items()))
    return [
        "The controlled-sentiment experiment (arXiv 2305.18290, section 6.1) with a model small "
        "enough for a processor, TinyStories-656K: it continues a story's sentence by the next; "
        "the true reward is the answer's sentiment by a lexicon, in (-1, 1).  Preferences are "
        "drawn from it by Bradley-Terry between the start's own samples: "
        f"{results.start['pairs']:,} pairs, {results.start['agree']:.0%} of which prefer what has "
        f"more true reward; a run takes the first {frontier.Data('').pairs:,} and sees "
        f"{dpo.groups * scale.offline_steps:,} in its {scale.offline_steps} steps.  "
        f"{results.start['prompts']} prompts of other stories are held out, a sample each; "
        "reward and KL from the start are measured at a third, two thirds and all of the steps.  "
        f"On shared CPU cores {hours:.1f} core-hours were spent on what is below, on "
        f"several machines, by the runs' JAX: {versions}; each trained the start anew by the same "
        "command, which no two processors do to the same bits, so that its samples and pairs "
        "differ a little.  The number of steps, the rates and the rollouts' sizes were set after "
        "pilots that were measured on the same prompts, and no method was tuned by itself.",
        "",
        *COMMAND,
        "",
        "What has been run, of the whole study: its rows are `experiments/frontier.jsonl.gz`, and "
        "the same command goes on with the rest where they lie unpacked as RUNS/results.jsonl:",
        "",
        *missing(results.rows),
    ]


def frontier_page(results: Results, output: pathlib.Path) -> None:
    """Write the page of methods, and draw its picture."""
    studies, found, start = results.studies, results.found, results.start
    rows, of_all = studies["frontier"], found["frontier"]
    picture = output.with_suffix(".svg")
    draw(rows, of_all, picture, sorted(of_all, key=lambda one: -of_all[one].gain))
    lines = [
        "# Which method?",
        "",
        *introduction(results),
        "",
        "## Reward for the divergence it costs",
        "",
        f"![Reward against KL, a point a measured policy, a line a method's frontier]"
        f"({picture.name})",
        "",
        f"Best first by *gain*: the mean height of a method's frontier above the start's "
        f"{start['reward']:.3f}, over KL from 0 to {KLS[-1]:g} nats.",
        "",
        *frontier_section(rows, of_all),
        "",
        "A small gain is often one of settings, which the last column tells: the frontier of a "
        "method that stays near the start is flat from its last point on (a stronger setting "
        "reaches farther), and one whose first point is far has a straight line up to there (a "
        "weaker setting, or an earlier look, shows more); and who was run with three strengths has "
        "a higher one than with one.  Conditional SFT is "
        "told to be happy, and its KL is from the start that is told nothing.  The best of n "
        "samples needs no training and n times the sampling; its KL is the upper bound log n - "
        "(n - 1) / n.",
        "",
        "## Claims of papers",
        "",
        *claims_section(found, results.seeds_differ),
        "",
        "## Work until a reward",
        "",
        "The least work, of any strength tried, after which a policy is as good as the best of n "
        "samples of the start: model FLOPs with sampling and the reference's scores, processor "
        "seconds of training without the first steps, which compile, and the KL there.  Measured "
        "at thirds of a run.",
        "",
        *speed_section(rows),
        "",
        "## The learned reward and the true one",
        "",
    ]
    count = f"{LEARNED}: {frontier.Data('').pairs}"  # is the frontier's
    learned = [*rows, *(row for row in studies.get("pairs", []) if row["label"] != count)]
    lines += [falls(learned), "", *overoptimized(learned)]
    output.write_text("\n".join(lines) + "\n")


def feedback_page(results: Results, output: pathlib.Path) -> None:
    """Write the page of worse feedback: flipped labels, few desirable answers, learned rewards."""
    lines = [
        "# How bad may the feedback be?",
        "",
        "Flipped labels, few desirable answers, rewards learned from few pairs: the task, the "
        "model and the words are those of [Which method?](frontier.md), each method with its "
        "middle strength.  Where hardly any of the last answers differ, the policy has collapsed; "
        "where they are of one token, onto ending at once.",
        "",
        *COMMAND,
        "",
        "What has been run, of the whole study: its rows are `experiments/frontier.jsonl.gz`, and "
        "the same command goes on with the rest where they lie unpacked as RUNS/results.jsonl:",
        "",
        *missing(results.rows),
        "",
        "## Claims of papers",
        "",
        *claims_section(results.found, results.seeds_differ, ("noise", "imbalance")),
    ]
    for study, title, head in (
        ("noise", "Flipped labels", "flipped"),
        ("imbalance", "Fewer desirable answers", "desirable answers kept"),
    ):
        if own := results.studies.get(study):
            lines += ["", f"## {title}", "", *conditions_table(results.found[study], own, head)]
    if own := results.studies.get("overoptimization"):
        what = "PPO on one reward model, or on the mean of three that differ in their seed."
        lines += ["", "## Rewards learned from few pairs", "", f"{what}  {falls(own)}", ""]
        lines += of_scorers(own)
    output.write_text("\n".join(lines) + "\n")


def pairs_page(results: Results, output: pathlib.Path) -> None:
    """Write the page of the number of pairs, and draw its picture."""
    rows, found = results.studies["pairs"], results.found["pairs"]
    labels = sorted(found, key=lambda one: (one.split(": ")[0], int(one.split(": ")[1])))
    found = {label: found[label] for label in labels}
    draw(rows, found, output.with_suffix(".svg"), labels)
    lines = [
        "# How many pairs are enough?",
        "",
        "Each method with so many pairs and the same number of steps, so that few pairs are seen "
        "often; of PPO the reward model is trained on the pairs.  The task, the model and the "
        "words are those of [Which method?](frontier.md).",
        "",
        *enough(found),
        "",
        "That is the answer for one task, one small model and the seeds in the table; a task with "
        "finer preferences, or labels with more noise, needs more.",
        "",
        f"![Frontiers by the number of pairs]({output.with_suffix('.svg').name})",
        "",
        *conditions_table(found, rows, "pairs"),
        "",
        "Made by the same command:",
        "",
        *COMMAND,
    ]
    output.write_text("\n".join(lines) + "\n")


def main(file: pathlib.Path, output: pathlib.Path) -> None:
    """Write the pages."""
    results = read(file)
    frontier_page(results, output / "frontier.md")
    if "pairs" in results.found:
        pairs_page(results, output / "how_many_pairs.md")
    if results.studies.keys() & {"noise", "imbalance", "overoptimization"}:
        feedback_page(results, output / "feedback.md")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python experiments/frontier_page.py RESULTS FOLDER")
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
