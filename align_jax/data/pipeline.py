# SPDX-License-Identifier: Apache-2.0
"""From examples to the batches of each step, on each process.

At the start the whole data set is tokenized, truncated and packed into bins (the groups of a packed
row; in plain rows a single group). A step's batch is then a pure function of (seed, step): Grain
shuffles the bins anew each epoch, step k takes bins k * U to (k + 1) * U of the endless stream, and
process p of n writes the p-th share of them.  The data position in a checkpoint is thus the step
number, whatever the number of processes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from align_jax.core.choose import choose
from align_jax.core.options import DataOptions
from align_jax.core.schema import Batch
from align_jax.data import layout, packing, row_length, truncation
from align_jax.data import mismatched as mismatches
from align_jax.data.datasets import Examples
from align_jax.data.encoding import Encoded, encode_all
from align_jax.data.layout import LAYOUTS, BatchShape, BatchSizes, TokenizedGroup
from align_jax.data.packing import FILLER
from align_jax.data.row_length import Rows
from align_jax.data.tokenizer import pad_id
from align_jax.data.truncation import Limits, Truncations

# Grain's own endless repetition overflows when it is cut into batches of one.
_ENDLESS_EPOCHS = 10**9
_THREADS = 2  # that prepare batches
_NEARLY = 1.05  # a cost beside the least, that is paid for shorter rows
_SAMPLE = 4096  # groups whose packing tells how many a row holds


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Batches by step; made by ``make_pipeline``.

    Attributes:
        kind: the examples' kind.
        layout: a key of ``LAYOUTS``.
        shape: a batch's sizes on the whole mesh.
        report: counts of truncations and drops by reason, and how full rows and steps are.
    """

    kind: str
    layout: str
    shape: BatchShape
    report: Mapping[str, Any]
    _encoded: Encoded
    _truncations: Truncations
    _limits: Limits
    _bins: Int[np.ndarray, "bins slots"]  # group numbers, FILLER where there is none
    _stream: grain.MapDataset  # step -> numbers of its bins
    _mismatched: BatchShape | None
    _partners: Mapping[int, int]  # group -> the one whose response its prompt gets
    _pad: int
    _process: tuple[int, int]  # this process, and how many there are
    _once: bool
    _prefetch: int

    @property
    def num_examples(self) -> int:
        """Groups left after truncation."""
        return int((self._bins != FILLER).sum())

    @property
    def steps_per_epoch(self) -> int:
        """Steps that see every example once: rounded down where the data is endless, else up."""
        if self._once:
            return len(self._stream)
        return max(1, len(self._bins) // self.shape.bins)

    def batch(self, step: int) -> Batch:
        """Return this process's rows of a step's batch.

        Raises:
            IndexError: the step is after the end of data that is passed over once.
        """
        if step >= len(self._stream):
            raise IndexError(f"step {step}: the data ends after {len(self._stream)} steps")
        return self._collate(self._stream[step])

    def iterator(self, start_step: int = 0) -> Iterator[Batch]:
        """Yield this process's batches from ``start_step`` on, prepared ahead by threads."""
        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=self._prefetch)
        return iter(self._stream[start_step:].map(self._collate).to_iter_dataset(options))

    def abstract(self) -> Batch:
        """Return the whole mesh's batch as arrays of the right shape and dtype that take no
        memory."""
        return layout.abstract_batch(
            self.shape, self.layout, self.kind, mismatched=self._mismatched
        )

    def _collate(self, numbers: Int[np.ndarray, "_"]) -> Batch:
        """Write this process's share of a step's bins."""
        # the last step of a single pass may have too few: fillers make up for them
        bins = np.full((self.shape.bins, self._bins.shape[1]), FILLER)
        bins[: len(numbers)] = self._bins[numbers]
        index, count = self._process
        mine = np.split(bins, count)[index]
        written = [
            [self.group(group) for group in groups if group != FILLER] for groups in mine.tolist()
        ]
        extra = None
        if self._mismatched is not None:
            extra = self._mismatched_batch(mine, self._mismatched)
        batch = layout.make_batch(
            written,
            self.shape,
            self.layout,
            pad=self._pad,
            mismatched=extra,
            **self._group_fields(mine.reshape(-1)),
        )
        return self._with_step_labels(batch, mine) if self.kind == "stepwise" else batch

    def _with_step_labels(self, batch: Batch, groups: Int[np.ndarray, "rows slots"]) -> Batch:
        """Lay the labels of steps over the rows' loss tokens, which are the steps' ends."""
        labels, encoded = np.zeros(batch.tokens.shape, np.float32), self._encoded
        for (row, slot), group in np.ndenumerate(groups):  # R = 1: a group is a slot
            if group != FILLER:
                own = encoded.step_labels[encoded.step_ends[group] : encoded.step_ends[group + 1]]
                at = np.flatnonzero(batch.loss_mask[row] & (batch.slot[row] == slot))
                labels[row, at] = own[: len(at)]  # of a response that was cut, the first ones
        return batch._replace(step_labels=labels)

    def group(self, number: int) -> TokenizedGroup:
        """Return a group (of ``Batch.example_index``) as its rows hold it: truncated."""
        return self._truncations.group(number).group(self._encoded.group(number))

    def whole(self, number: int) -> TokenizedGroup:
        """Return a group before it was truncated."""
        return self._encoded.group(number)

    def lengths(self) -> dict[str, Int[np.ndarray, "_"]]:
        """Return the tokens of each prompt, each response and each response's loss, as the rows
        hold them."""
        used, left = self._bins[self._bins != FILLER], self._truncations
        return {
            "a prompt": (left.head + left.tail)[used],
            "a response": left.lengths[used].reshape(-1),
            "a response's loss": left.loss_tokens[used].reshape(-1),
        }

    def _group_fields(self, groups: Int[np.ndarray, "B"]) -> dict[str, np.ndarray]:
        """Return what the batch says of groups, in the order of their slots; 0 of fillers."""
        real, encoded = groups != FILLER, self._encoded
        pick = np.where(real, groups, 0)
        scores = encoded.scores[pick]
        if self.kind == "ranked":  # best first, without ties, where the data has ranks alone
            ranks = np.arange(self.shape.responses)[None, ::-1]
            scores = np.where(np.isnan(scores).all(axis=1, keepdims=True), ranks, scores)
        fields = {
            "example_index": np.where(real, groups, FILLER).astype(np.int32),
            "weight": np.where(real, encoded.weight[pick], 0.0).astype(np.float32),
            "scores": np.where(real[:, None], np.nan_to_num(scores), 0.0).astype(np.float32),
        }
        if self.kind == "unpaired":
            fields["label"] = encoded.label[pick] & real
        else:
            fields["margin"] = np.where(real, encoded.margin[pick], 0.0).astype(np.float32)
        return fields

    def _mismatched_batch(self, bins: Int[np.ndarray, "bins slots"], shape: BatchShape) -> Batch:
        """Pair the prompts of bins with the responses of their partners, row by row as they lie."""
        written = [
            [
                mismatches.pair(self._encoded, group, self._partners[group], self._limits)
                for group in groups
                if group != FILLER
            ]
            for groups in bins.tolist()
        ]
        weight = (bins.reshape(-1) != FILLER).astype(np.float32)
        name = "packed" if LAYOUTS[self.layout].packed else "plain"
        return layout.make_batch(written, shape, name, pad=self._pad, weight=weight)


