# SPDX-License-Identifier: Apache-2.0
"""Turn one or several runs into a page that people read: curves, samples, what differs, results.

    python -m align_jax.report WORKDIR [WORKDIR ...] [--output=DIR] [--samples=NAME=FILE.jsonl ...]
        [--watch=SECONDS]

It reads what ``train`` wrote (``config.json``, ``metrics.jsonl``, ``samples.jsonl``) and writes
``DIR/report.html``, one file that asks for nothing from outside and can be printed, and
``DIR/report.md`` with its tables.  It can be run while the runs go on; with --watch it writes the
page anew until they end, and an open page follows.  --samples puts files of ``align_jax.sample``,
or the answers that ``align_jax.evaluate`` has kept, side by side.
"""

from __future__ import annotations

from absl import flags

from align_jax.runs import command

if __name__ == "__main__":  # here, because what is imported next takes seconds
    flags.DEFINE_string(
        "output", None, "Folder to write to; default: report/ in the run, or beside several."
    )
    flags.DEFINE_multi_string("samples", [], "Samples to put side by side: NAME=FILE.jsonl.")
    flags.DEFINE_integer("watch", 0, "Seconds after which the page is written anew; 0 = once.", 0)
    arguments = command.read(arguments="workdirs of runs: local paths or gs://...")

import html
import importlib.resources
import os
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from align_jax.core.files import escaped, write_text
from align_jax.data.sources import open_source
from align_jax.runs import reported
from align_jax.runs.reported import Run, embedded, html_table, markdown_table, read_runs

Columns = Sequence[tuple[str, Sequence[Mapping[str, Any]]]]


def tables_of(runs: Sequence[Run]) -> dict[str, list[list[str]]]:
    """Return the report's tables by their titles; one without rows is left out."""
    tables = {
        "Held-out results": reported.results(runs),
        "Runs": reported.run_table(runs),
        "What differs": reported.differences(runs),
    }
    return {title: rows for title, rows in tables.items() if len(rows) > 1}


def title_of(runs: Sequence[Run]) -> str:
    """Name a report."""
    names = [run.name for run in runs]
    return "Report: " + (", ".join(names) if len(names) < 7 else f"{len(names)} runs")


def write(
    runs: Sequence[Run], output: str, columns: Columns = (), *, refresh: int = 0
) -> pathlib.Path:
    """Write the report; return the path of ``report.html``.

    Args:
        runs: from ``runs.reported.read_runs``.
        output: folder.
        columns: name -> samples to put side by side.
        refresh: seconds after which an open page reads itself again; 0 = never.
    """
    folder = pathlib.Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    said, tables = reported.sentences(runs), tables_of(runs)
    parts = [f"# {title_of(runs)}", "\n".join(f"- {line}" for line in said)]
    parts += [f"## {name}\n\n{markdown_table(rows)}" for name, rows in tables.items()]
    _replace(folder / "report.md", "\n\n".join(parts) + "\n")
    _replace(folder / "report.html", page_of(runs, columns, refresh=refresh))
    return folder / "report.html"


def page_of(runs: Sequence[Run], columns: Columns = (), *, refresh: int = 0) -> str:
    """Return the page, as ``write`` writes it."""
    said, tables = reported.sentences(runs), tables_of(runs)
    data = reported.page_data(runs, columns)
    page = (importlib.resources.files("align_jax.runs") / "report.html").read_text("utf-8")
    filled = {
        "@REFRESH@": f'<meta http-equiv="refresh" content="{refresh}">' if refresh else "",
        "@TITLE@": html.escape(title_of(runs)),
        "@BODY@": _body(runs, said, tables, data, live=bool(refresh)),
        "@DATA@": embedded(data),
    }
    return re.sub(r"@(?:REFRESH|TITLE|BODY|DATA)@", lambda mark: filled[mark.group()], page)


def _replace(path: pathlib.Path, text: str) -> None:
    """Write a file at once: whoever reads it meanwhile has the old one."""
    partial = path.with_name(f"{path.name}.partial")
    write_text(partial, escaped(text))
    os.replace(partial, path)


