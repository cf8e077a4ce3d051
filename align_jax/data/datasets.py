# SPDX-License-Identifier: Apache-2.0
"""Loading examples: sources opened, rows read by their format, kinds converted, mistakes found, all
at the start."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from align_jax.core.schema import Example
from align_jax.data import conversions, formats
from align_jax.data import named as named_sets
from align_jax.data.sources import Source, open_source
from align_jax.data.transcripts import Flawed, Unusable


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples of one kind.

    Attributes:
        kind: ``completions``, ``pairs``, ``ranked``, ``unpaired`` or ``prompts``.
        items: the examples, source after source.
        ends: where each source's examples end.
        weights: each source's share of the training examples; None: as many as it has.
        digest: changes when the examples do; part of cache keys.
        report: counts of what was read and dropped, by reason.
    """

    kind: str
    items: tuple[Example, ...]
    ends: tuple[int, ...]
    weights: tuple[float, ...] | None
    digest: str
    report: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Example:
        return self.items[index]


def load(
    specs: str | Sequence[str],
    *,
    kind: str,
    chat: bool,
    weights: Sequence[float | int] | None = None,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    invalid: str = "error",
    responses: int | None = None,
    pairing: str = "best_worst",
    min_difference: float = 0.0,
    threshold: float | str = "median",
    labels: str = "natural",
    strings: str = "plain",
    turns: str = "all",
    limit: int | None = None,
    seed: int = 0,
) -> Examples:
    """Load examples of the kind an objective needs.

    Args:
        specs: one source or several (see ``data.sources``), or named data sets (``set:...``, see
            ``data.named``).
        kind: ``completions``, ``pairs``, ``ranked``, ``unpaired`` or ``prompts``; other kinds of
            data are converted.
        chat: whether the tokenizer has a chat template; transcripts and instructions then become
            messages.
        weights: each source's share of the training examples.
        format: a key of ``FORMATS``, or of ``DATASETS`` (its format and its filter); found from
            each source's first row where None.
        columns: the format's field name -> the data's column name.
        invalid: what to do with a row of which no example can be made: ``error``, or ``drop`` and
            count it; Anthropic transcripts, whose public files hold some, are always dropped and
            counted.
        responses: R, where kind is ``ranked``: rankings with more are thinned, those with fewer
            left out.
        pairing, min_difference, threshold, seed: see ``conversions.convert``.
        labels: ``natural``, or ``balanced``: as many desirable as undesirable examples.
        strings: what a prompt that is a mere text means: ``plain`` text, or (``messages``) one turn
            of a user.
        turns: of a conversation with several answers, learn ``all`` or only the ``last`` (the
            others are context).
        limit: at most so many rows of each source.

    Returns:
        The examples.

    Raises:
        FileNotFoundError: a missing file.
        KeyError: an unknown format.
        ValueError: a malformed or unusable row (with file and line), an impossible conversion, or
            nothing left.
    """
    specs = [specs] if isinstance(specs, str) else list(specs)
    _check(specs, weights, kind=kind, invalid=invalid, labels=labels, strings=strings, turns=turns)
    counts: collections.Counter[str] = collections.Counter()
    items: list[Example] = []
    ends, digests = [], []
    for spec in specs:
        read, found, digest = _read(spec, limit, format, columns or {}, chat, invalid, seed, counts)
        read = [_reshape(example, strings, turns) for example in read]
        made = conversions.convert(
            read,
            found,
            kind,
            pairing=pairing,
            min_difference=min_difference,
            threshold=threshold,
            seed=seed,
        )
        if kind == "ranked" and responses is not None:
            made, few = conversions.take_responses(made, responses)
            counts["dropped: too few responses"] += few
        if kind == "unpaired" and labels == "balanced":
            before, made = len(made), conversions.balance(made, seed)
            counts["dropped: balanced labels"] += before - len(made)
        if not made:
            raise ValueError(f"{spec}: no {kind} are left of {len(read)} {found}: {dict(counts)}")
        items += made
        ends.append(len(items))
        digests.append(digest)
    options = [
        digests,
        kind,
        chat,
        format,
        sorted((columns or {}).items()),
        invalid,
        responses,
        pairing,
        min_difference,
        threshold,
        labels,
        strings,
        turns,
        limit,
        seed,
    ]
    digest = hashlib.sha256(json.dumps(options).encode()).hexdigest()[:24]
    report = {"examples": len(items), **{name: count for name, count in counts.items() if count}}
    return Examples(
        kind,
        tuple(items),
        tuple(ends),
        None if weights is None else tuple(map(float, weights)),
        digest,
        report,
    )