def make_pipeline(
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    sizes: BatchSizes,
    *,
    seed: int = 0,
    mismatched: bool = False,
    once: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    unread: int | None = None,
) -> Pipeline:
    """Tokenize, truncate and pack the examples, and fix every batch.

    Args:
        examples: the examples; their kind decides R and the batch's fields.
        tokenizer: the tokenizer.
        options: how they become rows.
        sizes: of a batch.
        seed: of the order of examples, and of the mismatched completions.
        mismatched: add mismatched completions (KTO; R must be 1).
        once: a single pass in the order of the data, the last batch filled up with groups of weight
            0; else epoch after epoch without end.
        process_index, process_count: this process and how many there are.
        unread: as ``encoding.encode_all`` takes it.

    Raises:
        ValueError: sizes that do not fit or divide, no examples left, or mismatched completions
            with R > 1 or with one prompt only.
    """
    if examples.weights is not None and once:
        raise ValueError("weights mix endless sources: a single pass has none")
    if not len(examples):
        raise ValueError("no examples")
    sizes = dataclasses.replace(sizes, row_multiple=math.lcm(sizes.row_multiple, process_count))
    encoded = encode_all(examples.items, tokenizer, options, digest=examples.digest, unread=unread)
    responses = encoded.responses
    if mismatched and responses != 1:
        raise ValueError(
            f"mismatched completions need one response a prompt, these examples have {responses}"
        )
    limits = Limits.of(options, sizes.max_length, tokenizer.bos_token_id)
    truncations = truncation.truncate_all(encoded, limits)
    if once:  # the last step of a single pass has what is left
        options = dataclasses.replace(options, exact_batch=False)
    rows = _choose_rows(examples, truncations, responses, options, sizes, once=once)
    options = dataclasses.replace(options, layout=rows.layout)
    shape, bins, ends = _lay_out(examples, truncations, responses, options, sizes, rows, once=once)
    if not once and LAYOUTS[options.layout].packed:
        _check_packing(shape, bins, sizes)
    order = _stream(examples, bins, ends, seed if options.shuffle and not once else None, once)
    used = bins[bins != FILLER]
    partners = mismatches.partners(encoded, used, limits, seed) if mismatched else {}
    extra = None
    if mismatched:
        extra = _mismatched_shape(shape, encoded, bins, partners, limits, options.trim)
    fill = _fill(examples, truncations, options.layout, bins, ends, shape)
    return Pipeline(
        kind=examples.kind,
        layout=options.layout,
        shape=shape,
        report={**examples.report, **truncations.report, **fill},
        _encoded=encoded,
        _truncations=truncations,
        _limits=limits,
        _bins=bins,
        _stream=order.batch(shape.bins),
        _mismatched=extra,
        _partners=partners,
        _pad=pad_id(tokenizer),
        _process=(process_index, process_count),
        _once=once,
        _prefetch=options.prefetch,
    )


