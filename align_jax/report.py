# SPDX-License-Identifier: Apache-2.0
"""Turn one or several runs into a page that people read: results, curves, what differs between the
runs.

    python -m align_jax.report WORKDIR [WORKDIR ...] --output=DIR [--smooth=N] [--image=svg|png]

It reads what ``train`` wrote (``config.json``, ``metrics.jsonl``) and writes ``DIR/report.md``,
``DIR/report.html`` (one file, images inside) and ``DIR/curves/*``.  It can be run while the runs go
on.
"""

from __future__ import annotations

import base64
import html
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags
from etils import epath

from align_jax.core.metrics import read_rows
from align_jax.runs import command
from align_jax.storage.workdir import flat, read_record

# A panel's title -> the metrics drawn in it, if a run has them (an evaluation's, drawn with
# markers, beside its own).
PANELS: Mapping[str, tuple[str, ...]] = {
    "loss": ("loss",),
    "accuracy": ("rewards/accuracies", "accuracy"),
    "margin": ("rewards/margins", "margin"),
    "rewards": ("rewards/chosen", "rewards/rejected"),
    "log-probabilities": ("logps/chosen", "logps/rejected"),
    "reward": ("reward", "objective/scores", "mean_reward"),
    "KL": ("kl", "objective/kl"),
    "entropy": ("entropy", "objective/entropy"),
    "gradient norm": ("grad_norm",),
    "learning rate": ("learning_rate",),
    "tokens per second": ("tokens_per_second",),
    "MFU": ("mfu",),
}


class Run(NamedTuple):
    """What a workdir holds."""

    name: str
    record: dict[str, Any]  # config.json
    rows: list[dict[str, Any]]  # metrics.jsonl


def read_run(workdir: str) -> Run:
    """Read a workdir.

    Raises:
        FileNotFoundError: there is no ``metrics.jsonl``.
    """
    folder = epath.Path(workdir)
    if not (folder / "metrics.jsonl").exists():
        raise FileNotFoundError(
            f"{workdir} is no workdir: it has no metrics.jsonl (is it --workdir of a run that has "
            "logged a step?)"
        )
    path = folder / "config.json"
    record = read_record(path) if path.exists() else {}
    return Run(folder.name or str(folder), record, read_rows(folder / "metrics.jsonl"))


