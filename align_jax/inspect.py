# SPDX-License-Identifier: Apache-2.0
"""See what a run will train on before it trains: examples as the model will see them, lengths,
drops, rows.

    python -m align_jax.inspect --config=configs/dpo_7b.py [--examples=3 --step=1 --json=FILE]
        [--workdir=DIR] [--config.any.key=value ...]

Config, data, tokenizer and the headers of the weights are read as ``train`` reads them, with its
messages; nothing is compiled and nothing is trained.  With --workdir it looks at the run that goes
on there.
"""

from __future__ import annotations

from absl import flags
from ml_collections import config_flags

from align_jax.runs import command

if __name__ == "__main__":  # here, because what is imported next takes seconds
    config_flags.DEFINE_config_file(
        "config", None, "Recipe, objective or file; its argument after a colon.", lock_config=True
    )
    flags.DEFINE_string("workdir", None, "Folder of a run that goes on; without it, a new one.")
    flags.DEFINE_integer("examples", 3, "Examples to show.", 0)
    flags.DEFINE_integer("step", 1, "Step of the batch whose examples are shown.", 1)
    flags.DEFINE_string("json", None, "Write all of it to this file as well.")
    flags.mark_flag_as_required("config")
    arguments = command.read(reads=True)

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from align_jax.core import config as configs
from align_jax.core.files import json_text, write_text
from align_jax.core.options import Config
from align_jax.data.sources import Source
from align_jax.runs import weights
from align_jax.runs.inspection import Inspection, inspect_run
from align_jax.runs.loop import describe
from align_jax.runs.setup import check_memory, prepare


def show_batch(
    config: ConfigDict | Config,
    workdir: str = "",
    *,
    examples: int = 3,
    step: int = 1,
    given: Mapping[str, Source] | None = None,
) -> Inspection:
    """Show what a run will train on; a notebook displays it in colors, ``print`` writes it.

    Args:
        config: as ``train`` takes it.
        workdir: of a run that goes on; "" = one that begins.
        examples: how many to show.
        step: of the batch whose examples are shown; 1 = the first.
        given: name in ``config.data`` -> the rows from Python that it stands for.

    Raises:
        ValueError, KeyError, FileNotFoundError: as ``train`` does, with its messages.
    """
    config = configs.read(config)
    with tempfile.TemporaryDirectory() as nowhere:
        run = prepare(config, workdir or os.path.join(nowhere, "new"), here=False, given=given)
        about = [line for line in describe(run) if not line.startswith("data: ")]
        about += weights.check_headers(run.step_spec, run.config)
        try:
            check_memory(run)
        except ValueError as error:  # the data can be looked at all the same
            about.append(f"not on these devices: {error}")
        return inspect_run(run, about, examples=examples, step=step)


def main(argv: Sequence[str]) -> None:
    """Run from the command line."""
    values = flags.FLAGS
    written = command.output_path("json")
    found = show_batch(
        values.config, values.workdir or "", examples=values.examples, step=values.step
    )
    print(found.text(color=sys.stdout.isatty() and not os.environ.get("NO_COLOR")))
    if written is not None:
        write_text(written, json_text(found.to_dict(), indent=1) + "\n")


if __name__ == "__main__":
    command.run(main, arguments)