def _choose_rows(
    examples: Examples,
    truncations: Truncations,
    responses: int,
    options: DataOptions,
    sizes: BatchSizes,
    *,
    once: bool,
) -> Rows:
    """Decide the layout and the row length: as the options say, else what costs least.

    Raises:
        ValueError: an unknown layout, or rows shorter than the longest group.
    """
    names = [options.layout]
    if options.layout == "auto":
        packed = layout.usual("auto", responses)
        names = ["plain", packed]
        if sizes.row_length or options.groups_per_row:  # of packed rows
            names = [packed]
        elif not (options.shuffle or once):  # packing takes groups out of their order
            names = ["plain"]
        elif sizes.batch_size % sizes.row_multiple:
            names = [packed]
    rows = functools.partial(_rows, examples, truncations, responses, options, once=once)
    found = [rows(name, sizes) for name in names]
    choices = [one for one in found if one is not None]
    if choices:
        return min(choices, key=lambda one: one.cost)
    # no rows hold about so many groups: what does not divide is refused, with the nearest that does
    name = "plain" if options.layout == "auto" else options.layout
    only = rows(name, dataclasses.replace(sizes, row_length=responses * sizes.max_length))
    assert only is not None
    return only


def _rows(
    examples: Examples,
    truncations: Truncations,
    responses: int,
    options: DataOptions,
    name: str,
    sizes: BatchSizes,
    *,
    once: bool,
) -> Rows | None:
    """Return a layout's best rows; None where none hold about ``batch_size`` groups a step."""
    how = choose(LAYOUTS, name, "config.data.layout")
    prompts = truncations.head + truncations.tail
    lengths = how.row_length(prompts, truncations.lengths)
    left = np.flatnonzero(lengths)
    longest = int(lengths.max())
    if not how.packed:
        length = sizes.max_length
        if options.trim:
            length = min(length, layout.round_up(longest, 8))
        paid = responses * row_length.cost(length, sizes.attention_cost)
        return Rows(name, length, 1.0, paid)
    given = sizes.row_length or (responses * sizes.max_length if options.groups_per_row else 0)
    if given and once:  # what is evaluated may be longer than what is trained on
        given = max(given, layout.round_up(longest, 8))
    if 0 < given < longest:
        raise ValueError(
            f"row_length = {given} is shorter than the longest group, {longest} tokens: "
            f"--config.row_length={longest} holds it; or lower max_length"
        )
    sources = _sources(examples, lengths)
    if options.exact_batch:
        return _equal_rows(name, sources, lengths, given, sizes)
    # the mean of so many is that of all to about a hundredth
    some = [np.random.default_rng(0).permutation(groups)[:_SAMPLE] for groups in sources]
    loss = truncations.loss_tokens.sum(-1)
    parts = [(lengths[groups].tolist(), loss[groups].tolist()) for groups in some]
    mean_at = functools.partial(packing.mean_groups, parts, _weights(examples))
    if given:
        mean = options.groups_per_row or mean_at(given)
        return Rows(name, given, mean, row_length.cost(given, sizes.attention_cost) / mean)
    return row_length.solve(
        name,
        lengths[left],
        mean_at,
        batch_size=sizes.batch_size,
        row_multiple=sizes.row_multiple,
        attention_cost=sizes.attention_cost,
    )


