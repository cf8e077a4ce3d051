# SPDX-License-Identifier: Apache-2.0
"""From one kind of feedback to another: pairs to labels, rankings to pairs, scores to pairs or
labels.

Kinds: ``completions`` (one response), ``pairs`` (chosen first), ``ranked`` (best first),
``unpaired`` (a label), ``scored`` (one response with a number; several rows may share a prompt),
``prompts`` (no response).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from align_jax.core.schema import Example

KINDS = ("completions", "pairs", "ranked", "unpaired", "prompts")
PAIRINGS = ("best_worst", "adjacent", "all", "random")


def convert(
    examples: Sequence[Example],
    source: str,
    target: str,
    *,
    pairing: str = "best_worst",
    min_difference: float = 0.0,
    threshold: float | str = "median",
    seed: int = 0,
) -> list[Example]:
    """Convert examples from one kind of feedback to another.

    Args:
        examples: examples of kind ``source``.
        source: their kind.
        target: the kind wanted.
        pairing: which pairs are made of several responses to a prompt: ``best_worst`` (one),
            ``adjacent`` (of neighbors in rank), ``all``, or ``random`` (one).
        min_difference: pairs whose scores differ by no more than this are left out, in units of
            score.
        threshold: a response is desirable if its score is above this: a number, ``mean`` or
            ``median`` of all scores.
        seed: for ``random``.

    Returns:
        Examples of kind ``target``.

    Raises:
        ValueError: no way from one kind to the other, or an unknown pairing or threshold.
    """
    if pairing not in PAIRINGS:
        raise ValueError(f"unknown pairing {pairing!r}; known: {list(PAIRINGS)}")
    if source == target:
        return list(examples)
    if target == "prompts":
        return [_ask(example, source) for example in _unique(examples)]
    if (source, target) not in CONVERSIONS:
        ways = sorted(f"{a} to {b}" for a, b in CONVERSIONS)
        raise ValueError(f"no conversion from {source} to {target}; there are: {', '.join(ways)}")
    options = _Options(pairing, min_difference, threshold, seed)
    return CONVERSIONS[source, target](examples, options)


@dataclasses.dataclass(frozen=True)
class _Options:
    pairing: str
    min_difference: float
    threshold: float | str
    seed: int


def _ask(example: Example, source: str) -> Example:
    """Keep the prompt; an answer that came with it stays as the column ``answer``, for rewards that
    compare with it."""
    extras = dict(example.extras)
    if (
        source == "completions"
        and len(example.responses) == 1
        and isinstance(example.responses[0], str)
    ):
        extras.setdefault("answer", example.responses[0])
    return dataclasses.replace(example, responses=(), label=None, scores=None, extras=extras)


def prompt_key(example: Example) -> str:
    """Return a text that is equal for equal prompts."""
    return (
        example.prompt
        if isinstance(example.prompt, str)
        else json.dumps(list(example.prompt), sort_keys=True)
    )


def _unique(examples: Sequence[Example]) -> list[Example]:
    return list({prompt_key(example): example for example in reversed(examples)}.values())[::-1]


def _split(examples: Sequence[Example], options: _Options) -> list[Example]:
    """Take each response of a pair as an example of its own: the chosen desirable, the rejected
    not."""
    return [
        dataclasses.replace(
            example,
            responses=(response,),
            label=index == 0,
            margin=0.0,
            scores=example.scores and (example.scores[index],),
        )
        for example in examples
        for index, response in enumerate(example.responses)
    ]


def _first(examples: Sequence[Example], options: _Options) -> list[Example]:
    return [
        dataclasses.replace(
            example,
            responses=example.responses[:1],
            margin=0.0,
            scores=example.scores and example.scores[:1],
        )
        for example in examples
    ]


def _desirable(examples: Sequence[Example], options: _Options) -> list[Example]:
    return [dataclasses.replace(example, label=None) for example in examples if example.label]


def _level(examples: Sequence[Example], options: _Options) -> float:
    scores = [score for example in examples for score in example.scores or ()]
    if options.threshold == "mean":
        return statistics.fmean(scores)
    if options.threshold == "median":
        return statistics.median(scores)
    if isinstance(options.threshold, str):
        raise ValueError(
            f"unknown threshold {options.threshold!r}: expected a number, 'mean' or 'median'"
        )
    return float(options.threshold)


def _label_by_score(examples: Sequence[Example], options: _Options) -> list[Example]:
    missing = next((example.source for example in examples if example.scores is None), None)
    if missing is not None:
        raise ValueError(f"{missing}: labels are made of scores, and there are none")
    level = _level(examples, options)
    return [
        dataclasses.replace(example, responses=(response,), scores=(score,), label=score > level)
        for example in examples
        for response, score in zip(example.responses, example.scores)
    ]


def _pairs_of_ranked(examples: Sequence[Example], options: _Options) -> list[Example]:
    made = []
    for number, example in enumerate(examples):
        count = len(example.responses)
        pairs = [
            (i, j)
            for i, j in itertools.combinations(range(count), 2)
            if example.scores is None
            or example.scores[i] - example.scores[j] > options.min_difference
        ]
        for i, j in _choose(pairs, count, options, number):
            scores = example.scores and (example.scores[i], example.scores[j])
            made.append(
                dataclasses.replace(
                    example, responses=(example.responses[i], example.responses[j]), scores=scores
                )
            )
    return made


def _choose(
    pairs: list[tuple[int, int]], count: int, options: _Options, number: int
) -> list[tuple[int, int]]:
    if options.pairing == "best_worst":
        return [pair for pair in pairs if pair == (0, count - 1)]
    if options.pairing == "adjacent":
        return [pair for pair in pairs if pair[1] - pair[0] == 1]
    if options.pairing == "random" and pairs:
        return [pairs[int(np.random.default_rng([options.seed, number]).integers(len(pairs)))]]
    return pairs


def group_scored(examples: Sequence[Example], options: _Options) -> list[Example]:
    """Gather scored responses by prompt into rankings, best first; prompts with one response are
    left out."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(prompt_key(example), []).append(example)
    ranked = []
    for members in groups.values():
        if len(members) > 1:
            members = sorted(
                members, key=lambda member: -(member.scores or (float(bool(member.label)),))[0]
            )
            ranked.append(
                dataclasses.replace(
                    members[0],
                    responses=tuple(member.responses[0] for member in members),
                    label=None,
                    scores=tuple(
                        (member.scores or (float(bool(member.label)),))[0] for member in members
                    ),
                )
            )
    return ranked


