# SPDX-License-Identifier: Apache-2.0
"""From examples to the batches of each step, on each process.

At the start the whole data set is tokenized, truncated and packed into units (a group, or a packed
row of groups). A step's batch is then a pure function of (seed, step): Grain shuffles the units
anew each epoch, step k takes units k * U to (k + 1) * U of the endless stream, and process p of n
writes the p-th share of them.  The data position in a checkpoint is thus the step number, whatever
the number of processes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from transformers import PreTrainedTokenizerBase

from align_jax.core.schema import Batch
from align_jax.data import batching, planning
from align_jax.data.batching import Cut, Piece, Shape
from align_jax.data.datasets import Examples
from align_jax.data.encoding import Encoded, encode_all
from align_jax.data.planning import FILLER, Limits
from align_jax.data.tokenizer import pad_id

# without end: Grain's own endless length overflows when it is cut into batches of one
_EPOCHS = 10**9
_EMPTY = Piece(np.zeros(0, np.int32), ())


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Batches by step; made by ``make_pipeline``.

    Attributes:
        kind: the examples' kind.
        layout: ``plain``, ``packed`` or ``shared_prefix``.
        shape: a batch's sizes on the whole mesh.
        num_examples: groups left after truncation.
        steps_per_epoch: steps after which every example has been seen once (rounded down if
            repeating, else up).
        report: counts of truncations and drops by reason, and the shares of padding and of filler
            groups.
    """

    kind: str
    layout: str
    shape: Shape
    num_examples: int
    steps_per_epoch: int
    report: Mapping[str, Any]
    _encoded: Encoded
    _cuts: Sequence[Cut | None]
    _units: np.ndarray  # [units, groups in a unit] group numbers, FILLER where there is none
    _stream: grain.MapDataset
    _limits: Limits
    _pad: int
    _process: tuple[int, int]
    _mismatched: Shape | None
    _repeat: bool
    _threads: int
    _prefetch: int

    def batch(self, step: int) -> Batch:
        """Return this process's rows of a step's batch.

        Raises:
            IndexError: the step is after the end, and the data does not repeat.
        """
        if step >= len(self._stream):
            raise IndexError(f"step {step}: the data ends after {len(self._stream)} steps")
        return self._collate(self._stream[step])

    def iterator(self, start_step: int = 0) -> Iterator[Batch]:
        """Yield this process's batches from ``start_step`` on, prepared ahead by threads.

        Endless if the data repeats.
        """
        options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=self._prefetch)
        return iter(self._stream[start_step:].map(self._collate).to_iter_dataset(options))

    def examples_of(self, step: int) -> list[int]:
        """Return the numbers of the examples in a step's batch, on all processes together (fillers
        left out)."""
        groups = self._groups(self._stream[step]).reshape(-1)
        return [int(group) for group in groups if group != FILLER]

    def abstract(self) -> Batch:
        """Return the whole mesh's batch as arrays of the right shape and dtype that take no
        memory."""
        return planning.batch_shapes(
            self.shape, kind=self.kind, layout=self.layout, mismatched=self._mismatched
        )

    def _groups(self, units: np.ndarray) -> np.ndarray:
        wanted = _units_in_step(self.shape, self.layout)
        units = np.concatenate([units, np.full(wanted - len(units), FILLER)]).astype(np.int64)
        return np.where((units == FILLER)[:, None], FILLER, self._units[units])

    def _collate(self, units: np.ndarray) -> Batch:
        whole = self._groups(units)
        index, count = self._process
        share = len(whole) // count
        mine = whole[index * share : (index + 1) * share]
        responses = self.shape.responses
        rows = batching.Rows(
            self.shape.rows // count,
            self.shape.length,
            self.shape.positions,
            self.shape.slots,
            self._pad,
            shared=self.layout == "shared_prefix",
        )
        for number, unit in enumerate(mine.tolist()):
            pieces = [
                _EMPTY
                if group == FILLER
                else batching.piece_of(self._encoded, group, self._cuts[group])
                for group in unit
            ]
            if self.layout == "plain":
                for offset, response in enumerate(pieces[0].responses):
                    rows.write(
                        number * responses + offset, [Piece(pieces[0].prompt, (response,))], 1
                    )
            else:
                rows.write(number, pieces, responses)
        extra = (
            None if self._mismatched is None else self._mismatch(whole.reshape(-1), index, count)
        )
        return self._to_batch(rows, mine.reshape(-1), extra)

    def _to_batch(self, rows: batching.Rows, groups: np.ndarray, extra: Batch | None) -> Batch:
        real = groups != FILLER
        pick = np.where(real, groups, 0)
        table = self._encoded
        fields: dict[str, Any] = {"example_index": np.where(real, groups, FILLER).astype(np.int32)}
        if self.kind == "unpaired":
            fields["label"] = table.label[pick] & real
        else:
            fields["margin"] = np.where(real, table.margin[pick], 0.0).astype(np.float32)
        scores = table.scores[pick]
        if self.kind == "ranked":  # best first, without ties, where the data has ranks alone
            ranks = np.arange(self.shape.responses)[None, ::-1]
            scores = np.where(np.isnan(scores).all(axis=1, keepdims=True), ranks, scores)
        fields["scores"] = np.where(real[:, None], np.nan_to_num(scores), 0.0).astype(np.float32)
        return batching.to_batch(
            rows,
            self.shape.responses,
            mismatched=extra,
            weight=np.where(real, table.weight[pick], 0.0).astype(np.float32),
            **fields,
        )

    def _mismatch(self, groups: np.ndarray, index: int, count: int) -> Batch:
        """Pair prompt i with the response of the next example of the global batch that has another
        prompt."""
        shape, table = self._mismatched, self._encoded
        share = len(groups) // count
        rows = batching.Rows(share, shape.length, shape.positions, 1, self._pad, shared=False)
        weight = np.zeros(share, np.float32)
        real = groups[groups != FILLER]
        place = np.cumsum(groups != FILLER) - 1
        if not self._repeat and len(np.unique(table.prompt_key[real])) == 1:
            # evaluation takes batches as they fall, down to a single example: the data's next other
            # prompt helps out
            used = self._units[self._units != FILLER]
            real = np.append(real, used[table.prompt_key[used] != table.prompt_key[real[0]]][:1])
        partners = next_other(table.prompt_key[real])
        for row, at in enumerate(range(index * share, (index + 1) * share)):
            if groups[at] == FILLER:
                continue
            prompt_of, response_of = int(groups[at]), int(real[partners[place[at]]])
            ids, mask = table.response(response_of, 0)
            cut = self._limits.cut(table, prompt_of, (len(ids),))
            if cut.reason:
                raise ValueError(
                    f"the prompt of example {prompt_of} with the response of "
                    f"example {response_of} does "
                    f"not fit {self._limits.max_length} tokens: {cut.reason}"
                )
            length = cut.lengths[0]
            prompt = batching.cut_prompt(table.prompt(prompt_of), cut)
            rows.write(row, [Piece(prompt, ((ids[:length], mask[:length]),))], 1)
            weight[row] = 1.0
        return batching.to_batch(rows, 1, weight=weight)


