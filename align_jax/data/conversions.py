# SPDX-License-Identifier: Apache-2.0
"""From one kind of feedback to another: pairs to labels, rankings to pairs, scores to labels.

Kinds: ``completions`` (one response), ``pairs`` (chosen first), ``ranked`` (best first),
``unpaired`` (a label), ``scored`` (one response with a number; several rows may share a prompt),
``stepwise`` (one response of labeled steps), ``prompts`` (no response).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from align_jax.core.options import DataOptions
from align_jax.core.schema import Example

KINDS = ("completions", "pairs", "ranked", "unpaired", "scored", "stepwise", "prompts")

# a kind of data -> an objective that trains on it, to be told of
OBJECTIVE_OF = {
    "completions": "sft",
    "pairs": "dpo",
    "ranked": "reward_ranked",
    "unpaired": "kto",
    "scored": "reward_regression",
    "stepwise": "reward_process",
}


def convert(
    examples: Sequence[Example], source: str, target: str, options: DataOptions, *, seed: int = 0
) -> list[Example]:
    """Convert examples from one kind of feedback to another.

    Args:
        examples: examples of kind ``source``.
        source, target: their kind, and the kind wanted.
        options: ``pairing``, ``min_difference`` and ``threshold`` are read.
        seed: of a random pairing.

    Raises:
        ValueError: no way from one kind to the other, labels to be made without scores, or prompts
            of plain texts, which have none.
    """
    check_way(source, target)
    if source == target:
        return list(examples)
    if target == "prompts":
        if any(example.prompt == "" for example in examples):
            raise ValueError(
                "a text is an answer without a prompt; "
                '--config.data.columns=\'{"prompt": "text"}\' makes it the prompt'
            )
        return [_without_responses(example, source) for example in _unique(examples)]
    return CONVERSIONS[source, target](examples, options, seed)


def check_way(source: str, target: str) -> None:
    """Refuse a conversion that there is not.

    Raises:
        ValueError: with the kinds that may be given instead.
    """
    if source != target and target != "prompts" and (source, target) not in CONVERSIONS:
        sources = sorted(a for a, b in CONVERSIONS if b == target)
        others = f", or {', '.join(sources)}, of which they are made" if sources else ""
        instead = f"; or {_train_on(source)}" if source in OBJECTIVE_OF else ""
        raise ValueError(
            f"no conversion from {source} to {target}: give data of {target}{others}{instead}"
        )


def _train_on(kind: str) -> str:
    """Return what to do with data of a kind."""
    return f"train on {kind}, as by --config.objective=\"{{'name': '{OBJECTIVE_OF[kind]}'}}\""


def why_none(source: str, target: str) -> str:
    """Say why a conversion may have made nothing, and what else to do; "" where there was none.

    >>> why_none("unpaired", "pairs")[:64]
    '; they are made of answers to one prompt that differ in label or'
    """
    if source == target:
        return ""
    needs = "; they are made of answers to one prompt that differ in label or score"
    return f"{needs if target in ('pairs', 'ranked') else ''}; or {_train_on(source)}"


def prompt_key(example: Example) -> str:
    """Return a text that is equal for equal prompts."""
    if isinstance(example.prompt, str):
        return example.prompt
    return json.dumps(list(example.prompt), sort_keys=True, default=str)


def _unique(examples: Sequence[Example]) -> list[Example]:
    """Return the first example of each prompt, in the order of the prompts' last ones."""
    first: dict[str, Example] = {}
    for example in reversed(examples):
        first[prompt_key(example)] = example
    return list(first.values())[::-1]


def _without_responses(example: Example, source: str) -> Example:
    """Keep the prompt; the answer of a completion becomes the column ``answer``, for rewards that
    compare with it."""
    extras, responses = dict(example.extras), example.responses
    if source == "completions" and len(responses) == 1 and isinstance(responses[0], str):
        extras.setdefault("answer", responses[0])
    return dataclasses.replace(
        example, responses=(), label=None, scores=None, steps=None, extras=extras
    )


def _take(example: Example, *indices: int) -> Example:
    """Return the example with these of its responses, in this order."""
    scores = example.scores
    return dataclasses.replace(
        example,
        responses=tuple(example.responses[i] for i in indices),
        scores=None if scores is None else tuple(scores[i] for i in indices),
    )