def hold_out(
    examples: Examples, fraction: float, *, most: int, seed: int
) -> tuple[Examples, Examples | None]:
    """Divide examples into training and held-out ones, by prompt: no prompt is in both.

    Args:
        examples: all of them.
        fraction: of the examples, held out; 0: none.
        most: at most about so many examples held out; 0: no limit.
        seed: of the choice.

    Returns:
        (training, held out); the latter None where nothing is held out.

    Raises:
        ValueError: a fraction outside [0, 1), or a single prompt.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"data.eval_fraction = {fraction}: expected from 0 to below 1")
    wanted = min(round(fraction * len(examples)), most or len(examples))
    if not wanted:
        return examples, None
    of_prompt: dict[str, list[int]] = collections.defaultdict(list)
    for index, example in enumerate(examples.items):
        of_prompt[json.dumps(example.prompt, default=str)].append(index)
    if len(of_prompt) < 2:
        raise ValueError(
            f"data.eval_fraction = {fraction}: all {len(examples)} examples have "
            "the same prompt, so none "
            "can be held out; set it to 0, or name data.eval"
        )
    held: set[int] = set()
    for prompt in random.Random(seed).sample(sorted(of_prompt), len(of_prompt) - 1):
        if len(held) >= wanted:
            break
        held.update(of_prompt[prompt])

    def part(name, inside):
        return dataclasses.replace(
            examples,
            digest=f"{examples.digest}-{name}-{fraction}-{most}-{seed}",
            items=tuple(
                example for i, example in enumerate(examples.items) if (i in held) == inside
            ),
            ends=tuple(
                end - sum(i < end for i in held) if not inside else sum(i < end for i in held)
                for end in examples.ends
            ),
            weights=None if inside else examples.weights,
        )

    return part("train", False), part("held_out", True)


_CHOICES = {
    "kind": conversions.KINDS,
    "invalid": ("error", "drop"),
    "labels": ("natural", "balanced"),
    "strings": ("plain", "messages"),
    "turns": ("all", "last"),
}


def _check(specs: Sequence[str], weights: Sequence[float | int] | None, **choices: str) -> None:
    for name, value in choices.items():
        if value not in _CHOICES[name]:
            near = difflib.get_close_matches(str(value), _CHOICES[name], n=1)
            raise ValueError(
                f"unknown {name} {value!r}"
                + (f" (did you mean {near[0]!r}?)" if near else "")
                + f"; known: {list(_CHOICES[name])}"
            )
    if not specs:
        raise ValueError("no data source given; set data.train")
    if weights is not None and (len(weights) != len(specs) or min(weights) <= 0):
        raise ValueError(
            f"data weights: expected {len(specs)} positive numbers, one a source, "
            f"got {list(weights)}"
        )


def _read(
    spec: str,
    limit: int | None,
    format: str | None,
    columns: Mapping[str, str],
    chat: bool,
    invalid: str,
    seed: int,
    counts: collections.Counter[str],
) -> tuple[list[Example], str, str]:
    """Read one source: its examples, their kind, and what identifies the data."""
    if format in named_sets.DATASETS:
        spec, format = f"set:{format}:{spec}", None
    named, location, training = (
        named_sets.resolve(spec) if spec.startswith("set:") else (None, spec, True)
    )
    source = open_source(location)
    size = len(source) if limit is None else min(limit, len(source))
    rows: Iterable[tuple[str, Mapping[str, Any]]] = (
        (source.where(index), _rename(source[index], columns, source.where(index)))
        for index in range(size)
    )
    if named is not None and named.gather is not None:
        rows = [
            (f"{spec}[{index}]", row)
            for index, row in enumerate(named.gather([row for _, row in rows]))
        ]
    name = format or (named.format if named is not None else _detect(source, columns))
    examples: list[Example] = []
    for where, row in rows:
        try:
            found = formats.read(row, name, chat=chat)
        except Unusable as error:
            if invalid == "error" and not isinstance(error, Flawed):
                raise ValueError(
                    f"{where}: {error}; data.invalid='drop' leaves such rows out"
                ) from error
            counts[f"dropped: {error}"] += 1
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}: {error}") from error
        else:
            examples += [dataclasses.replace(example, source=where) for example in found]
    if named is not None and named.keep is not None:
        before, examples = len(examples), list(named.keep(examples, training, seed))
        counts["dropped: the data set's own filter"] += before - len(examples)
    return examples, formats.FORMATS[name].kind, f"{spec}={source.digest}"


def _detect(source: Source, columns: Mapping[str, str]) -> str:
    try:
        return formats.detect(_rename(source[0], columns, source.where(0)))
    except ValueError as error:
        where = source.where(0)
        raise ValueError(
            str(error) if str(error).startswith(where) else f"{where}: {error}"
        ) from error


def _reshape(example: Example, strings: str, turns: str) -> Example:
    if strings == "messages" and isinstance(example.prompt, str) and example.prompt:
        example = dataclasses.replace(
            example, prompt=({"role": "user", "content": example.prompt},)
        )
    if (
        turns == "last"
        and len(example.responses) == 1
        and not isinstance(example.responses[0], str)
    ):
        whole = (*example.prompt, *example.responses[0])
        while whole[-1]["role"] != "assistant":
            whole = whole[:-1]
        example = dataclasses.replace(example, prompt=whole[:-1], responses=(whole[-1]["content"],))
    return example


def _rename(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Mapping[str, Any]:
    if not columns:
        return row
    missing = sorted(set(columns.values()) - set(row))
    if missing:
        raise ValueError(
            f"{where}: data.columns names the columns {missing}; the row has {sorted(row)}"
        )
    renamed = {
        key: value
        for key, value in row.items()
        if key not in columns.values() and key not in columns
    }
    return {**renamed, **{field: row[column] for field, column in columns.items()}}
