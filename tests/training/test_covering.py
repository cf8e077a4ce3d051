# SPDX-License-Identifier: Apache-2.0
"""Each documented option does something, or is refused, in every way of training it.

A few cases of ``covering``, always the same ones; with ALIGN_JAX_COVER=0:100 the first hundred of
them, and so on.  They run in a process of their own, on one device and without the type hook,
where a case takes a third of the time.
"""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
COVERING = pathlib.Path(__file__).with_name("covering.py")


def test_an_option_trains_and_changes_something_or_is_refused():
    flags = os.environ["ALIGN_JAX_TEST_FLAGS"].replace("device_count=8", "device_count=1")
    done = subprocess.run(
        [sys.executable, str(COVERING), os.environ.get("ALIGN_JAX_COVER", "few")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    failed = [line for line in done.stdout.splitlines() if "FAILED" in line]
    assert done.returncode == 0, "\n".join(failed) or done.stderr[-2000:]
    assert "changed" in done.stdout and "refused" in done.stdout