def _without_scores(examples: Sequence[Example]) -> list[Example]:
    return [dataclasses.replace(example, scores=None) for example in examples]


def _as_they_are(examples: Sequence[Example], options: DataOptions, seed: int) -> list[Example]:
    return list(examples)


def _unscored(examples: Sequence[Example], options: DataOptions, seed: int) -> list[Example]:
    return _without_scores(examples)


def _split(examples: Sequence[Example], options: DataOptions, seed: int) -> list[Example]:
    """Take each response of a pair by itself: the chosen desirable, the rejected not."""
    return [
        dataclasses.replace(_take(example, index), label=index == 0, margin=0.0)
        for example in examples
        for index in range(len(example.responses))
    ]


def _best(examples: Sequence[Example], options: DataOptions, seed: int) -> list[Example]:
    return [dataclasses.replace(_take(example, 0), margin=0.0) for example in examples]


def _desirable(examples: Sequence[Example], options: DataOptions, seed: int) -> list[Example]:
    return [dataclasses.replace(example, label=None) for example in examples if example.label]


def _threshold(scores: Sequence[float], threshold: str) -> float:
    if threshold == "mean":
        return statistics.fmean(scores)
    if threshold == "median":
        return statistics.median(scores)
    return float(threshold)


def _label_by_score(examples: Sequence[Example], options: DataOptions, seed: int) -> list[Example]:
    scores: list[float] = []
    for example in examples:
        if example.scores is None:
            raise ValueError(f"{example.source}: labels are made of scores, and there are none")
        scores += example.scores
    threshold, made = _threshold(scores, options.threshold), []
    for example in examples:
        for index, score in enumerate(example.scores or ()):
            made.append(dataclasses.replace(_take(example, index), label=score > threshold))
    return made


def _pairs_of_ranked(examples: Sequence[Example], options: DataOptions, seed: int) -> list[Example]:
    made = []
    for number, example in enumerate(examples):
        count, scores = len(example.responses), example.scores
        pairs = [
            (i, j)
            for i, j in itertools.combinations(range(count), 2)
            if scores is None or scores[i] - scores[j] > options.min_difference
        ]
        if options.pairing == "best_worst":
            pairs = [pair for pair in pairs if pair == (0, count - 1)]
        elif options.pairing == "adjacent":
            pairs = [pair for pair in pairs if pair[1] - pair[0] == 1]
        elif options.pairing == "random" and pairs:
            pairs = [pairs[int(np.random.default_rng([seed, number]).integers(len(pairs)))]]
        made += [_take(example, *pair) for pair in pairs]
    return made


def _score(example: Example) -> float:
    """Return a single response's score, of one with a label 1 or 0."""
    return example.scores[0] if example.scores else float(bool(example.label))


def _whole(examples: Sequence[Example], options: DataOptions, seed: int) -> list[Example]:
    """Label a response of steps as a whole: desirable where no step is wrong."""
    made = []
    for example in examples:
        known = [label for _, label in example.steps or () if label is not None]
        made.append(dataclasses.replace(example, steps=None, label=min(known) >= 0.5))
    return made


def _right(examples: Sequence[Example], options: DataOptions, seed: int) -> list[Example]:
    return _desirable(_whole(examples, options, seed), options, seed)


def _each_scored(examples: Sequence[Example], options: DataOptions, seed: int) -> list[Example]:
    """Take each response by itself, with its score; of feedback by labels 1 or 0."""
    made = []
    for example in examples:
        if example.scores is None and example.label is None:
            given = [name for name in ("score", "reward") if name in example.extras]
            held = "".join(f", got {name}: {example.extras[name]!r:.40}" for name in given)
            raise ValueError(
                f"{example.source}: no score: a column score or reward holds a finite number for "
                f"each response (of pairs: score_chosen and score_rejected){held}; "
                "--config.data.invalid=drop leaves such rows out"
            )
        for index in range(len(example.responses)):
            one = _take(example, index)
            made.append(dataclasses.replace(one, scores=(_score(one),), label=None, margin=0.0))
    return made


