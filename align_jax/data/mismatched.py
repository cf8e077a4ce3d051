# SPDX-License-Identifier: Apache-2.0
"""KTO's mismatched completions: which response each prompt of the data gets, fixed at the start.

A response is drawn from the whole data by what rows say and by the seed, never by where they stand:
neither the order of the file nor the batch, the step or the number of processes changes it.
"""

from __future__ import annotations

import hashlib

import numpy as np
from jaxtyping import Int

from align_jax.data import layout, truncation
from align_jax.data.encoding import Encoded
from align_jax.data.layout import TokenizedGroup
from align_jax.data.truncation import Limits, Truncation

TRIES = 256  # partners that are looked at before a response is shortened to fit


def partners(
    encoded: Encoded, groups: Int[np.ndarray, "n"], limits: Limits, seed: int
) -> dict[int, int]:
    """Return, for each group, the one whose response its prompt gets.

    Args:
        encoded: the data.
        groups: the numbers of those that are used.
        limits: a pair that ``drop`` would leave out gives way to the next that fits.
        seed: of who meets whom.

    Raises:
        ValueError: all groups have the same prompt.
    """
    order = sorted(groups.tolist(), key=lambda group: _draw(encoded, group, seed))
    keys = encoded.prompt_key[order].tolist()
    found = layout.mismatch(keys)
    if limits.policy == "drop":
        found = [_fitting(encoded, order, keys, i, at, limits) for i, at in enumerate(found)]
    return {group: order[at] for group, at in zip(order, found)}


def _draw(encoded: Encoded, group: int, seed: int) -> tuple[bytes, bytes]:
    """Return a random number of the prompt, and one of the response."""
    key = int(encoded.prompt_key[group]).to_bytes(8, "little", signed=True)
    salt = seed.to_bytes(16, "little", signed=True)
    ids = encoded.response(group, 0)[0].tobytes()
    return (
        hashlib.blake2b(key, digest_size=8, salt=salt).digest(),
        hashlib.blake2b(key + ids, digest_size=8, salt=salt).digest(),
    )


def _fitting(
    encoded: Encoded, order: list[int], keys: list[int], index: int, first: int, limits: Limits
) -> int:
    """Return the first of the partners from ``first`` on that fits; ``first`` where none does."""
    room = limits.max_length - len(encoded.prompt(order[index]))
    for step in range(min(TRIES, len(order))):
        at = (first + step) % len(order)
        if keys[at] != keys[index] and len(encoded.response(order[at], 0)[0]) <= room:
            return at
    return first


def pair(encoded: Encoded, prompt: int, response: int, limits: Limits) -> TokenizedGroup:
    """Put one group's prompt before another's response, truncated together; a response that
    ``drop`` would leave out loses its end."""
    ids, mask = encoded.response(response, 0)
    left = truncation.truncate_group(encoded, prompt, (len(ids),), limits)
    if left.reason:
        size = len(encoded.prompt(prompt))
        left = Truncation(size, 0, (min(len(ids), limits.max_length - size),))
    return left.group(TokenizedGroup(encoded.prompt(prompt), ((ids, mask),)))
