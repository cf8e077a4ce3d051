# SPDX-License-Identifier: Apache-2.0
"""Loading examples: sources opened, rows read by their format, kinds converted, mistakes found, all
at the start."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm
from jaxtyping import Bool

from align_jax.core import own
from align_jax.core.choose import nearest
from align_jax.core.options import DataOptions
from align_jax.core.progress import last_words, printable
from align_jax.core.schema import Example
from align_jax.data import cache, conversions, formats, named
from align_jax.data.messages import ROLES, Row, answer_of, decoded, with_roles
from align_jax.data.rows import fields_of
from align_jax.data.sources import Source, find_source
from align_jax.data.transcripts import RowError, TranscriptError


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples of one kind.

    Attributes:
        kind: ``completions``, ``pairs``, ``ranked``, ``unpaired`` or ``prompts``.
        items: the examples, source after source; they are read when the first is asked for, where
            all else is known from the cache.
        ends: where each source's examples end.
        weights: each source's share of the training examples; None: as many as it has.
        digest: changes when the examples do; part of cache keys.
        report: counts of what was read and dropped, by reason.
    """

    kind: str
    items: Sequence[Any]  # a check of the elements' type would read them
    ends: tuple[int, ...]
    weights: tuple[float, ...] | None
    digest: str
    report: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Example:
        return self.items[index]


class Later(Sequence[Example]):
    """Examples whose number is known, read when the first of them is asked for.

    Args:
        size: how many there are.
        read: reads them all.
    """

    def __init__(self, size: int, read: Callable[[], Sequence[Example]]):
        self._size, self._read = size, read

    @functools.cached_property
    def _items(self) -> Sequence[Example]:
        items = self._read()
        if len(items) != self._size:
            raise ValueError(
                f"{len(items)} examples, where the cache tells of {self._size}: did the data "
                "change while they were read? Remove config.data.cache"
            )
        return items

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        return self._items[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self._items)


VERSION = 7  # of how rows become examples: what is kept of an older one is made anew
# what of the options decides which examples there are; the digest is made of it
_READ = (
    "format",
    "columns",
    "roles",
    "invalid",
    "strings",
    "turns",
    "responses",
    "pairing",
    "min_difference",
    "threshold",
    "labels",
    "frac_unique_desirable",
    "frac_unique_undesirable",
)


def load(
    specs: str | Sequence[str | Source],
    kind: str,
    options: DataOptions,
    *,
    chat: bool,
    seed: int = 0,
    limit: int | None = None,
    weights: Sequence[float] | None = None,
    strict: bool = False,
) -> Examples:
    """Load examples of the kind an objective needs.

    Args:
        specs: one source or several (see ``data.sources``, ``data.given``), or named data sets
            (``set:...``, see ``data.named``).
        kind: one of ``conversions.KINDS``; data of other kinds are converted.
        options: how rows are read and converted.  Anthropic transcripts of which no example can be
            made are dropped and counted whatever ``invalid`` says: the public files hold some.
        chat: whether the tokenizer has a chat template; transcripts and instructions then become
            messages.
        seed: of random choices among the data's pairs and labels.
        limit: at most so many rows of each source.
        weights: each source's share of the training examples; None: as many as it has.
        strict: the options are given for these examples, and each is to make something of them.

    Raises:
        FileNotFoundError: a missing file.
        ValueError: an unknown format, a malformed or unusable row (with file and line), an
            impossible conversion, nothing left, or (``strict``) an option without effect.
    """
    specs = [specs] if isinstance(specs, str) else list(specs)
    _check(specs, kind, options, weights)
    found = [_find(spec, options) for spec in specs]
    inputs = [VERSION, [one.digest for one in found], kind, chat, seed, limit]
    inputs += [[getattr(options, name) for name in _READ], own.digest(options.format)]
    digest = hashlib.sha256(json.dumps(inputs, default=dict).encode()).hexdigest()[:24]

    @functools.cache
    def read() -> tuple[list[Example], list[int], Mapping[str, Any]]:
        return _read_all(found, kind, options, chat=chat, seed=seed, limit=limit, strict=strict)

    def make() -> cache.Kept:
        _, ends, report = read()
        return cache.Kept({"ends": np.asarray(ends, np.int64)}, {"report": report})

    kept = cache.keep(options.cache, f"examples-{digest}", make)
    ends = tuple(kept.arrays["ends"].tolist())
    return Examples(
        kind,
        Later(ends[-1], lambda: read()[0]),
        ends,
        tuple(map(float, weights)) if weights else None,
        digest,
        kept.notes["report"],
    )


