# SPDX-License-Identifier: Apache-2.0
"""What a report says of runs, read from what they have written.

config.json, metrics.jsonl, samples.jsonl ─ read_run ─► Run ─┬─ tables and sentences
                                                             └─ page_data ─► report.html
"""

from __future__ import annotations

import dataclasses
import html
import json
import math
import pathlib
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from align_jax.core.metrics import read_rows
from align_jax.core.options import EvalOptions
from align_jax.storage.workdir import flat, read_record

# A panel's title -> the metrics drawn in it, if a run has them (an evaluation's, drawn with
# markers, beside its own).
PANELS: Mapping[str, tuple[str, ...]] = {
    "loss": ("loss",),
    "accuracy": ("rewards/accuracies", "accuracy", "mean_token_accuracy"),
    "margin": ("rewards/margins", "margin"),
    "implicit rewards": ("rewards/chosen", "rewards/rejected"),
    "log-probabilities": ("logps/chosen", "logps/rejected"),
    "reward": ("reward", "objective/scores", "mean_reward"),
    "KL": ("kl", "objective/kl"),
    "entropy": ("entropy", "objective/entropy"),
    "tokens in a completion": ("completions/mean_length",),
    "gradient norm": ("grad_norm",),
    "learning rate": ("learning_rate",),
    "tokens per second": ("tokens_per_second",),
    "MFU": ("mfu",),
}
REWARD, KL = PANELS["reward"], PANELS["KL"]
# Held-out metrics of which more, or less, is better; of the others neither.
MORE = (*PANELS["accuracy"], *PANELS["margin"], *REWARD, "win_rate", "logps/accuracies")
LESS = ("loss", "nll", "ptx_nll", "perplexity", "divergence", "absolute_error")
# What differs is told in this order; the groups of keys that change nothing that is learned, not.
FIRST = ("objective", "model", "optimizer", "data", "rollout", "rewards")
UNTOLD = ("eval", "log", "checkpoint", "debug")
POINTS = 1500  # of a line, at most: neighbors are averaged
SAMPLES = 200  # of a column, at most


Points = list[list[Any]]  # (x, y, ...) of a line: integers and floats


class Run(NamedTuple):
    """What a workdir holds."""

    name: str
    record: dict[str, Any]  # config.json
    rows: list[dict[str, Any]]  # metrics.jsonl
    samples: list[dict[str, Any]]  # samples.jsonl

    @property
    def config(self) -> dict[str, Any]:
        """The run's config, flat."""
        return flat(self.record.get("config", {}))

    @property
    def step(self) -> int:
        """The last step of which something is said."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def total(self) -> int:
        """The steps that it is to make; 0: nothing says how many."""
        return int(self.record.get("steps") or self.config.get("total_steps") or 0)

    @property
    def ended(self) -> bool:
        """Whether nothing more comes: its last evaluation is there, or the one that stopped it
        early."""
        measured = [(row["step"], _held_out(row)) for row in self.rows if _held_out(row)]
        if 0 < self.total <= self.step:
            return not measured or measured[-1][0] >= self.total
        eval_keys = dict(self.record.get("config", {}).get("eval", {}))
        if not eval_keys.get("stop_metric"):
            return False
        from align_jax.training.evaluation import Stopping  # here, because it imports JAX

        known = {field.name for field in dataclasses.fields(EvalOptions)}
        options = EvalOptions(**{key: eval_keys[key] for key in known & eval_keys.keys()})
        early = Stopping()
        for step, values in measured:
            early = early.after(step, values, options)
        return early.is_spent(options)


def _held_out(row: Mapping[str, Any]) -> dict[str, float]:
    """Return a row's held-out metrics; what was not finite is NaN."""
    found = {name: value for name, value in row.items() if name.startswith("eval/")}
    return {name: math.nan if value is None else float(value) for name, value in found.items()}


def read_runs(workdirs: Sequence[str]) -> list[Run]:
    """Read workdirs, each run named by as much of its path's end as tells it from the others.

    Raises:
        FileNotFoundError: one has no ``metrics.jsonl``.
        ValueError: one is named twice.
    """
    parts = [pathlib.PurePosixPath(str(one).rstrip("/")).parts for one in workdirs]
    if len(set(parts)) < len(parts):
        raise ValueError(f"a workdir is named twice: {' '.join(workdirs)}")
    length = 1
    while len({one[-length:] for one in parts}) < len(parts):
        length += 1
    names = ["/".join(one[-length:]) for one in parts]
    return [_read_run(workdir, name) for workdir, name in zip(workdirs, names)]