def _rank_by_prompt(examples: Sequence[Example], options: DataOptions, seed: int) -> list[Example]:
    """Gather scored responses by prompt into rankings; prompts with one response are left out."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(prompt_key(example), []).append(example)
    ranked = []
    for members in groups.values():
        if len(members) > 1:
            best_first = sorted(members, key=lambda member: -_score(member))
            ranked.append(
                dataclasses.replace(
                    best_first[0],
                    responses=tuple(member.responses[0] for member in best_first),
                    label=None,
                    scores=tuple(map(_score, best_first)),
                )
            )
    return ranked


def _pairs_of_scored(examples: Sequence[Example], options: DataOptions, seed: int) -> list[Example]:
    return _pairs_of_ranked(_rank_by_prompt(examples, options, seed), options, seed)


def _pairs_of_labeled(
    examples: Sequence[Example], options: DataOptions, seed: int
) -> list[Example]:
    return _without_scores(_pairs_of_scored(_without_scores(examples), options, seed))


Conversion = Callable[[Sequence[Example], DataOptions, int], list[Example]]
CONVERSIONS: Mapping[tuple[str, str], Conversion] = {
    ("pairs", "unpaired"): _split,
    ("pairs", "completions"): _best,
    ("pairs", "ranked"): _as_they_are,
    ("ranked", "pairs"): _pairs_of_ranked,
    ("ranked", "completions"): _best,
    ("ranked", "unpaired"): _label_by_score,
    ("unpaired", "completions"): _desirable,
    ("unpaired", "pairs"): _pairs_of_labeled,
    ("scored", "pairs"): _pairs_of_scored,
    ("scored", "ranked"): _rank_by_prompt,
    ("scored", "unpaired"): _label_by_score,
    ("scored", "completions"): _unscored,
    ("stepwise", "unpaired"): _whole,
    ("stepwise", "completions"): _right,
    ("completions", "scored"): _each_scored,
    ("pairs", "scored"): _each_scored,
    ("ranked", "scored"): _each_scored,
    ("unpaired", "scored"): _each_scored,
}


def keep_shares(
    examples: Sequence[Example], desirable: float, undesirable: float, seed: int = 0
) -> list[Example]:
    """Keep a share of the examples of each label, chosen by ``seed``, in their order.

    Of pairs split in two each response is chosen by itself, so that one of a pair may be left.

    Args:
        examples: labeled ones.
        desirable, undesirable: shares in (0, 1], rounded up to whole examples.

    References:
        Ethayarajh et al. 2024, arXiv 2402.01306, section 4 (imbalances made from pairs); HALOs,
        commit 4831988, ``frac_unique_desirable`` of config.yaml.  What its loader does is not what
        that file says: it takes the first examples, and counts the share from all responses, of
        pairs from twice as many as there are of a label.
    """
    rng, kept = np.random.default_rng([seed, 1]), []
    for label, share in ((True, desirable), (False, undesirable)):
        own = [i for i, example in enumerate(examples) if bool(example.label) == label]
        # 0.7 of 10 are 7, though 0.7 * 10 is a bit more
        count = math.ceil(round(share * len(own), 6))
        kept += rng.permutation(own)[:count].tolist()
    return [examples[int(i)] for i in sorted(kept)]


def keep_apart(examples: Sequence[Example], least: float) -> list[Example]:
    """Leave out pairs whose scores differ by no more; those without scores are kept."""
    return [
        one for one in examples if one.scores is None or abs(one.scores[0] - one.scores[1]) > least
    ]


def balance(examples: Sequence[Example], seed: int = 0) -> list[Example]:
    """Leave out examples of the more frequent label, chosen by ``seed``, until both are equally
    many."""
    desirable = [i for i, example in enumerate(examples) if example.label]
    undesirable = [i for i, example in enumerate(examples) if not example.label]
    fewer = min(len(desirable), len(undesirable))
    rng = np.random.default_rng(seed)
    kept = [*rng.permutation(desirable)[:fewer], *rng.permutation(undesirable)[:fewer]]
    return [examples[i] for i in sorted(kept)]


def take_responses(examples: Sequence[Example], count: int) -> tuple[list[Example], int]:
    """Give every ranking ``count`` responses: the best, the worst, and those evenly between.

    Returns:
        The examples, and how many had too few responses and were left out.
    """
    made = []
    for example in examples:
        last = len(example.responses) - 1
        if last + 1 >= count:
            picked = [round(i * last / max(count - 1, 1)) for i in range(count)]
            made.append(_take(example, *picked))
    return made, len(examples) - len(made)
