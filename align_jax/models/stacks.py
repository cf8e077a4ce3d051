# SPDX-License-Identifier: Apache-2.0
"""How layers of unlike kinds are run: in few loops, so that depth costs no compile time.

d d d e e e e e      ->  "layers0": d x 3        "layers3": e x 5
d e d e d e d        ->  "layers0": (d e) x 3    "layers6": d x 1
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

LONGEST = 8  # layers of a repeating pattern, at most: all of them are compiled


@dataclasses.dataclass(frozen=True)
class Stack:
    """Consecutive layers that one loop runs, their parameters one after the other along an axis.

    Attributes:
        name: below which their parameters stand.
        first: number of the first layer.
        count: turns of the loop.
        kinds: of the layers of each turn.
    """

    name: str
    first: int
    count: int
    kinds: tuple[str, ...]

    @property
    def end(self) -> int:
        """The number behind the last layer's."""
        return self.first + self.count * len(self.kinds)

    def path(self, place: int) -> str:
        """Return below which path the parameters of a turn's layer stand."""
        return self.name if len(self.kinds) == 1 else f"{self.name}/{place}"

    def layers(self, place: int) -> range:
        """Return the numbers of the layers whose parameters stand there."""
        return range(self.first + place, self.end, len(self.kinds))


def stacks(kinds: Sequence[str]) -> tuple[Stack, ...]:
    """Part layers into few stacks: from the front, the pattern that goes on longest, and of such
    the shortest.

    Args:
        kinds: of each layer.
    """
    out: list[Stack] = []
    first = 0
    while first < len(kinds):
        rest = tuple(kinds[first:])
        found = [(size, _turns(rest, size)) for size in range(1, LONGEST + 1)]
        size, count = max(
            ((size, count) for size, count in found if size == 1 or count > 1),
            key=lambda pattern: (pattern[0] * pattern[1], -pattern[0]),
        )
        out.append(Stack(f"layers{first}", first, count, rest[:size]))
        first = out[-1].end
    return tuple(out) if len(out) > 1 else (dataclasses.replace(out[0], name="layers"),)


def _turns(kinds: tuple[str, ...], size: int) -> int:
    """Return how many times the first few come one after the other."""
    count = 1
    while kinds[count * size : (count + 1) * size] == kinds[:size]:
        count += 1
    return count