def _read_run(workdir: str, name: str) -> Run:
    folder = epath.Path(workdir)
    if not (folder / "metrics.jsonl").exists():
        raise FileNotFoundError(
            f"{workdir} is no workdir: it has no metrics.jsonl (is it --workdir of a run that has "
            "logged a step?)"
        )
    path = folder / "config.json"
    record = read_record(path) if path.exists() else {}
    samples = read_rows(folder / "samples.jsonl")
    return Run(name, record, read_rows(folder / "metrics.jsonl"), samples)


def series(run: Run, metric: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of a metric, rows without it left out."""
    pairs = [(row["step"], row[metric]) for row in run.rows if row.get(metric) is not None]
    return [step for step, _ in pairs], [float(value) for _, value in pairs]


def number(value: Any) -> str:
    """Write a table's cell.

    >>> number(0.693147), number(12), number(None)
    ('0.6931', '12', '')
    """
    if value is None or isinstance(value, float) and math.isnan(value):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def direction(metric: str) -> int:
    """Return 1 where a greater value is better, -1 where a smaller one is, 0 where neither is.

    >>> direction("eval/rewards/accuracies"), direction("eval/loss"), direction("eval/logps/chosen")
    (1, -1, 0)
    """
    name = metric.removeprefix("eval/")
    return (name in MORE) - (name in LESS)


# ------------------------------------------------------------------------------------------ tables


def run_table(runs: Sequence[Run]) -> list[list[str]]:
    """Say what each run was: objective, model, length, speed, devices, commit."""
    heads = "run, objective, model, step, tokens, hours, tokens/s (median), MFU (median), devices"
    rows = [[*heads.split(", "), "commit"]]
    for run in runs:
        config, devices = run.config, run.record.get("devices", {})
        times = [row["time"] for row in run.rows if "time" in row]
        speed, mfu, tokens = (
            series(run, name)[1] for name in ("tokens_per_second", "mfu", "num_tokens")
        )
        rows.append(
            [
                run.name,
                str(config.get("objective.name", "")),
                str(config.get("model.path") or config.get("model.family", "")),
                f"{run.step} of {run.total}" if run.total else str(run.step),
                f"{int(tokens[-1]):,}" if tokens else "",
                f"{(times[-1] - times[0]) / 3600:.2f}" if times else "",
                f"{statistics.median(speed):,.0f}" if speed else "",
                f"{statistics.median(mfu):.3f}" if mfu else "",
                f"{devices.get('count', '')} {devices.get('kind', '')}",
                str(run.record.get("git_commit", ""))[:10],
            ]
        )
    return rows


def differing(runs: Sequence[Run]) -> list[str]:
    """Return the keys in which the runs' configs differ."""
    configs = [run.config for run in runs]
    keys = sorted({key for config in configs for key in config})
    return [key for key in keys if any(one.get(key) != configs[0].get(key) for one in configs)]


def differences(runs: Sequence[Run]) -> list[list[str]]:
    """List the configuration keys in which the runs differ; empty for one run."""
    keys = differing(runs)
    if not keys:
        return []
    return [["key", *(run.name for run in runs)]] + [
        [key, *(str(run.config.get(key, "")) for run in runs)] for key in keys
    ]


def held_out_metrics(runs: Sequence[Run]) -> list[str]:
    """Return the held-out metrics that some run has, those that are known to be good or bad
    first."""
    names = {name for run in runs for row in run.rows for name in row if name.startswith("eval/")}
    names = {name for name in names if any(series(run, name)[1] for run in runs)}
    return sorted(names, key=lambda name: (direction(name) == 0, name))


def results(runs: Sequence[Run]) -> list[list[str]]:
    """Give each held-out metric's first and last value in each run, and the best one where that is
    neither."""
    rows = [["held out", *(run.name for run in runs)]]
    for name in held_out_metrics(runs):
        row = [name.removeprefix("eval/")]
        for run in runs:
            steps, values = series(run, name)
            if not values:
                row.append("")
                continue
            cell = f"{number(values[0])} → {number(values[-1])}"
            best = (max if direction(name) > 0 else min)(values)
            if direction(name) and best not in (values[0], values[-1]):
                cell += f" (best {number(best)} at step {steps[values.index(best)]})"
            row.append(cell)
        rows.append(row)
    return rows


def sentences(runs: Sequence[Run]) -> list[str]:
    """Say in words how the runs went and what sets them apart."""
    said = [_went(run) for run in runs] if len(runs) < 4 else []  # of more a table tells better
    if len(runs) > 1:
        said += list(_apart(runs))
        said += list(_compared(runs))
    return said


def _went(run: Run) -> str:
    """Say in a sentence how a run went."""
    config, where = run.config, f"step {run.step}" + (f" of {run.total}" if run.total else "")
    parts: list[str] = []
    for name in held_out_metrics([run]):
        steps, values = series(run, name)
        if direction(name) and len(values) > 1 and len(parts) < 3:
            title = name.removeprefix("eval/")
            parts.append(f"{title} {number(values[0])} → {number(values[-1])}")
    held = f"; held out: {', '.join(parts)}" if parts else ""
    return f"{run.name}: {config.get('objective.name', 'a run')}, {where}{held}."


def _apart(runs: Sequence[Run]) -> Iterator[str]:
    """Yield a sentence for each key in which the runs differ."""
    # an option that only some have is told by what they are: the objective, the model
    told = [key for key in differing(runs) if all(key in run.config for run in runs)]
    keys = [key for key in told if key.split(".")[0] not in UNTOLD]
    order = {group: place for place, group in enumerate(FIRST)}
    keys.sort(
        key=lambda key: (order.get(key.split(".")[0], len(order)), key != "objective.name", key)
    )
    for key in keys[:8]:
        of: dict[str, list[str]] = {}
        for run in runs:
            of.setdefault(str(run.config[key]) or "''", []).append(run.name)
        values = (f"{value} in {_listed(names)}" for value, names in of.items())
        yield f"{key} is {', '.join(values)}."
    if len(differing(runs)) > len(keys[:8]):
        yield f"{len(differing(runs)) - len(keys[:8])} more keys differ; the table has them."


def _compared(runs: Sequence[Run]) -> Iterator[str]:
    """Yield a sentence for each of a few held-out metrics: which run ends best.

    Losses and implicit rewards of different objectives, or of one with different options, have
    different scales.
    """
    told, scaled = 0, any(key.startswith("objective.") for key in differing(runs))
    for name in held_out_metrics(runs):
        if scaled and re.search("loss|margin|rewards/(chosen|rejected)", name):
            continue
        ends = {run.name: values[-1] for run in runs if (values := series(run, name)[1])}
        if not direction(name) or len(ends) < 2 or told == 3:
            continue
        told += 1
        order = sorted(ends, key=lambda one: -direction(name) * ends[one])
        best = [one for one in order if ends[one] == ends[order[0]]]
        others = ", ".join(f"{one} {number(ends[one])}" for one in order[len(best) :])
        title, others = name.removeprefix("eval/"), f" ({others})" if others else ""
        yield f"Held-out {title} ends best in {_listed(best)}, at {number(ends[best[0]])}{others}."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Write rows, the first one the heads, as a Markdown table."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """Write rows, the first one the heads, as an HTML table."""

    def line(row: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_cell(cell)}</{tag}>" for cell in row) + "</tr>"

    body = "".join(line(row, "td") for row in rows[1:])
    return f"<div class='wide'><table>{line(rows[0], 'th')}{body}</table></div>"


def _cell(text: str) -> str:
    """Write a cell, whose first and last values stay on one line."""
    return html.escape(text).replace(" → ", "\u00a0→\u00a0")


# -------------------------------------------------------------------------------------- the page


def page_data(
    runs: Sequence[Run], columns: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]
) -> dict[str, Any]:
    """Return what the page's script draws from, as plain values.

    Args:
        runs: the runs.
        columns: name -> samples of files that were named beside them.
    """
    return {
        "runs": [{"name": run.name, "clock": _clock(run)} for run in runs],
        "panels": list(_panels(runs)),
        "frontier": [
            {"run": number, "points": points}
            for number, run in enumerate(runs)
            if (points := _frontier(run))
        ],
        "histograms": list(_histograms(runs, columns)),
        "samples": list(_columns(runs, columns)),
    }


def _clock(run: Run) -> Points:
    """Return what the tokens and the hours were at steps."""
    began = next((row["time"] for row in run.rows if "time" in row), 0.0)
    clock: Points = []
    for row in run.rows:
        tokens = row.get("num_tokens") or (clock[-1][1] if clock else 0)
        clock.append([row["step"], tokens, round((row.get("time", began) - began) / 3600, 5)])
    return thinned(clock)


def thinned(points: Points) -> Points:
    """Average neighbors until there are few enough points to draw.

    >>> len(thinned([[step, 1.0] for step in range(4000)]))
    1334
    """
    size = -(-len(points) // POINTS)
    if size < 2:
        return points
    parts: list[Points] = [points[begin : begin + size] for begin in range(0, len(points), size)]
    return [
        [part[-1][0], *(statistics.fmean(column) for column in zip(*(one[1:] for one in part)))]
        for part in parts
    ]


def _line(run: Run, metric: str) -> Points:
    steps, values = series(run, metric)
    pairs = zip(steps, values)
    return thinned([[step, float(f"{y:.6g}")] for step, y in pairs if math.isfinite(y)])


def _panels(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """Yield the plots of metrics over steps; those that no panel names come last, marked."""
    named = {metric for metrics in PANELS.values() for metric in metrics}
    numeric = {
        name.removeprefix("eval/")
        for run in runs
        for row in run.rows
        for name, value in row.items()
        if isinstance(value, (int, float))
    }
    others = sorted(numeric - named - {"step", "time", "num_tokens"})
    every = [*PANELS.items(), *((name, (name,)) for name in others)]
    for title, metrics in every:
        lines = [
            {"run": number, "metric": metric, "held": bool(prefix), "points": points}
            for metric in metrics
            for number, run in enumerate(runs)
            for prefix in ("", "eval/")
            if (points := _line(run, prefix + metric))
        ]
        if lines:
            yield {"title": title, "lines": lines, "more": title not in PANELS}


def _frontier(run: Run) -> Points:
    """Return (KL, reward, step) where a row has both: held out, where it is evaluated."""
    for prefix in ("eval/", ""):
        found = []
        for row in run.rows:
            reward, kl = (
                next(
                    (row[prefix + one] for one in names if row.get(prefix + one) is not None), None
                )
                for names in (REWARD, KL)
            )
            if reward is not None and kl is not None:
                found.append([kl, reward, row["step"]])
        if len(found) > 1:
            return found[:: len(found) // POINTS + 1]
    return []


def _histograms(
    runs: Sequence[Run], columns: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]
) -> Iterator[dict[str, Any]]:
    """Yield the distributions of samples' rewards and lengths: a run's first and last steps, a
    file's all."""
    kinds = (("reward", "reward of samples", "reward"), ("tokens", "length of samples", "tokens"))
    for field, title, axis in kinds:
        sets = []
        for number, run in enumerate(runs):
            steps = sorted({one["step"] for one in run.samples})
            quarter = max(1, len(steps) // 4)
            ends = [("first", steps[:quarter], True), ("last", steps[-quarter:], False)]
            # of many runs the first steps would only hide the last ones
            for name, chosen, dashed in ends if 1 < len(steps) and len(runs) < 3 else ends[1:]:
                values = _values([one for one in run.samples if one["step"] in chosen], field)
                if values:
                    span = f"{chosen[0]}" + (f" to {chosen[-1]}" if len(chosen) > 1 else "")
                    label = f"{run.name}, step {span}" if len(runs) > 1 else f"{name}, step {span}"
                    sets.append(_set(number, number, dashed, label, values))
        for number, (name, rows) in enumerate(columns, len(runs)):
            if values := _values(rows, field):
                sets.append(_set(-1, number, False, name, values))
        if sets:
            yield {"title": title, "x": axis, "sets": sets}


def _set(run: int, color: int, dashed: bool, label: str, values: list[float]) -> dict[str, Any]:
    return {"run": run, "color": color, "dashed": dashed, "label": label, "values": values}


def _values(rows: Sequence[Mapping[str, Any]], field: str) -> list[float]:
    found = [row[field] for row in rows if isinstance(row.get(field), (int, float))]
    return [float(f"{one:.5g}") for one in found if math.isfinite(one)][:4000]


def _columns(
    runs: Sequence[Run], columns: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]
) -> Iterator[dict[str, Any]]:
    """Yield the samples that can be put side by side, each step and each file a column."""
    for number, run in enumerate(runs):
        steps = sorted({one["step"] for one in run.samples})
        some = steps if len(steps) <= 12 else [steps[i * (len(steps) - 1) // 11] for i in range(12)]
        for step in some:
            rows = [one for one in run.samples if one["step"] == step]
            yield _column(f"{run.name}, step {step}", rows, number)
    for name, given in columns:
        yield _column(name, given, -1)


def _column(name: str, rows: Sequence[Mapping[str, Any]], run: int) -> dict[str, Any]:
    shown = []
    for row in rows[:SAMPLES]:
        said = [
            f"{field} {number(row[field])}"
            for field in ("reward", "win", "tokens")
            if isinstance(row.get(field), (int, float))
        ]
        if row.get("finish", "stop") != "stop":
            said.append(str(row["finish"]))
        shown.append(
            {
                "prompt": prompt_words(row.get("prompt", "")),
                "output": str(row.get("output", "")),
                "said": ", ".join(said),
            }
        )
    return {"name": name, "run": run, "rows": shown}


def prompt_words(prompt: Any) -> str:
    """Write a prompt, a text or messages, as text.

    >>> prompt_words([{"role": "user", "content": "Hello"}])
    'user: Hello'
    """
    if not isinstance(prompt, list):
        return str(prompt)
    return "\n".join(f"{one.get('role', '')}: {one.get('content', '')}" for one in prompt)


def embedded(values: Any) -> str:
    """Write values as JSON that may stand in a page: no text in it ends the script."""
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign, code in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        text = text.replace(sign, code)
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