def _equal_rows(
    name: str,
    sources: Sequence[Int[np.ndarray, "_"]],
    lengths: Int[np.ndarray, "G"],
    given: int,
    sizes: BatchSizes,
) -> Rows:
    """Return the best rows that hold as many groups each, ``batch_size`` in a step.

    Raises:
        ValueError: there are none, or none of the length that is given; what is possible.
    """
    size, multiple = sizes.batch_size, sizes.row_multiple
    if size % multiple:
        raise ValueError(
            f"config.data.exact_batch: batch_size {size} is not divisible by {multiple} (devices "
            f"over rows times microbatches); the next that is: {layout.round_up(size, multiple)}"
        )
    fewest, found = min(map(len, sources)), []
    for count in range(1, min(size // multiple, fewest) + 1):
        if size % (count * multiple):
            continue
        bins = [packing.equal_bins(one, lengths[one], count) for one in sources]
        longest = max(int(lengths[one].sum(1).max()) for one in bins)
        length = given or layout.round_up(longest, 8)
        paid = row_length.cost(length, sizes.attention_cost) / count
        found.append((longest, Rows(name, length, float(count), paid)))
    choices = [rows for longest, rows in found if longest <= rows.length]
    if not choices:
        raise ValueError(
            f"config.data.exact_batch: rows of row_length = {given} do not hold as many groups "
            f"each; the shortest that do: --config.row_length={min(found)[0]}"
        )
    # of nearly equal ones the shortest: the more rows a step has, the more mixed they are
    least = min(rows.cost for rows in choices)
    return next(rows for rows in choices if rows.cost <= _NEARLY * least)


def _sources(examples: Examples, lengths: Int[np.ndarray, "G"]) -> list[Int[np.ndarray, "_"]]:
    """Return the groups that are left of each source that is mixed by weight; else all together.

    Raises:
        ValueError: a weighted source of which nothing is left.
    """
    if examples.weights is None:
        return [np.flatnonzero(lengths)]
    found, start = [], 0
    for number, end in enumerate(examples.ends):
        found.append(start + np.flatnonzero(lengths[start:end]))
        start = end
        if not len(found[-1]):
            raise ValueError(
                f"data source {number + 1} of {len(examples.ends)} has a weight, but no examples "
                "are left of it: all were dropped"
            )
    return found


def _weights(examples: Examples) -> Sequence[float]:
    """Return the weights of ``_sources``."""
    return [1.0] if examples.weights is None else examples.weights


def _lay_out(
    examples: Examples,
    truncations: Truncations,
    responses: int,
    options: DataOptions,
    sizes: BatchSizes,
    rows: Rows,
    *,
    once: bool,
) -> tuple[BatchShape, Int[np.ndarray, "bins slots"], list[int]]:
    """Decide every other static size and what shares a row.

    Returns:
        The shape, the bins, and where each source's bins begin and end.
    """
    how = LAYOUTS[rows.layout]
    lengths = how.row_length(truncations.head + truncations.tail, truncations.lengths)
    sources, loss = _sources(examples, lengths), truncations.loss_tokens.sum(-1)
    if options.exact_batch and how.packed:
        parts = [packing.equal_bins(one, lengths[one], int(rows.mean)) for one in sources]
    else:
        slots = packing.group_slots(rows.mean)
        parts = [
            packing.make_bins(
                one.tolist(), lengths[one].tolist(), loss[one].tolist(), rows.length, slots
            )
            for one in sources
        ]
        if how.packed and not once:
            count = layout.packed_rows(sizes.batch_size, rows.mean, sizes.row_multiple)
            parts = _thinned(parts, sizes.batch_size / count, _weights(examples))
    bins, ends = np.concatenate(parts), np.cumsum([0, *map(len, parts)]).tolist()
    # the most loss tokens in any row: of a bin's groups together, or of a response
    loss = np.where((bins == FILLER)[..., None], 0, truncations.loss_tokens[bins])
    longest = int(loss.sum(axis=(1, 2)).max() if how.packed else loss.max())
    shape = layout.batch_shape(
        options,
        dataclasses.replace(sizes, max_length=rows.length, row_length=rows.length),
        responses,
        mean_groups=rows.mean,
        loss_positions=layout.loss_budget(longest, rows.length),
    )
    return shape, bins, ends


def _thinned(
    parts: Sequence[np.ndarray], wanted: float, weights: Sequence[float]
) -> list[np.ndarray]:
    """Divide rows of each source where they hold more than the wanted number of groups on
    average."""
    more = _mean(parts, weights) / wanted
    return [packing.divide(bins, round(len(bins) * more)) for bins in parts]


def _mean(parts: Sequence[np.ndarray], weights: Sequence[float]) -> float:
    """Return how many groups a bin has on average, where sources are mixed by weight."""
    groups = [int((bins != FILLER).sum()) for bins in parts]
    return packing.mixed(groups, [len(bins) for bins in parts], weights)


def _check_packing(
    shape: BatchShape, bins: Int[np.ndarray, "bins slots"], sizes: BatchSizes
) -> None:
    """Raise where rows in whole multiples give a step of another size than was asked for."""
    mean = float((bins != FILLER).sum(-1).mean())
    groups = shape.rows * mean
    if not 0.5 <= groups / sizes.batch_size <= 1.5 and len(bins) > shape.rows:
        raise ValueError(
            f"batch_size {sizes.batch_size} would become {shape.rows} rows of {mean:.3g} groups, "
            f"{groups:.3g} in a step: rows come in multiples of {sizes.row_multiple} (devices over "
            "rows times microbatches); change row_length, or batch_size to a multiple of "
            f"{round(sizes.row_multiple * mean)}"
        )


def _mismatched_shape(
    shape: BatchShape,
    encoded: Encoded,
    bins: Int[np.ndarray, "bins slots"],
    partners: Mapping[int, int],
    limits: Limits,
    trim: bool,
) -> BatchShape:
    """Return the sizes of the mismatched completions' rows: bins as they are, of other lengths.

    Plain rows have room for any prompt with any response, so that the order of the data, which
    decides who meets whom, does not change them.
    """
    prompts, responses = np.diff(encoded.prompt_ends), np.diff(encoded.response_ends)
    used = bins[bins != FILLER]
    # a response that its own long prompt has cut short may be whole after another prompt
    loss = encoded.loss_tokens[:, 0].copy()
    for group in used[responses[used] > limits.max_length].tolist():
        loss[group] = encoded.response(group, 0)[1][: limits.max_length].sum()
    if bins.shape[1] == 1:
        length = limits.max_length
        if trim:
            longest = int(prompts[used].max() + responses[used].max())
            length = min(length, layout.round_up(longest, 8))
        return layout.mismatched_shape(shape, length, int(loss[used].max()))
    partner = np.zeros(len(prompts), np.int64)
    partner[list(partners)] = list(partners.values())
    pairs = np.minimum(prompts + responses[partner], limits.max_length)
    real = bins != FILLER
    length = int(np.where(real, pairs[bins], 0).sum(1).max())
    most = int(np.where(real, loss[partner][bins], 0).sum(1).max())
    return layout.mismatched_shape(shape, layout.round_up(length, 8), most)


def _stream(
    examples: Examples,
    bins: Int[np.ndarray, "bins slots"],
    ends: list[int],
    seed: int | None,
    once: bool,
) -> grain.MapDataset:
    """Return the numbers of bins in the order in which they are used; no seed: in their own."""
    weights = examples.weights
    spans = [(0, len(bins))] if weights is None else list(zip(ends, ends[1:]))
    parts, shares = [], []
    for number, (start, end) in enumerate(spans):
        part = grain.MapDataset.range(start, end)
        if seed is not None:
            own = np.random.SeedSequence([seed, number]).generate_state(1)
            part = part.shuffle(seed=int(own[0]))
        parts.append(part if once else part.repeat(_ENDLESS_EPOCHS))
        if weights is not None:
            # weights speak of groups, the stream of bins: a source of short examples has more
            # groups in a bin
            shares.append(weights[number] / float((bins[start:end] != FILLER).sum(-1).mean()))
    return parts[0] if weights is None else grain.MapDataset.mix(parts, weights=shares)


def _fill(
    examples: Examples,
    truncations: Truncations,
    name: str,
    bins: Int[np.ndarray, "bins slots"],
    ends: list[int],
    shape: BatchShape,
) -> dict[str, int | float]:
    """Report what is used, how full rows are on average over an epoch, and steps by the mean of
    bins."""
    used = bins[bins != FILLER]
    prompts = (truncations.head + truncations.tail)[used]
    tokens = int(LAYOUTS[name].tokens(prompts, truncations.lengths[used]).sum())
    room = len(bins) * shape.rows_per_bin * shape.length
    parts = [bins] if examples.weights is None else np.split(bins, ends[1:-1])
    mean = _mean(parts, _weights(examples))
    left_out = int(truncations.lengths.any(axis=1).sum()) - len(used)
    return {
        **({"left out of equal rows": left_out} if left_out else {}),
        "examples": len(used),  # of what was read, which another part of it may share
        "tokens": tokens,
        "padding_fraction": round(1 - tokens / room, 4),
        "groups_per_step": round(mean * shape.bins, 2),
    }