def next_other(keys: np.ndarray) -> np.ndarray:
    """Return, for each place, the next place (cyclically) whose key differs.

    Raises:
        ValueError: all keys are equal.

    >>> next_other(np.array([7, 7, 8])).tolist()
    [2, 2, 0]
    """
    size = len(keys)
    partners = np.full(size, -1)
    for place in range(size):
        for step in range(1, size):
            if keys[(place + step) % size] != keys[place]:
                partners[place] = (place + step) % size
                break
        else:
            raise ValueError(
                "mismatched completions need two different prompts in a batch; "
                f"this batch of {size} "
                "has one: use a larger batch_size, or data with more prompts"
            )
    return partners


def make_pipeline(
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    max_length: int,
    layout: str = "plain",
    row_length: int | None = None,
    groups_per_row: float | int | None = None,
    truncation: str = "keep_end",
    max_prompt_length: int | None = None,
    trim: bool = False,
    seed: int = 0,
    shuffle: bool = True,
    repeat: bool = True,
    mismatched: bool = False,
    control: Sequence[str] | None = None,
    row_multiple: int = 1,
    process_index: int = 0,
    process_count: int = 1,
    cache_dir: str | None = None,
    threads: int = 2,
    prefetch: int = 4,
) -> Pipeline:
    """Tokenize, truncate and pack the examples, and plan every batch.

    Args:
        examples: the examples; their kind decides R and the batch's fields.
        tokenizer: the tokenizer.
        batch_size: groups in a step on the whole mesh: exactly in plain rows, on average in packed
            ones.
        max_length: tokens of prompt and response together.
        layout, row_length, groups_per_row, row_multiple: see ``planning.plan_shape``;
            ``groups_per_row`` is chosen from the data where None.
        truncation, max_prompt_length: see ``batching.truncate``.
        trim: shorten plain rows to the longest example, rounded up to a multiple of 8.
        seed: of the order of examples.
        shuffle: a new order each epoch; else the data's own.
        repeat: epoch after epoch without end; else one pass, the last batch filled up with groups
            of weight 0.
        mismatched: add mismatched completions (KTO; R must be 1).
        control: see ``encoding.encode_all``.
        process_index, process_count: this process and how many there are.
        cache_dir: where tokenized data is kept between runs; None keeps nothing.
        threads: threads that prepare batches.
        prefetch: batches prepared ahead.

    Returns:
        The pipeline.

    Raises:
        ValueError: sizes that do not fit or divide, no examples left, or mismatched completions
            with R > 1 or with one prompt only.
    """
    responses = _check(examples, mismatched, repeat)
    encoded = encode_all(
        examples.items,
        tokenizer,
        responses=responses,
        control=control,
        cache_dir=cache_dir,
        digest=examples.digest,
    )
    limits = Limits(max_length, truncation, max_prompt_length, tokenizer.bos_token_id)
    cuts = planning.cut_all(encoded, limits)
    shape, units, bounds = _lay_out(
        examples,
        cuts,
        responses,
        layout,
        batch_size,
        max_length,
        row_length,
        groups_per_row,
        trim,
        math.lcm(row_multiple, process_count),
    )
    if repeat and layout != "plain":
        _check_packing(shape, units, batch_size, math.lcm(row_multiple, process_count))
    extra = None
    if mismatched:
        used = units[units != FILLER]
        # a response that its own long prompt has cut short may be whole after another prompt
        longest = max(
            int(encoded.response(group, 0)[1][:max_length].sum()) for group in used.tolist()
        )
        extra = planning.mismatched_shape(
            shape, _mismatched_length(encoded, used, max_length, trim), longest
        )
    wanted = _units_in_step(shape, layout)
    stream = _stream(units, bounds, examples.weights, seed if shuffle else None, repeat).batch(
        wanted
    )
    return Pipeline(
        kind=examples.kind,
        layout=layout,
        shape=shape,
        num_examples=int((units != FILLER).sum()),
        steps_per_epoch=max(1, len(units) // wanted) if repeat else -(-len(units) // wanted),
        report={**examples.report, **cuts.report, **_fill(cuts, layout, units, shape)},
        _encoded=encoded,
        _cuts=cuts.cuts,
        _units=units,
        _stream=stream,
        _limits=limits,
        _pad=pad_id(tokenizer),
        _process=(process_index, process_count),
        _threads=threads,
        _prefetch=prefetch,
        _mismatched=extra,
        _repeat=repeat,
    )


def _lay_out(
    examples: Examples,
    cuts: planning.Cuts,
    responses: int,
    layout: str,
    batch_size: int,
    max_length: int,
    row_length: int | None,
    groups_per_row: float | int | None,
    trim: bool,
    multiple: int,
) -> tuple[Shape, np.ndarray, list[int]]:
    """Decide what shares a row, and every static size: the shape, the units, and where each
    source's units end."""
    lengths = np.asarray(
        [
            0 if cut is None else batching.group_length(cut.head + cut.tail, cut.lengths, layout)
            for cut in cuts.cuts
        ]
    )
    if layout == "plain":
        units, bounds = _units_by_source(examples, cuts, lengths, max_length, 1)
        length = min(max_length, -(-int(lengths.max()) // 8) * 8) if trim else max_length
        shape = planning.plan_shape(
            responses=responses,
            batch_size=batch_size,
            layout=layout,
            max_length=length,
            row_multiple=multiple,
        )
    else:
        length = responses * max_length if row_length is None else row_length
        groups_per_row = groups_per_row or planning.mean_groups_per_row(
            lengths[lengths > 0].tolist(), length
        )
        shape = planning.plan_shape(
            responses=responses,
            batch_size=batch_size,
            layout=layout,
            max_length=max_length,
            row_length=length,
            groups_per_row=groups_per_row,
            row_multiple=multiple,
        )
        units, bounds = _units_by_source(examples, cuts, lengths, length, shape.slots // responses)
    positions = min(planning.round_up(_budget(layout, cuts.loss, units)), length)
    return dataclasses.replace(shape, positions=positions), units, bounds


def _check(examples: Examples, mismatched: bool, repeat: bool) -> int:
    """Return R, or raise where the examples do not go with the rest."""
    if not len(examples):
        raise ValueError("no examples")
    responses = len(examples[0].responses)
    if not responses:
        raise ValueError(
            f"{examples[0].source}: prompts without responses: they are for "
            "rollouts, not for batches"
        )
    if mismatched and responses != 1:
        raise ValueError(
            f"mismatched completions need one response a prompt, these examples have {responses}"
        )
    if examples.weights is not None and not repeat:
        raise ValueError("weights mix endless sources: they go with repeat=True only")
    return responses


def _check_packing(shape: Shape, units: np.ndarray, batch_size: int, multiple: int) -> None:
    mean = float((units != FILLER).sum(-1).mean())
    if not 0.5 <= shape.rows * mean / batch_size <= 1.5 and len(units) > shape.rows:
        raise ValueError(
            f"batch_size {batch_size} would become {shape.rows} rows of {mean:.3g} "
            "groups, "
            f"{shape.rows * mean:.3g} in a step: rows come in multiples of "
            f"{multiple} (devices over rows "
            f"times microbatches); change row_length"
            f", or batch_size to a multiple of {round(multiple * mean)}"
        )


def _mismatched_length(encoded: Encoded, used: np.ndarray, max_length: int, trim: bool) -> int:
    """Return T of the mismatched completions' rows: any prompt may meet any response."""
    if len(np.unique(encoded.prompt_key[used])) < 2:
        raise ValueError(
            "mismatched completions need two different prompts; all examples have the same one"
        )
    if not trim:
        return max_length
    prompts = np.diff(encoded.prompt_ends)[used].max()
    responses = np.diff(encoded.response_ends)[used].max()
    return min(max_length, -(-int(prompts + responses) // 8) * 8)


def _units_by_source(
    examples: Examples, cuts: planning.Cuts, lengths: np.ndarray, row_length: int, each: int
) -> tuple[np.ndarray, list[int]]:
    """Pack each source's groups by themselves, so that sources can be mixed by weight.

    Raises:
        ValueError: a group longer than a row, or a weighted source of which nothing is left.
    """
    made, bounds, start = [], [0], 0
    if lengths.max() > row_length:
        raise ValueError(
            f"row_length {row_length} is shorter than the longest group, "
            f"{lengths.max()} tokens: raise "
            "it, or lower max_length"
        )
    for number, end in enumerate(examples.ends):
        groups = [group for group in range(start, end) if cuts.cuts[group] is not None]
        if groups:
            loss = cuts.loss[groups].sum(-1).tolist()
            made.append(
                planning.make_units(lengths[groups].tolist(), loss, groups, row_length, each)
            )
        elif examples.weights is not None:
            raise ValueError(
                f"data source {number + 1} of {len(examples.ends)} has a weight, "
                "but no examples are left "
                f"of it: {cuts.report}"
            )
        bounds.append(sum(map(len, made)))
        start = end
    return np.concatenate(made), bounds


def _budget(layout: str, loss: np.ndarray, units: np.ndarray) -> int:
    """Return the most loss tokens in any row."""
    if layout == "plain":
        return int(loss[units].max())
    return int(np.where((units == FILLER)[..., None], 0, loss[units]).sum((1, 2)).max())


def _stream(
    units: np.ndarray,
    bounds: Sequence[int],
    weights: Sequence[float] | None,
    seed: int | None,
    repeat: bool,
) -> grain.MapDataset:
    spans = list(zip(bounds, bounds[1:])) if weights is not None else [(0, len(units))]
    parts = []
    for number, (start, end) in enumerate(spans):
        part = grain.MapDataset.range(start, end)
        if seed is not None:
            part = part.shuffle(
                seed=int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
            )
        parts.append(part.repeat(_EPOCHS) if repeat else part)
    if weights is None:
        return parts[0]
    # weights speak of groups, the stream of units: a source of short examples has more groups in a
    # unit
    groups = [float((units[start:end] != FILLER).sum(-1).mean()) for start, end in spans]
    return grain.MapDataset.mix(
        parts, weights=[weight / mean for weight, mean in zip(weights, groups)]
    )


def _units_in_step(shape: Shape, layout: str) -> int:
    return shape.groups if layout == "plain" else shape.rows


def _fill(
    cuts: planning.Cuts, layout: str, units: np.ndarray, shape: Shape
) -> dict[str, int | float]:
    """Report how full rows and groups are, on average over an epoch."""
    used = [cuts.cuts[group] for group in units[units != FILLER]]
    copies = shape.responses if layout != "shared_prefix" else 1
    tokens = sum((cut.head + cut.tail) * copies + sum(cut.lengths) for cut in used)
    rows = len(units) * (shape.responses if layout == "plain" else 1)
    return {
        "tokens": tokens,
        "padding_fraction": round(1 - tokens / (rows * shape.length), 4),
        "groups_per_step": round(len(used) / len(units) * _units_in_step(shape, layout), 2),
    }