def series(run: Run, metric: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of a metric, rows without it left out."""
    pairs = [(row["step"], row[metric]) for row in run.rows if row.get(metric) is not None]
    return [step for step, _ in pairs], [float(value) for _, value in pairs]


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Average over the last ``window`` values.

    >>> smoothed([1.0, 3.0, 5.0], 2)
    [1.0, 2.0, 4.0]
    """
    return [statistics.fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def draw(
    runs: Sequence[Run], folder: pathlib.Path, *, smooth: int = 1, image: str = "svg"
) -> list[tuple[str, str]]:
    """Draw a panel for every group of metrics that a run has.

    Returns:
        (title, file name) of each.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ModuleNotFoundError(
            "the report's curves need matplotlib: pip install 'align_jax[report]'"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for title, metrics in PANELS.items():
        present = [
            (run, metric)
            for run in runs
            for metric in metrics
            if series(run, metric)[0] or series(run, f"eval/{metric}")[0]
        ]
        if not present:
            continue
        figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
        for index, (run, metric) in enumerate(present):
            label = f"{run.name}: {metric}" if len(runs) > 1 else metric
            look: dict[str, Any] = {"color": f"C{index}", "label": label, "linewidth": 1.2}
            steps, values = series(run, metric)
            if steps:
                axes.plot(steps, smoothed(values, smooth), **look)
            steps, values = series(run, f"eval/{metric}")
            if steps:
                look |= {"label": f"{label} (held out)", "linewidth": 0.8, "markersize": 3.5}
                axes.plot(steps, values, "o--", **look)
        axes.set(xlabel="step", title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
        name = f"{title.replace(' ', '_')}.{image}"
        figure.savefig(folder / name, dpi=150, metadata={"Date": None} if image == "svg" else None)
        pyplot.close(figure)
        drawn.append((title, name))
    return drawn


def number(value: Any) -> str:
    """Write a table's cell.

    >>> number(0.693147), number(12), number(None)
    ('0.6931', '12', '')
    """
    if value is None or isinstance(value, float) and math.isnan(value):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run_table(runs: Sequence[Run]) -> list[list[str]]:
    """Say what each run was: objective, model, length, speed, devices, commit."""
    heads = "run, objective, model, step, tokens, hours, tokens/s (median), MFU (median), devices"
    rows = [[*heads.split(", "), "commit"]]
    for run in runs:
        config, devices = flat(run.record.get("config", {})), run.record.get("devices", {})
        last = max((row["step"] for row in run.rows), default=0)
        times = [row["time"] for row in run.rows if "time" in row]
        speed, mfu, tokens = (
            series(run, name)[1] for name in ("tokens_per_second", "mfu", "num_tokens")
        )
        rows.append(
            [
                run.name,
                str(config.get("objective.name", "")),
                str(config.get("model.path") or config.get("model.family", "")),
                f"{last} of {config.get('total_steps') or '?'}",
                f"{int(tokens[-1]):,}" if tokens else "",
                f"{(times[-1] - times[0]) / 3600:.2f}" if times else "",
                f"{statistics.median(speed):,.0f}" if speed else "",
                f"{statistics.median(mfu):.3f}" if mfu else "",
                f"{devices.get('count', '')} {devices.get('kind', '')}",
                str(run.record.get("git_commit", ""))[:10],
            ]
        )
    return rows


def differences(runs: Sequence[Run]) -> list[list[str]]:
    """List the configuration keys in which the runs differ; empty for one run."""
    configs = [flat(run.record.get("config", {})) for run in runs]
    keys = sorted({key for config in configs for key in config})
    differing = [
        key for key in keys if any(config.get(key) != configs[0].get(key) for config in configs)
    ]
    if not differing:
        return []
    return [["key", *(run.name for run in runs)]] + [
        [key, *(str(config.get(key, "")) for config in configs)] for key in differing
    ]


def results(runs: Sequence[Run]) -> list[list[str]]:
    """Give each held-out metric's first, last, least and greatest value (with the step)."""
    rows = [["run", "metric", "first", "last", "least", "greatest"]]
    for run in runs:
        names = sorted({name for row in run.rows for name in row if name.startswith("eval/")})
        for name in names:
            steps, values = series(run, name)
            if values:
                at = [
                    f"{number(value)} (step {steps[values.index(value)]})"
                    for value in (min(values), max(values))
                ]
                rows.append([run.name, name, number(values[0]), number(values[-1]), *at])
    return rows


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Write rows, the first one the heads, as a Markdown table."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """Write rows, the first one the heads, as an HTML table."""

    def line(row: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    return (
        "<table>" + line(rows[0], "th") + "".join(line(row, "td") for row in rows[1:]) + "</table>"
    )


STYLE = (
    "body{font:14px sans-serif;margin:2em}table{border-collapse:collapse;margin:1em "
    "0}td,th{border:1px solid #ccc;padding:3px 8px;text-align:left}img{max-width:48%}"
)


def write(runs: Sequence[Run], output: str, *, smooth: int = 1, image: str = "svg") -> pathlib.Path:
    """Write the report; return the path of ``report.md``."""
    folder = pathlib.Path(output)
    curves = draw(runs, folder / "curves", smooth=smooth, image=image)
    tables = {
        "Runs": run_table(runs),
        "What differs": differences(runs),
        "Held-out results": results(runs),
    }
    tables = {title: rows for title, rows in tables.items() if len(rows) > 1}
    title = "Report: " + ", ".join(run.name for run in runs)
    parts = [f"# {title}"]
    parts += [f"## {name}\n\n{markdown_table(rows)}" for name, rows in tables.items()]
    parts += ["## Curves", *(f"![{name}](curves/{file})" for name, file in curves)]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")
    page = [f"<!DOCTYPE html><meta charset='utf-8'><title>Report</title><style>{STYLE}</style>"]
    page.append(f"<h1>{html.escape(title)}</h1>")
    page += [f"<h2>{name}</h2>{html_table(rows)}" for name, rows in tables.items()]
    kind = "svg+xml" if image == "svg" else image
    for name, file in curves:
        data = base64.b64encode((folder / "curves" / file).read_bytes()).decode()
        page.append(f"<img alt='{html.escape(name)}' src='data:image/{kind};base64,{data}'>")
    (folder / "report.html").write_text("\n".join(page) + "\n")
    return folder / "report.md"


def main(workdirs: Sequence[str]) -> None:
    """Run from the command line."""
    values = flags.FLAGS
    if not workdirs:
        raise command.Usage("name the workdir of a run, or of several")
    command.output_path("output", folder=True)
    path = write(
        [read_run(workdir) for workdir in workdirs],
        values.output,
        smooth=values.smooth,
        image=values.image,
    )
    print(f"{path} and {path.with_suffix('.html').name}")


if __name__ == "__main__":
    flags.DEFINE_string("output", None, "Folder to write to.", required=True)
    flags.DEFINE_integer("smooth", 1, "Rows to average over in the training curves.", 1)
    flags.DEFINE_enum("image", "svg", ["svg", "png"], "Kind of the curves' files.")
    command.run(main, arguments="workdirs of runs: local paths or gs://...")