def _read_all(
    found: Sequence[_Found],
    kind: str,
    options: DataOptions,
    *,
    chat: bool,
    seed: int,
    limit: int | None,
    strict: bool,
) -> tuple[list[Example], list[int], Mapping[str, Any]]:
    """Read all sources: the examples, where each source's end, and counts by reason."""
    counts: collections.Counter[str] = collections.Counter()
    items: list[Example] = []
    beside: set[str] = set()
    ends, kinds = [], set()
    for one in found:
        rows = _read(one, options, kind, chat=chat, seed=seed, limit=limit, counts=counts)
        made = _of_kind(rows, kind, options, seed, counts)
        if not made:
            counted = f": {_positive(counts)}" if _positive(counts) else ""
            raise ValueError(
                f"{one.name}: no {kind} are left of {len(rows.examples)} {rows.kind}{counted}"
                f"{conversions.why_none(rows.kind, kind)}"
            )
        items += made
        beside.update(rows.beside)
        ends.append(len(items))
        kinds.add(rows.kind)
    if not any(example.weight for example in items):
        specs = ", ".join(one.name for one in found)
        raise ValueError(f"{specs}: all {len(items)} examples have the weight 0")
    if strict:
        _check_effects(options, kinds, counts, items)
    report: dict[str, Any] = {"examples": len(items), **_positive(counts)}
    if beside:
        shown = " ".join(printable(f"{name:.40}") for name in sorted(beside)[:10])
        report["columns beside the text"] = shown
    return items, ends, report


RENAMED = "rows with other names of roles"
ASKED = "texts that are a user's turn"
SPLIT = "conversations of several answers"
APART = "dropped: min_difference"
SCORED = {"ranked", "scored"}  # kinds of which pairs and labels are made by score


def _check_effects(
    options: DataOptions,
    kinds: Collection[str],
    counts: Mapping[str, int],
    items: Sequence[Example],
) -> None:
    """Refuse options that have made nothing of the examples.

    Args:
        options: of the data.
        kinds: of the sources, as they were read.
        counts: what was counted, 0 where it was not.
        items: the examples.

    Raises:
        ValueError: the option, and why.
    """
    given = ", ".join(sorted(kinds))
    effects = {
        "strings": (counts[ASKED], "no prompt is a mere text"),
        "turns": (counts[SPLIT], "no conversation has several answers"),
        "roles": (counts[RENAMED], f"no turn has the role {', '.join(options.roles)}"),
        "threshold": (SCORED & set(kinds), f"labels are made of scores; the data are {given}"),
        "pairing": (
            {*SCORED, "unpaired"} & set(kinds),
            f"pairs are made of several answers; the data are {given}",
        ),
        "min_difference": (
            counts[APART] or any(one.scores for one in items),
            "no pair has the scores of its answers",
        ),
    }
    for name, (effect, why) in effects.items():
        value = getattr(options, name)
        if not effect and value != getattr(DataOptions(), name):
            shown = dict(value) if isinstance(value, Mapping) else value
            raise ValueError(f"config.data.{name} = {shown!r} has no effect: {why}")


