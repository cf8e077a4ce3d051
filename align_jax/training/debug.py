# SPDX-License-Identifier: Apache-2.0
"""Looking into a run: profiler traces, the compiled program's text, device memory, the origin of a
NaN."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from etils import epath

from align_jax.core.schema import Batch
from align_jax.training.steps import StepSpec, train_step


@contextlib.contextmanager
def traced(folder: str | epath.PathLike, steps: Sequence[int]) -> Iterator[Callable[[int], None]]:
    """Trace a range of steps with the profiler.

    Args:
        folder: where the trace goes (open it in TensorBoard or Perfetto).
        steps: (first, last) step to trace, counted from 1; () for none.

    Yields:
        ``before(step)``, to be called before each step.
    """
    active = False

    def before(step: int) -> None:
        nonlocal active
        if steps and step == steps[0]:
            jax.profiler.start_trace(str(folder))
            active = True
        elif active and step > steps[1]:
            jax.profiler.stop_trace()
            active = False

    try:
        yield before
    finally:
        if active:
            jax.profiler.stop_trace()


def save_memory_profile(folder: str | epath.PathLike, step: int) -> None:
    """Write what lies in device memory after a step, in pprof's form."""
    path = epath.Path(folder) / f"memory_step_{step}.prof"
    path.parent.mkdir(parents=True, exist_ok=True)
    jax.profiler.save_device_memory_profile(str(path))


def dump_hlo(folder: str | epath.PathLike, lowered: jax.stages.Lowered) -> None:
    """Write the step as it was lowered (StableHLO) and as it was compiled."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train_step.stablehlo.txt").write_text(lowered.as_text())
    (folder / "train_step.compiled.txt").write_text(lowered.compile().as_text())


def find_nan(spec: StepSpec, state: Any, frozen: Any, batch: Batch) -> str:
    """Run a step again with every operation checked, and name the first whose result is not a
    number.

    Args:
        spec, state, frozen, batch: as of the step that failed.

    Returns:
        What JAX says of that operation; a sentence if this time every one was fine.
    """
    with jax.debug_nans(True):
        try:
            jax.block_until_ready(
                jax.jit(functools.partial(train_step, spec))(state, frozen, batch)
            )
        except FloatingPointError as error:
            return str(error)
    return (
        "run again, the step gave no NaN (an infinity, perhaps, or the weights have moved on since)"
    )
