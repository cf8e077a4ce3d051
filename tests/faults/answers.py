# SPDX-License-Identifier: Apache-2.0
"""An environment for the processes that tests start."""


def odd(said: str) -> str | None:
    """End an episode at an answer of an odd number of characters."""
    return None if len(said) % 2 else "again"
