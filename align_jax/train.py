# SPDX-License-Identifier: Apache-2.0
"""Train a model on preferences.

    align-jax train dpo --model=DIRECTORY_OR_HUB_ID --data=pairs.jsonl [--config.any.key=value ...]
    align-jax train --config=dpo_7b --workdir=gs://bucket/run [--config.any.key=value ...]

In Python the same is the function ``align_jax.train``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from align_jax.core import config as configs
from align_jax.runs import command, early


def check_flags() -> None:
    """Refuse a workdir that cannot be written to."""
    command.output_path("workdir", folder=True)


def main(argv: Sequence[str]) -> None:
    """Run from the command line."""
    from align_jax.parallel import distributed

    config, workdir = flags.FLAGS.config, flags.FLAGS.workdir
    early.check_mesh(configs.read(config))
    from align_jax.runs import loop  # here, because importing it takes seconds

    loop.train(config, workdir)
    if distributed.is_main():
        print(
            f"align-jax report {workdir} shows the run; sample, evaluate and export take "
            f"--workdir={workdir}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", None, "Recipe, objective or file; its argument after a colon.", lock_config=True
    )
    flags.DEFINE_string(
        "workdir", None, "Folder of the run: a local path or gs://...; restarting resumes it."
    )
    flags.mark_flags_as_required(["config", "workdir"])
    command.run(main, command.read(check=check_flags, reads=True))