def _positive(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


def _of_kind(
    rows: _Rows, kind: str, options: DataOptions, seed: int, counts: collections.Counter[str]
) -> list[Example]:
    """Convert one source's examples to the kind wanted, counting those left out."""
    made = [one for example in rows.examples for one in _reshape(example, options, counts)]
    if kind == "pairs" and rows.kind == kind and options.min_difference:
        before, made = len(made), conversions.keep_apart(made, options.min_difference)
        counts[APART] += before - len(made)
    if kind == "scored" and options.invalid == "drop":
        before, made = len(made), [one for one in made if one.scores or one.label is not None]
        counts["dropped: no score"] += before - len(made)
    counts["rankings with ties"] += sum(
        len(set(one.scores)) < len(one.scores) for one in made if one.scores
    )
    if rows.kind == "pairs":
        counts["pairs whose rejected answer has the higher score"] += sum(
            one.scores[0] < one.scores[1] for one in made if one.scores
        )
    try:
        made = conversions.convert(made, rows.kind, kind, options, seed=seed)
    except ValueError as error:
        raise _unlike(error, rows.where, rows.fields, rows.format, kind) from error
    _count_weights(made, counts)
    counts["answers that begin with their prompt"] += sum(map(_repeats, made))
    counts["conversations with turns after the last answer, left out"] += sum(map(_goes_on, made))
    counts["texts that are nan, None or the like alone"] += sum(map(_is_filler, made))
    if kind == "pairs":
        counts["identical answers"] += sum(one.responses[0] == one.responses[1] for one in made)
    if kind == "ranked" and options.responses:
        made, few = conversions.take_responses(made, options.responses)
        counts["dropped: too few responses"] += few
    if kind == "unpaired":
        shares = options.frac_unique_desirable, options.frac_unique_undesirable
        before, made = len(made), conversions.keep_shares(made, *shares, seed)
        counts["dropped: frac_unique"] += before - len(made)
    if kind == "unpaired" and options.labels == "balanced":
        before, made = len(made), conversions.balance(made, seed)
        counts["dropped: balanced labels"] += before - len(made)
    return made


OUTWEIGHS = 1000  # a weight of so many times the median's is told


def _count_weights(examples: Sequence[Example], counts: collections.Counter[str]) -> None:
    """Count examples that are not learned, and those beside which the others hardly are."""
    weights = np.asarray([one.weight for one in examples])
    learned = weights[weights > 0]
    counts["examples of weight 0"] += len(weights) - len(learned)
    if len(learned):
        heavy = learned > OUTWEIGHS * np.median(learned)
        counts[f"examples of over {OUTWEIGHS:,} times the median weight"] += int(heavy.sum())


FILLERS = {"nan", "<na>", "n/a", "none", "null", "nil", "undefined"}  # what tables write of nothing


def _is_filler(example: Example) -> bool:
    """Tell whether a prompt or a response is what a program writes in the place of a missing
    text; it may be an answer all the same."""
    texts = (example.prompt, *example.responses)
    return any(last_words(one).strip().lower() in FILLERS for one in texts)


def _goes_on(example: Example) -> bool:
    """Tell whether turns follow a response's last answer: there is nothing of them to learn."""
    return any(
        not isinstance(one, str) and one[-1]["role"] != "assistant" for one in example.responses
    )


def _unlike(
    error: ValueError, where: str, fields: Collection[str], format: str, kind: str
) -> ValueError:
    """Return what to say of rows that are not of the kind wanted, with the nearest columns."""
    columns, lacks = (fn(kind, fields) for fn in (formats.columns_for, formats.lacking))
    hint = f"; {lacks}" if lacks else ""
    hint = f"; perhaps --config.data.columns='{json.dumps(columns)}'" if columns else hint
    said = str(error).removeprefix(f"{where}: ")
    return ValueError(
        f"{where}: a row with the fields {fields_of(fields)}, read as format {format!r}: "
        f"{said}{hint}"
    )


def _repeats(example: Example) -> bool:
    """Tell whether an answer begins with the whole prompt, plain text, as a text to go on from
    does: its words would be learned with it."""
    prompt = example.prompt if isinstance(example.prompt, str) else ""
    return len(prompt) > 40 and any(
        isinstance(one, str) and one.startswith(prompt) for one in example.responses
    )


def hold_out(
    examples: Examples, fraction: float, *, most: int, seed: int, folder: str = ""
) -> tuple[Examples, Examples | None]:
    """Divide examples into training and held-out ones, by prompt: no prompt is in both.

    Args:
        examples: all of them.
        fraction: of the examples, held out; 0: none.
        most: at most about so many examples held out; 0: no limit.
        seed: of the choice.
        folder: where the choice is kept (``data.cache``); "" = nowhere.

    Returns:
        (training, held out); the latter None where nothing is held out.

    Raises:
        ValueError: a fraction outside [0, 1), or a single prompt.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"config.data.eval_fraction = {fraction}: expected from 0 to below 1")
    wanted = min(round(fraction * len(examples)), most or len(examples))
    if not wanted:
        return examples, None
    suffix = f"{fraction}-{most}-{seed}"

    def choose_held() -> cache.Kept:
        return cache.Kept({"held": _choose_held(examples, fraction, wanted, seed)}, {})

    held = cache.keep(folder, f"held-{examples.digest}-{suffix}", choose_held).arrays["held"]
    train = _part(examples, ~held, f"train-{suffix}")
    held_out = _part(examples, held, f"held_out-{suffix}")
    return train, dataclasses.replace(held_out, weights=None)


def _choose_held(
    examples: Examples, fraction: float, wanted: int, seed: int
) -> Bool[np.ndarray, "n"]:
    """Choose whole prompts, until there are as many examples as wanted."""
    of_prompt: dict[str, list[int]] = collections.defaultdict(list)
    for index, example in enumerate(examples.items):
        # plain texts have no prompt: each stands for itself
        held_by = example.prompt or example.responses
        of_prompt[json.dumps(held_by, default=str)].append(index)
    if len(of_prompt) < 2:
        raise ValueError(
            f"config.data.eval_fraction = {fraction}: all {len(examples)} examples have the same "
            "prompt, so none can be held out; set it to 0, or name data.eval"
        )
    held, count = np.zeros(len(examples), np.bool_), 0
    for prompt in random.Random(seed).sample(sorted(of_prompt), len(of_prompt) - 1):
        if count >= wanted:
            break
        held[of_prompt[prompt]] = True
        count += len(of_prompt[prompt])
    return held


def _part(examples: Examples, chosen: Bool[np.ndarray, "n"], name: str) -> Examples:
    """Return the chosen examples, still source after source."""
    before = np.concatenate([[0], np.cumsum(chosen)])

    def read() -> list[Example]:
        return [examples[index] for index in np.flatnonzero(chosen).tolist()]

    return dataclasses.replace(
        examples,
        digest=f"{examples.digest}-{name}",
        items=Later(int(before[-1]), read),
        ends=tuple(before[list(examples.ends)].tolist()),
    )


def _check(
    specs: Sequence[str | Source], kind: str, options: DataOptions, weights: Sequence[float] | None
) -> None:
    if kind not in conversions.KINDS:
        raise ValueError(f"kind = {kind!r} is unknown{nearest(kind, conversions.KINDS)}")
    for field in dataclasses.fields(options):
        value, choices = getattr(options, field.name), field.metadata["choices"]
        if choices and value not in choices:
            raise ValueError(
                f"config.data.{field.name} = {value!r} is unknown{nearest(value, choices)}"
            )
    for role, known in options.roles.items():
        if known not in ROLES.values():
            raise ValueError(
                f"config.data.roles[{role!r}] = {known!r} is unknown"
                f"{nearest(known, sorted(set(ROLES.values())))}"
            )
    if not specs:
        raise ValueError("no data source given; set --config.data.train")
    if weights and len(specs) == 1:
        raise ValueError(
            f"config.data.weights = {tuple(weights)} has no effect: the shares are of several "
            f"sources, and {specs[0] if isinstance(specs[0], str) else specs[0].spec} is one"
        )
    if weights and (len(weights) != len(specs) or min(weights) <= 0):
        raise ValueError(
            f"config.data.weights = {tuple(weights)}: expected {len(specs)} positive numbers, one "
            "a source"
        )


class _Found(NamedTuple):
    """A source that is not read yet."""

    spec: str
    source: Source
    dataset: named.PublicDataset | None  # a public one, by name
    format: str
    training: bool  # no split that is held out

    @property
    def name(self) -> str:
        """What the user calls it: of rows from Python, the argument."""
        given = self.spec.startswith("rows:")
        return self.spec[5:].rpartition("@")[0] if given else self.spec

    @property
    def digest(self) -> str:
        return f"{self.spec}={self.source.digest}"


def _find(spec: str | Source, options: DataOptions) -> _Found:
    format = options.format
    if isinstance(spec, Source):
        dataset = named.DATASETS.get(format)
        return _Found(spec.spec, spec, dataset, "auto" if dataset else format, True)
    if format in named.DATASETS:
        spec, format = f"set:{format}:{spec}", "auto"
    if not spec.startswith("set:"):
        return _Found(spec, find_source(spec), None, format, True)
    dataset, location, training = named.resolve(spec)
    return _Found(spec, find_source(location), dataset, format, training)


class _Rows(NamedTuple):
    """What was read of one source."""

    examples: list[Example]
    kind: str
    format: str
    where: str  # of the first row
    fields: Collection[str]
    beside: Collection[str]  # columns of which no example is made


def _read(
    found: _Found,
    options: DataOptions,
    target: str,
    *,
    chat: bool,
    seed: int,
    limit: int | None,
    counts: collections.Counter[str],
) -> _Rows:
    """Read one source, of which ``target`` is wanted, counting the rows left out."""
    spec, source, dataset, format, training = found
    size = len(source) if limit is None else min(limit, len(source))
    rows: Iterable[tuple[str, Callable[[], Row]]] = (
        (source.where(index), functools.partial(_row, source, index, options.columns))
        for index in range(size)
    )
    if dataset is not None and dataset.gather is not None:
        gathered = dataset.gather([row() for _, row in rows])
        rows = (
            (f"{spec}[{index}]", functools.partial(dict, row)) for index, row in enumerate(gathered)
        )
    if format == "auto":
        format = dataset.format if dataset else _detect(source, options.columns, target)
    form = own.row(formats.FORMATS, format, "config.data.format")
    try:
        conversions.check_way(form.kind, target)
    except ValueError as error:  # before a row is refused for what it lacks as this format
        first = _first_rows(source, options.columns)
        named = {name for row in first for name in row}
        empty = named - {name for row in first for name, value in row.items() if value is not None}
        if empty:
            error = ValueError(f"{error}; null in each of the rows: {', '.join(sorted(empty))}")
        raise _unlike(error, source.where(0), named - empty, format, target) from error
    examples: list[Example] = []
    fields: Collection[str] = ()
    for where, get in tqdm.tqdm(rows, desc="reading", total=size, unit="rows", disable=None):
        try:
            row = decoded(get())
            if options.roles:
                row, before = with_roles(row, options.roles), row
                counts[RENAMED] += row != before
            read = formats.read(row, format, chat=chat)
        except RowError as error:
            if options.invalid == "error" and not isinstance(error, TranscriptError):
                place = "" if error.where else f"{where}: "
                raise ValueError(
                    f"{place}{error}; --config.data.invalid=drop leaves such rows out"
                ) from error
            counts[f"dropped: {error.reason}"] += 1
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        else:
            fields = fields or row.keys()
            examples += [dataclasses.replace(example, source=where) for example in read]
    if dataset is not None and dataset.keep is not None:
        before, examples = len(examples), list(dataset.keep(examples, training, seed))
        counts["dropped: the data set's own filter"] += before - len(examples)
    beside = formats.unread(form, {name for one in examples for name in one.extras})
    return _Rows(examples, form.kind, format, source.where(0), fields, beside)


# rows that are looked at together: a field may be null in the first, or in many
DETECT_ROWS, MOST_DETECT_ROWS = 64, 10_000


def _first_rows(source: Source, columns: Mapping[str, str]) -> list[Row]:
    """Return the first rows that can be read, until each field that they have is filled in one."""
    rows: list[Row] = []
    seen: set[str] = set()
    filled: set[str] = set()
    for index in range(min(len(source), MOST_DETECT_ROWS)):
        if index >= DETECT_ROWS and rows and seen == filled:
            break
        with contextlib.suppress(RowError):
            row = _row(source, index, columns)
            rows.append(row)
            seen |= row.keys()
            filled |= {name for name, value in row.items() if value is not None}
    return rows


def _detect(source: Source, columns: Mapping[str, str], kind: str) -> str:
    rows = _first_rows(source, columns)
    if not rows:
        _row(source, 0, columns)
    try:
        return formats.detect(rows, kind)
    except ValueError as error:
        guess = formats.columns_for(kind, {name for row in rows for name in row})
        hint = f"; perhaps --config.data.columns='{json.dumps(guess)}'" if guess else ""
        raise ValueError(f"{source.where(0)}: {error}{hint}") from error


def _row(source: Source, index: int, columns: Mapping[str, str]) -> Row:
    return _rename(source[index], columns, source.where(index))


def _reshape(
    example: Example, options: DataOptions, counts: collections.Counter[str]
) -> list[Example]:
    """Make what ``strings`` and ``turns`` ask for of an example as it was read."""
    prompt, responses = example.prompt, example.responses
    if options.strings == "messages" and isinstance(prompt, str) and prompt:
        prompt = ({"role": "user", "content": prompt},)
        counts[ASKED] += 1
    example = dataclasses.replace(example, prompt=prompt)
    response = responses[0] if len(responses) == 1 else ""
    if options.turns == "all" or isinstance(prompt, str) or isinstance(response, str):
        return [example]
    conversation = [*prompt, *response]
    answers = [
        place
        for place in range(len(prompt), len(conversation))
        if conversation[place]["role"] == "assistant" and conversation[place].get("loss", True)
    ]
    if not answers:
        return [example]  # nothing to learn: dropped, and counted, when it is tokenized
    counts[SPLIT] += len(answers) > 1
    # the turns before an answer become its context; what follows it is left out
    return [
        dataclasses.replace(
            example, prompt=tuple(conversation[:place]), responses=(answer_of(conversation[place]),)
        )
        for place in (answers[-1:] if options.turns == "last" else answers)
    ]


def _rename(row: Row, columns: Mapping[str, str], where: str) -> Row:
    if not columns:
        return row
    missing = sorted(set(columns.values()) - set(row))
    if missing:
        raise ValueError(
            f"{where}: config.data.columns names the columns {missing}; the row has "
            f"{fields_of(row)}"
        )
    # a column that is renamed, and one whose name the format would take for another's, go
    gone = {*columns, *columns.values()}
    renamed = {field: row[column] for field, column in columns.items()}
    return {**{key: value for key, value in row.items() if key not in gone}, **renamed}
