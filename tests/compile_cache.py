# SPDX-License-Identifier: Apache-2.0
"""Programs of one device alone are kept in JAX's compilation cache.

A program of several CPU devices that is read from it has lost the order of its collectives (an XLA
that deserializes them gives those within a loop a communicator of their own), so that its devices
may wait for each other in different ones, for ever.
"""

from typing import Any

from jax._src import compiler  # there is no public switch for one program

key_of = compiler._get_cache_key


def _key(options: Any, backend: Any, computation: Any, devices: Any, *rest: Any) -> str | None:
    return None if devices.size > 1 else key_of(options, backend, computation, devices, *rest)


compiler._get_cache_key = _key
