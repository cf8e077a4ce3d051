# SPDX-License-Identifier: Apache-2.0
"""Programs are compiled no more than need be: they are kept on disk for the next start, and what
runs once is compiled lightly."""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

AUTO = "auto"
# seconds that a program took, to be kept: a small model's hundred small ones together take longest
SMALLEST = "jax_persistent_cache_min_compile_time_secs"
MAX_BYTES = 4 * 2**30  # of the user's cache folder: what was not used for longest goes first


def users_folder() -> pathlib.Path:
    """Return where programs are kept of which nothing else is said."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "align_jax" / "programs"


def keep(folder: str = AUTO) -> None:
    """Keep compiled programs in a folder, and read them from there.

    Call it after ``distributed.start()``, before anything is compiled.

    Args:
        folder: a path; "" = keep none, but where JAX_COMPILATION_CACHE_DIR says; "auto" = there
            (small programs too, unless JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS is set), else in
            ``users_folder()``, unless it cannot be written to. Programs of several CPU devices
            cannot be kept, and several processes need a folder that they share: of these "auto"
            keeps none.

    Raises:
        ValueError: nothing can be written to the path, of which JAX would warn at each program.
    """
    named = getattr(jax.config, "jax_compilation_cache_dir", None)  # it has no types
    if not folder:
        return
    if folder == AUTO and named:
        if SMALLEST.upper() not in os.environ:
            jax.config.update(SMALLEST, 0.0)
        return
    if folder == AUTO:
        several_cpus = jax.default_backend() == "cpu" and jax.device_count() > 1
        if several_cpus or jax.process_count() > 1 or not _is_writable(str(users_folder())):
            return
        folder = str(users_folder())
        jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    elif "://" not in folder and not _is_writable(folder):
        raise ValueError(
            f"config.debug.compile_cache = {folder!r}: cannot write there; name another folder, or "
            "'' to keep nothing"
        )
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update(SMALLEST, 0.0)
    compilation_cache.reset_cache()  # where a notebook has compiled something already


def jit_once(function: Callable[..., Any], *, out_shardings: Any) -> Callable[..., Any]:
    """Compile what runs once.

    A CPU's code for drawing a model's parameters takes longer to optimize than to run: at LLVM's
    first level it compiles in a third to a half of the time and gives the same bits as fast.  A
    level that $XLA_FLAGS names stands.
    """
    level = "xla_backend_optimization_level"
    lightly = jax.default_backend() == "cpu" and level not in os.environ.get("XLA_FLAGS", "")
    options = {level: 1} if lightly else None
    return jax.jit(function, out_shardings=out_shardings, compiler_options=options)


def _is_writable(folder: str) -> bool:
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
