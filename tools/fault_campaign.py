# SPDX-License-Identifier: Apache-2.0
"""Kill a run at random moments, again and again, and see that nothing is lost.

    python tools/fault_campaign.py --kills=60 [--kinds offline online processes devices]
    [--steps=60] [--seed=0] [--folder=DIR]

One run goes through undisturbed; another, of the same command, is killed with signal 9 or asked to
stop with SIGTERM (with several processes: one of them, chosen at random) at a random time, after
the first evaluation, some steps after its start, or while a checkpoint is being written, and
started again.  At the end every array of the two last checkpoints must be equal bit for bit, and
metrics.jsonl and samples.jsonl must have the same rows in the same order, none twice and none
missing; where starts differ in their count of devices, losses agree to 1e-5.  A run that ends
before all kills are spent is followed by another.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import sys
import tempfile

TESTS = pathlib.Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "faults")]

from kills import KINDS, campaign


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=60, help="shared among the kinds")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="kept; a temporary one by default")
    options = parser.parse_args()
    folder = pathlib.Path(options.folder or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(options.kinds):
        share = len(range(number, options.kills, len(options.kinds)))
        tally = campaign(
            folder, kills=share, steps=options.steps, seed=options.seed, kind=KINDS[name]
        )
        print(f"{name}: the same run after {share} kills: {tally}", flush=True)
    if not options.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