def _pairs_of_scored(examples: Sequence[Example], options: _Options) -> list[Example]:
    return _pairs_of_ranked(group_scored(examples, options), options)


def _pairs_of_unpaired(examples: Sequence[Example], options: _Options) -> list[Example]:
    plain = [dataclasses.replace(example, scores=None) for example in examples]
    return [dataclasses.replace(pair, scores=None) for pair in _pairs_of_scored(plain, options)]


def _plain(examples: Sequence[Example], options: _Options) -> list[Example]:
    return [dataclasses.replace(example, scores=None) for example in examples]


CONVERSIONS: Mapping[tuple[str, str], Callable[[Sequence[Example], _Options], list[Example]]] = {
    ("pairs", "unpaired"): _split,
    ("pairs", "completions"): _first,
    ("pairs", "ranked"): lambda examples, options: list(examples),
    ("ranked", "pairs"): _pairs_of_ranked,
    ("ranked", "completions"): _first,
    ("ranked", "unpaired"): _label_by_score,
    ("unpaired", "completions"): _desirable,
    ("unpaired", "pairs"): _pairs_of_unpaired,
    ("scored", "pairs"): _pairs_of_scored,
    ("scored", "ranked"): group_scored,
    ("scored", "unpaired"): _label_by_score,
    ("scored", "completions"): _plain,
}


def balance(examples: Sequence[Example], seed: int = 0) -> list[Example]:
    """Leave out examples of the more frequent label, chosen by ``seed``, until both are equally
    many."""
    sides = [
        [i for i, example in enumerate(examples) if bool(example.label) == label]
        for label in (True, False)
    ]
    fewer = min(len(side) for side in sides)
    rng = np.random.default_rng(seed)
    kept = sorted(int(i) for side in sides for i in rng.permutation(side)[:fewer])
    return [examples[i] for i in kept]


def take_responses(examples: Sequence[Example], count: int) -> tuple[list[Example], int]:
    """Give every ranking ``count`` responses: the best, the worst, and those evenly between.

    Returns:
        The examples, and how many had too few responses and were left out.
    """
    made = []
    for example in examples:
        have = len(example.responses)
        if have >= count:
            picked = [round(i * (have - 1) / max(count - 1, 1)) for i in range(count)]
            made.append(
                dataclasses.replace(
                    example,
                    responses=tuple(example.responses[i] for i in picked),
                    scores=example.scores and tuple(example.scores[i] for i in picked),
                )
            )
    return made, len(examples) - len(made)
