# SPDX-License-Identifier: Apache-2.0
"""What a run will train on, to be looked at before it trains: made by what ``train`` reads,
tokenizes and packs with.

    Run ─ inspect_run ─► Inspection ─┬─ str, text(color=True)   a terminal
                                     ├─ _repr_html_             a notebook
                                     └─ to_dict                 --json
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from align_jax.core.progress import printable
from align_jax.core.schema import Batch, Example
from align_jax.data.pipeline import Pipeline
from align_jax.online.rollout import Rollouts
from align_jax.runs.setup import Run

# What a token is to the model -> its color on a terminal, and in a notebook.
COLORS: Mapping[str, tuple[str, str]] = {
    "prompt": ("36", "#0e7490"),
    "in the loss": ("32", "#15803d"),
    "response, not in the loss": ("33", "#b45309"),
    "special": ("35", "#a21caf"),
    "special, in the loss": ("1;4;35", "#a21caf;font-weight:bold;text-decoration:underline"),
}


class Piece(NamedTuple):
    """Neighboring tokens of one kind, a key of ``COLORS``."""

    text: str
    kind: str


class Part(NamedTuple):
    """A prompt or a response.

    Attributes:
        name: prompt, chosen, rejected, ...
        pieces: its tokens as text.
        tokens: how many there are.
        learned: of them in the loss.
        cut: how many truncation took away.
    """

    name: str
    pieces: tuple[Piece, ...]
    tokens: int
    learned: int
    cut: int

    @property
    def head(self) -> str:
        """What is said of it above its text."""
        loss = "" if self.name == "prompt" else f", {self.learned} in the loss"
        cut = f", {self.cut} cut off" if self.cut else ""
        return f"{self.name} ({self.tokens} tokens{loss}{cut})"


class Shown(NamedTuple):
    """An example as the model will see it: where it is from, what is known of it, its parts."""

    source: str
    facts: str
    parts: tuple[Part, ...]


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a run will train on.

    Attributes:
        about: lines on the config, the parameters, the checkpoints.
        data: counts of what was read, dropped and truncated, and how full the rows are.
        held_out: the same of the held-out data.
        lengths: of what -> least, median, mean, 95th percentile, greatest, in tokens.
        batch: field -> type and shape, of the whole mesh.
        rows: of the shown batch: how many tokens and groups each row holds.
        examples: the first of that batch.
    """

    about: tuple[str, ...]
    data: Mapping[str, Any]
    held_out: Mapping[str, Any]
    lengths: Mapping[str, Mapping[str, float]]
    batch: Mapping[str, str]
    rows: Mapping[str, float]
    examples: tuple[Shown, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        found = dataclasses.asdict(self)
        found["examples"] = [
            {
                "source": one.source,
                "facts": one.facts,
                "parts": [
                    {**part._asdict(), "pieces": [piece._asdict() for piece in part.pieces]}
                    for part in one.parts
                ],
            }
            for one in self.examples
        ]
        return found

    def __str__(self) -> str:
        return self.text(color=False)

    def text(self, *, color: bool) -> str:
        """Lay it out for a terminal; without colors, what is not learned of a response stands in
        ⟦ ⟧."""

        def paint(kind: str, text: str) -> str:
            if color:
                return f"\x1b[{COLORS[kind][0]}m{text}\x1b[0m" if text else ""
            return f"⟦{text}⟧" if kind == "response, not in the loss" else text

        legend = [paint(kind, kind) for kind in COLORS] if color else []
        lines = [
            *map(printable, self._lines()),
            *([f"colors: {', '.join(legend)}"] if color else []),
        ]
        for one in self.examples:
            lines += ["", f"── {printable(one.source + one.facts)}"]
            for part in one.parts:
                lines.append(f"   {part.head}")
                pieces = ((piece.kind, printable(piece.text)) for piece in part.pieces)
                lines.append("".join(itertools.starmap(paint, pieces)))
        return "\n".join(lines)

    def _lines(self) -> Iterator[str]:
        yield from self.about
        for name, report in (("data", self.data), ("held out", self.held_out)):
            if report:
                words = (
                    f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                    for key, value in report.items()
                )
                yield f"{name}: {', '.join(words)}"
        for name, values in self.lengths.items():
            words = (f"{key} {value:.4g}" for key, value in values.items())
            yield f"tokens in {name}: {', '.join(words)}"
        if self.rows:
            yield "rows: " + ", ".join(f"{key} {value:.4g}" for key, value in self.rows.items())
        shapes = (f"{name} {shape}" for name, shape in self.batch.items())
        text = f"a step's batch: {', '.join(shapes)}"
        yield from textwrap.wrap(text, 100, subsequent_indent="  ", break_long_words=False)

    def _repr_html_(self) -> str:
        """Return it for a notebook."""
        box = "white-space:pre-wrap;overflow-wrap:anywhere;margin:.2em 0 .8em;font-size:90%"
        page = [f"<pre style='{box}'>{_shown(chr(10).join(self._lines()))}</pre><p>"]
        page += [
            f"<span style='color:{color}'>{kind}</span> " for kind, (_, color) in COLORS.items()
        ]
        page.append("</p>")
        for one in self.examples:
            page.append(f"<p><b>{_shown(one.source)}</b>{_shown(one.facts)}</p>")
            for part in one.parts:
                pieces = (
                    f"<span style='color:{COLORS[kind][1]}'>{_shown(text)}</span>"
                    for text, kind in part.pieces
                )
                page.append(f"<small>{part.head}</small><pre style='{box}'>{''.join(pieces)}</pre>")
        return "".join(page)


def _shown(text: str) -> str:
    """Return a text for a notebook's page."""
    return html.escape(printable(text))


def inspect_run(run: Run, about: Sequence[str], *, examples: int = 3, step: int = 1) -> Inspection:
    """Look at what a run will train on.

    Args:
        run: from ``prepare``.
        about: lines that go before.
        examples: how many to show.
        step: of the batch whose examples are shown; 1 = the first.

    Raises:
        ValueError: another step than the first of an online run, whose later prompts depend on how
            its samples turn out.
    """
    tokenizer = run.resolved.tokenizer
    shapes = dict(_shapes(run.train.abstract()))
    held = {} if run.held_out is None else {"examples": len(run.held_out)}
    if run.eval is not None:
        held |= run.eval.report
    data = {**run.examples.report, **run.train.report}
    lengths = _lengths(run.train)
    if isinstance(run.train, Pipeline):
        batch = run.train.batch(step - 1)
        shown = _of_pipeline(run.train, run.examples.items, batch, tokenizer)
        rows = _rows(batch)
    elif step != 1:
        raise ValueError(
            f"--step={step}: this run is online: its later prompts depend on its samples; only "
            "those of step 1 are known"
        )
    else:
        shown, rows = _of_prompts(run.train, tokenizer), {}
    found = list(itertools.islice(shown, examples))
    if isinstance(run.train, Rollouts) and run.train.text is not None:
        more = _text_of(run.train.text, tokenizer)
        found += list(itertools.islice(more, examples))
    return Inspection(tuple(about), data, held, lengths, shapes, rows, tuple(found))


def _shapes(batch: Batch, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield each field of a batch with its type and shape."""
    for name, value in batch._asdict().items():
        if isinstance(value, Batch):
            yield from _shapes(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, f"{value.dtype}{list(value.shape)}".replace(" ", "")


def _lengths(source: Pipeline | Rollouts) -> dict[str, dict[str, float]]:
    lengths = source.lengths() if isinstance(source, Pipeline) else source.prompts.lengths()
    return {
        name: {
            "least": float(sizes.min()),
            "median": float(np.median(sizes)),
            "mean": float(sizes.mean()),
            "95 %": float(np.percentile(sizes, 95)),
            "greatest": float(sizes.max()),
        }
        for name, sizes in lengths.items()
    }


def _rows(batch: Batch) -> dict[str, float]:
    """Say how full a batch's rows are."""
    used = (batch.segment_ids != 0).sum(axis=1)
    real = (batch.weight != 0).reshape(len(used), -1) if len(used) < len(batch.weight) else None
    groups = float((batch.weight != 0).sum())
    found = {
        "rows": float(len(used)),
        "tokens": float(used.sum()),
        "filled": float(used.sum() / batch.tokens.size),
        "emptiest": float(used.min() / batch.tokens.shape[1]),
        "groups": groups,
    }
    if real is not None:
        found |= {"most groups in a row": float(real.sum(axis=1).max())}
    return found


def _of_pipeline(
    source: Pipeline, items: Sequence[Any], batch: Batch, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Shown]:
    """Yield a batch's examples."""
    assert batch.example_index is not None  # a pipeline fills it
    for number in batch.example_index.tolist():
        if number < 0:
            continue
        example, left, whole = items[number], source.group(number), source.whole(number)
        parts = [_prompt(left.prompt, len(whole.prompt), tokenizer)]
        names = response_names(example, source.kind)
        for name, (ids, mask), (before, _) in zip(names, left.responses, whole.responses):
            kinds = ["in the loss" if one else "response, not in the loss" for one in mask]
            pieces = _pieces(ids, kinds, tokenizer)
            cut = len(before) - len(ids)
            parts.append(Part(name, pieces, len(ids), int(mask.sum()), cut))
        yield Shown(example.source, _facts(example), tuple(parts))


def _text_of(source: Pipeline, tokenizer: PreTrainedTokenizerBase) -> Iterator[Shown]:
    """Yield examples of the text beside rollouts, whose sources only the pipeline knows."""
    batch = source.batch(0)
    assert batch.example_index is not None  # a pipeline fills it
    blank = Example((), ("",), source="data.text")
    items = [blank] * (1 + int(batch.example_index.max()))
    yield from _of_pipeline(source, items, batch, tokenizer)


def _of_prompts(source: Rollouts, tokenizer: PreTrainedTokenizerBase) -> Iterator[Shown]:
    """Yield the prompts that the first rollout begins with."""
    for position in range(len(source.prompts)):
        example, ids = source.prompts[position]
        beside = f"; for rewards: {', '.join(example.extras)}" if example.extras else ""
        yield Shown(example.source, beside, (_prompt(ids, len(ids), tokenizer),))


def _prompt(ids: Int[np.ndarray, "_"], whole: int, tokenizer: PreTrainedTokenizerBase) -> Part:
    pieces = _pieces(ids, ["prompt"] * len(ids), tokenizer)
    return Part("prompt", pieces, len(ids), 0, whole - len(ids))


def response_names(example: Example, kind: str) -> list[str]:
    """Return what an example's responses are called."""
    count = len(example.responses)
    if kind == "pairs":
        return ["chosen", "rejected"]
    if kind == "unpaired":
        return ["desirable response" if example.label else "undesirable response"]
    return ["response"] if count == 1 else [f"response {number + 1}" for number in range(count)]


def _facts(example: Example) -> str:
    """Say what is known of an example beside its texts."""
    found = []
    if example.scores is not None:
        found.append(f"scores {', '.join(f'{score:.4g}' for score in example.scores)}")
    if example.margin:
        found.append(f"margin {example.margin:.4g}")
    if example.weight != 1:
        found.append(f"weight {example.weight:.4g}")
    if example.steps is not None:
        labels = (("?" if label is None else f"{label:.3g}") for _, label in example.steps)
        found.append(f"steps {' '.join(labels)}")
    return "".join(f"; {fact}" for fact in found)


def _pieces(
    ids: Int[np.ndarray, "n"], kinds: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[Piece, ...]:
    """Write tokens as text, neighbors of one kind together: a character may take several."""
    special = _specials(tokenizer)

    def kind_of(one: tuple[int, str]) -> str:
        token, kind = one
        if token not in special:
            return kind
        return "special, in the loss" if kind == "in the loss" else "special"

    runs = itertools.groupby(zip(ids.tolist(), kinds), kind_of)
    decode: Callable[..., Any] = tokenizer.decode
    return tuple(
        Piece(str(decode([token for token, _ in run], skip_special_tokens=False)), kind)
        for kind, run in runs
    )


def _specials(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}