def _body(
    runs: Sequence[Run],
    said: Sequence[str],
    tables: Mapping[str, list[list[str]]],
    data: Mapping[str, Any],
    *,
    live: bool,
) -> str:
    page = [
        f"<p class='soft'>Written {time.strftime('%Y-%m-%d %H:%M:%S')} by align_jax.report.</p>"
    ]
    if live:
        for number, run in enumerate(runs):
            share = min(1.0, run.step / run.total) if run.total else 0.0
            page.append(
                f"<small>{html.escape(run.name)}: step {run.step} of {run.total or '?'}</small>"
                f"<div class='done' style='--own:var(--c{number % 8})'>"
                f"<i style='width:{share:.1%}'></i></div>"
            )
    page.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in said) + "</ul>")
    page.append("<div class='bar' id='bar'></div>")
    page.append("<noscript><p>The curves need JavaScript; this page holds it.</p></noscript>")
    first, *others = tables.items()
    page.append(f"<h2>{first[0]}</h2>{html_table(first[1])}")
    page.append("<h2>Curves</h2><div class='grid' id='curves'></div>")
    if any(panel["more"] for panel in data["panels"]):
        page.append("<details><summary>More metrics</summary><div class='grid' id='more'></div>")
        page.append("</details>")
    if data["samples"]:
        page.append("<h2>Samples</h2><div class='controls' id='samples-controls'></div>")
        page.append("<div class='samples' id='samples'></div><p id='samples-more'></p>")
    page += [f"<h2>{name}</h2>{html_table(rows)}" for name, rows in others]
    return "\n".join(page)


def read_columns(named: Sequence[str]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Read files of samples, each given as NAME=FILE.

    Raises:
        ValueError: another form, or a row without a prompt and an answer.
    """
    columns: list[tuple[str, list[dict[str, Any]]]] = []
    for item in named:
        name, _, path = item.partition("=")
        if not path:
            raise ValueError(f"--samples={item}: expected NAME=FILE, such as before=samples.jsonl")
        rows = open_source(path)
        found = [dict(rows[i]) for i in range(min(len(rows), 2000))]
        for number, row in enumerate(found):
            if "prompt" not in row or not {"output", "other"} & row.keys():
                raise ValueError(
                    f"{path}: row {number + 1} has the fields {', '.join(sorted(row))}; expected "
                    "prompt and output, as align_jax.sample writes them"
                )
        columns.append((name, found))
        if all("other" in row for row in found):  # answers that a win rate has compared
            columns.append((f"{name}: the other", [_other(row) for row in found]))
    return columns


def _other(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": row["prompt"], "output": row["other"]}


def place_of(workdirs: Sequence[str]) -> str:
    """Return the folder of a report that is asked for none: in the run, or beside several.

    >>> place_of(["runs/dpo"]), place_of(["runs/dpo", "runs/kto/"]), place_of(["gs://bucket/dpo"])
    ('runs/dpo/report', 'runs/report', 'report')
    """
    if any("://" in workdir for workdir in workdirs):
        return "report"
    folders = [os.path.normpath(workdir) for workdir in workdirs]
    above = folders[0] if len(folders) == 1 else os.path.commonpath(map(os.path.dirname, folders))
    return os.path.join(above, "report")


def main(workdirs: Sequence[str]) -> None:
    """Run from the command line."""
    values = flags.FLAGS
    if not workdirs:
        raise command.Usage("name the workdir of a run, or of several")
    command.output_path("output", folder=True)
    columns = read_columns(values.samples)
    runs, output = read_runs(workdirs), values.output or place_of(workdirs)
    path = write(runs, output, columns, refresh=values.watch)
    print(path)
    if not values.watch:
        return
    print(f"written anew every {values.watch} seconds until the runs end; Ctrl-C ends it")
    try:
        while not all(run.ended for run in read_runs(workdirs)):
            time.sleep(values.watch)
            write(read_runs(workdirs), output, columns, refresh=values.watch)
    finally:  # the page that stays does not read itself again
        write(read_runs(workdirs), output, columns)


if __name__ == "__main__":
    command.run(main, arguments)
