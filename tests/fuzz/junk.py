# SPDX-License-Identifier: Apache-2.0
"""Values that nobody meant to hand in, and where in a JSON value they are put."""

from __future__ import annotations

import copy
import math
from typing import Any

from hypothesis import strategies as st

NUMBERS = (
    *(0, 1, -1, 2, 7, -7, 10**6, -(10**6), 2**31, 2**63, -(2**63), 10**30, 10**400),
    *(0.0, -0.0, 0.5, 1.0, 1.5, 1e-320, 1e38, 1e39, -1e39, 1e308, math.inf, -math.inf, math.nan),
)
TEXTS = (
    *("", " ", "\n", "0", "1", "-1", "1.5", "nan", "inf", "true", "null", "None", "[]", "{}"),
    *("[1", '[{"role": "user"}]', "a\x00b", "\x1b[2J", "\u2028", "e\u0301", "\U0001f600"),
    *("\ud83d", "{{ x }}", "{% raw %}", "<|end|>", "</s>", "../..", "x" * 3000, "%s", "\\"),
)
LISTS: tuple[Any, ...] = (
    *([], [None], [[]], [{}], [1], ["a"], ["a", "b"], [math.nan], [True], {}, {"a": 1}),
    *({"": ""}, {"role": "user"}, {"content": "a"}, {"role": "user", "content": "a"}),
    *([{"role": "user", "content": "a"}], [{"from": "gpt", "value": "a"}], [[[[1]]]]),
    *({"role": ["user"], "content": "a"}, {"role": None, "content": None}, [{"type": "text"}]),
)
KEYS = ("", "a", "role", "content", "weight", "label", "scores", "name", "loss", "type", "\ud83d")

numbers = st.sampled_from(NUMBERS)
texts = st.sampled_from(TEXTS)
values: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    numbers,
    texts,
    st.sampled_from(LISTS).map(copy.deepcopy),  # a case is changed after it is drawn
    st.text(max_size=4),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value within a JSON value, its own first."""
    found = [path]
    if isinstance(value, dict):
        inner = list(value.items())
    else:
        inner = list(enumerate(value)) if isinstance(value, list) else []
    for key, one in inner:
        found += places(one, (*path, key))
    return found


@st.composite
def mutated(draw: st.DrawFn, value: Any, most: int = 3, least: int = 1) -> Any:
    """Change a few places of a JSON value: another value, gone, wrapped, twice, another key."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(least, most))):
        inner = places(value)[1:]
        if not inner:
            return value
        *path, last = draw(st.sampled_from(inner))
        holder = value
        for key in path:
            holder = holder[key]
        how = draw(st.sampled_from(("replace", "replace", "delete", "wrap", "twice", "key", "add")))
        if how == "replace":
            holder[last] = draw(values)
        elif how == "delete":
            del holder[last]
        elif how == "wrap":
            one = holder[last]
            holder[last] = draw(st.sampled_from((list, dict, "pair")))
            holder[last] = {list: [one], dict: {"a": one}, "pair": [one, one]}[holder[last]]
        elif how == "twice" and isinstance(holder, list):
            holder.insert(last, copy.deepcopy(holder[last]))
        elif isinstance(holder, dict):
            one = holder.pop(last) if how == "key" else draw(values)
            holder[draw(st.sampled_from(KEYS))] = one
        else:
            holder.append(draw(values))
    return value
