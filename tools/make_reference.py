# SPDX-License-Identifier: Apache-2.0
"""Write the docs' reference pages out of the tables themselves: rows, models, objectives, keys.

``mkdocs build`` calls ``on_files`` (mkdocs.yml, hooks); nothing of it is kept in the repository.
"""

import html
import inspect
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from align_jax import config as keys_of
from align_jax import losses, objectives
from align_jax.core import config as configs
from align_jax.data.formats import FORMATS
from align_jax.models import FAMILIES

EXAMPLES = pathlib.Path(__file__).parents[1] / "docs" / "formats.jsonl"
KINDS = {
    "completions": "Completions: one answer, to imitate",
    "pairs": "Pairs: a chosen answer and a rejected one",
    "ranked": "Rankings: several answers by rank or score",
    "unpaired": "Unpaired: one answer, good or bad",
    "scored": "Scored: one answer and a number",
    "stepwise": "Steps: one answer whose steps are labeled",
    "prompts": "Prompts alone: for online objectives and samples",
}
ABOUT_ROWS = """
A file is JSON lines, a JSON array, CSV, Parquet or Arrow (packed by gzip, bzip2 or xz too); a
source is a file, `gs://...`, a hub id or `tfds:NAME`. The format is found from the first rows'
fields, in the order of the table that these examples stand for, or named by `config.data.format`;
`config.data.columns` renames columns. A prompt or an answer is a text or a list of messages
(`role`, `content`, and whatever else the chat template reads: `tool_calls`, `name`,
`reasoning_content`, ...). Beside the fields shown, rows may have `system`, `tools`, `documents`,
`chat_template_kwargs`, `weight` and `margin` where they mean something; what would not be used is
refused by name. A turn or a row that says `train: false` (or `loss`, `trainable`, `loss_mask`, ...
of 0) is not learned. A kind becomes the simpler ones where an objective needs them: a ranking makes
pairs, pairs make unpaired answers, and so on.
"""


def rows() -> str:
    """One example of each format, by kind."""
    examples = {
        one["format"]: one["row"] for one in map(json.loads, EXAMPLES.read_text().splitlines())
    }
    lines = ["# What a row looks like", ABOUT_ROWS]
    for kind, title in KINDS.items():
        lines += [f"## {title}", ""]
        for name, form in FORMATS.items():
            if form.kind == kind:
                fields = ", ".join(f"`{field.replace('|', '` or `')}`" for field in form.fields)
                row = json.dumps(examples[name], indent=1, ensure_ascii=False)
                lines += [f"**{name}**: has {fields}", "", "```json", row, "```", ""]
    return "\n".join(lines)


def models() -> str:
    """The families that load."""
    names = ", ".join(f"`{name}`" for name in sorted(FAMILIES))
    return f"""# Which models load

A Hugging Face folder or hub id whose `config.json` has one of these `model_type`s: {names}. A field
of that config which would change the logits and which the family does not compute is refused by
name. Each is compared with `transformers` in float32, over padding, packed rows and windows, and
exported again byte for byte.

Weights are safetensors; float8 with block scales is read into the run's own type, other
quantizations are refused. `model.quantize` quantizes the frozen base anew (int8, nf4). A folder
that holds a PEFT adapter is given as `model.lora.path`, its base as `model.path`.
"""


def _table(head: Sequence[str], body: Iterable[Sequence[Any]]) -> list[str]:
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in body]
    rule = ["---"] * len(head)
    return [f"| {' | '.join(row)} |" for row in [list(head), rule, *cells]]


def _code(value: Any) -> str:
    return f"`{value!r}`"


def objective_pages() -> str:
    """Every objective: data, formula, docstring, options."""
    lines = [
        "# Objectives",
        "",
        "`config.objective.name` is one of these, or a sum such as `dpo+sft` with",
        "`objective.weights`; the options stand beside the name. An objective of pairs or unpaired",
        "answers learns from the policy's own samples when the run has `rewards`.",
        "[Measured](../objectives.md): each one's held-out metric before and after.",
        "",
    ]
    for row in objectives.rows():
        loss = losses.OBJECTIVES[row["name"]].loss
        text = inspect.cleandoc(loss.__doc__ or "").split(">>>")[0].rstrip()
        needs = f", needs {', '.join(row['needs'])}" if row["needs"] else ""
        reference = "with a reference" if row["reference"] else "no reference"
        lines += [
            f"## {row['name']}",
            "",
            f"`{row['formula']}`",
            "",
            f"Use: {row['use']}.",
            "",
            f"{row['data']}; {reference}{needs}; improves `{row['metric']}`; {row['paper']}",
            "",
            f"```text\n{text}\n```",
            "",
        ]
        options = [
            (f"`{name}`", _code(default), html.escape(row["meanings"][name]))
            for name, default in row["options"].items()
        ]
        lines += [*_table(("option", "default", "meaning"), options), ""] if options else []
    return "\n".join(lines)


def config_page() -> str:
    """Every key, group by group."""
    lines = [
        "# Config keys",
        "",
        "As `python -m align_jax.config` prints them; set by a config file or",
        "`--config.KEY=VALUE`. **R** marks what a resumed run may change. The objective's own",
        "options stand on [the objectives' page](objectives.md).",
    ]
    group = None
    rows: list[Sequence[Any]] = []
    for key in [*keys_of.keys(configs.defaults()), None]:
        name = None if key is None else key.name.rpartition(".")[0]
        if name != group and rows:
            lines += ["", f"## {group or 'the run'}", ""]
            lines += _table(("key", "default", "unit", "meaning"), rows)
            rows = []
        group = name
        if key is not None and not key.name.startswith("objective."):
            choices = f" One of {', '.join(map(_code, key.choices))}." if key.choices else ""
            mark = " **R**" if key.resume else ""
            meaning = html.escape(key.meaning) + html.escape(choices) + mark
            rows.append((f"`{key.name}`", _code(key.default), key.unit, meaning))
    return "\n".join(lines)


PAGES = {"rows": rows, "models": models, "objectives": objective_pages, "config": config_page}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages to those that stand in docs/."""
    for name, page in PAGES.items():
        files.append(File.generated(config, f"reference/{name}.md", content=page() + "\n"))
    return files
