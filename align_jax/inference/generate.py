# SPDX-License-Identifier: Apache-2.0
"""Generation on the mesh: requests in, completions out.

Requests of any lengths and settings are sorted into calls of a few fixed shapes (prompt lengths in
buckets, a fixed number of rows), so a handful of programs is compiled once and serves the whole
run.  A request's completion depends on the request alone, never on what it was batched with
(`samplers`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int
from transformers import PreTrainedTokenizerBase

from align_jax.core.schema import Example
from align_jax.data import chat
from align_jax.inference import decoding
from align_jax.inference.mixture import Mixture
from align_jax.inference.samplers import Sampling, Settings, row_keys, stack
from align_jax.models import cache as caches
from align_jax.models.model import Model, Params
from align_jax.parallel.lowering import lower
from align_jax.parallel.mesh import row_shards
from align_jax.parallel.sharding import put_batch, row_sharding

_STOP_CHECK_TOKENS = 16  # tokens drawn between two looks for stop strings, on the host
_STOP_IDS_MULTIPLE = 8  # stop tokens are padded to this many, so that one more does not recompile
_SMALLEST_BUCKET = 16  # tokens
# where half of the rows are done the others go on alone: so many at least, with so many tokens to
# come at most, that they win more than it takes to compile for them
_FEWEST_ROWS, _TOKENS_TO_COME = 8, 64
_FETCHED = ("tokens", "token_logps", "drawn_logps", "counts", "done", "stopped")
_TIMES_FASTER = 4  # of a prefilled token against one that is run behind a kept cache


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    Attributes:
        prompt: token ids, at least one.
        samples: completions wanted; they share the prompt's prefill.
        max_new_tokens: tokens at most, the stop token included.
        sampling: settings.
        seed: of the draws; sample i of a request draws by (seed, i, position).
        stop: strings that end a completion; they are cut off its text, not off its tokens.
        room: tokens that its prompt and its completion are padded to at least: requests of one room
            share a program, however their own lengths differ.
    """

    prompt: tuple[int, ...]
    samples: int = 1
    max_new_tokens: int = 256
    sampling: Sampling = Sampling()
    seed: int = 0
    stop: tuple[str, ...] = ()
    room: tuple[int, int] = (0, 0)


_NOTHING = Request((0,), samples=0, max_new_tokens=0)  # asked of a row that rests


class Completion(NamedTuple):
    """One sampled continuation; of several turns it holds what was said between them, too."""

    tokens: Int[np.ndarray, "n"]  # the stop token included
    token_logps: Float[np.ndarray, "n"]  # nats, under the model: what rescoring gives
    drawn_logps: Float[np.ndarray, "n"]  # nats, under the distribution that was sampled from
    text: str  # without special tokens and without the stop string
    finish: str  # "stop": by a stop token or string; "length": by the limit
    said: Bool[np.ndarray, "n"] | None = None  # which tokens the model drew; None: all

    @property
    def mask(self) -> Bool[np.ndarray, "n"]:
        """Which of the tokens the model drew."""
        return np.ones(len(self.tokens), np.bool_) if self.said is None else self.said


class _Call(NamedTuple):
    """What goes to the device together: some of the requests, ``samples`` rows each, from ``first``
    on."""

    indices: tuple[int, ...]
    first: int
    samples: int
    bucket: int


class RowSample(NamedTuple):
    """What a row holds: one of a request's samples."""

    request: Request
    number: int  # among the request's samples


class _Arrays(NamedTuple):
    """A call as this process's arrays, and what they mean."""

    tokens: Int[np.ndarray, "G T"]
    lengths: Int[np.ndarray, "G"]
    settings: Settings
    limits: Int[np.ndarray, "N"]
    keys: Any  # uint32 [N, 2]
    rows: list[RowSample]  # those that are no fillers
    slots: int
    filters: frozenset[str]


class _Drawn(NamedTuple):
    """What a call's rows have so far."""

    state: decoding.DecodeState  # of the rows that are decoded further, at least
    fields: Mapping[str, np.ndarray]  # ``_FETCHED`` of all rows, on the host
    rows: list[RowSample]
    stops: Mapping[int, tuple[int, str]]  # row -> what `find_stop` found in it


class _Kept(NamedTuple):
    """The rows of a call, for requests that go on where they have ended."""

    rows: list[tuple[int, ...]]  # the tokens of each; () of a filler
    state: decoding.DecodeState


class Lowered(NamedTuple):
    """Generation's two programs, lowered."""

    prefill: jax.stages.Lowered
    decode: jax.stages.Lowered  # its loop's body draws one token in each row
    state: Any  # what goes from one to the other, shapes with shardings: the cache most of all
    prompts: tuple[int, int]  # how many a call prefills, and their padded length
    calls: int  # that the requests take


def bucket(length: int, largest: int) -> int:
    """Return the padded length of a prompt: the next power of two, at least 16, at most the
    largest.

    >>> [bucket(n, 500) for n in (3, 16, 17, 300)]
    [16, 16, 32, 500]
    """
    size = _SMALLEST_BUCKET
    while size < length:
        size *= 2
    return min(size, largest)


def completion_text(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    tokens: Sequence[int],
    ends: Container[int] = (),
) -> str:
    """Return what the tokens add to the prompt's text, special tokens left out, and a last one of
    ``ends``.

    Some tokenizers drop the space before a text's first word, so tokens are decoded behind their
    prompt.
    """
    if tokens and tokens[-1] in ends:
        tokens = tokens[:-1]

    def decode(ids: Sequence[int]) -> str:
        keep = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(tokenizer.decode(list(ids), **keep))

    before, whole = decode(prompt), decode([*prompt, *tokens])
    return whole[len(before) :] if whole.startswith(before) else decode(tokens)


def before_stop(text: str, stop: Sequence[str]) -> str | None:
    """Return the text before the first stop string; None where there is none."""
    found = [position for position in map(text.find, stop) if position >= 0]
    return text[: min(found)] if found else None


def find_stop(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    tokens: Sequence[int],
    stop: Sequence[str],
) -> tuple[int, str] | None:
    """Find the first stop string in a completion.

    Returns:
        The fewest tokens whose text holds it, and the text before it; None where there is none.
    """
    # a special token is no text, and stops as a string all the same
    special = {
        number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content in stop
    }
    first = next((i for i, token in enumerate(tokens) if int(token) in special), None)
    if first is not None:
        earlier = find_stop(tokenizer, prompt, tokens[:first], stop)
        return earlier or (first + 1, completion_text(tokenizer, prompt, tokens[:first]))
    before = before_stop(completion_text(tokenizer, prompt, tokens), stop)
    if before is None:
        return None
    low, high = 1, len(tokens)
    while low < high:  # the text grows with the tokens, so "holds a stop string" is monotonic
        middle = (low + high) // 2
        part = completion_text(tokenizer, prompt, tokens[:middle])
        low, high = (low, middle) if any(one in part for one in stop) else (middle + 1, high)
    return low, before


def stop_tokens(tokenizer: PreTrainedTokenizerBase, own: Sequence[int] = ()) -> tuple[int, ...]:
    """Return the tokens that end an answer: end of sequence, end of turn in the chat template, the
    checkpoint's own.

    Args:
        tokenizer: the tokenizer.
        own: the checkpoint's (``ModelConfig.end_tokens``).
    """
    found = {tokenizer.eos_token_id, *own}
    if tokenizer.chat_template:
        try:
            rendered = chat.render(Example(({"role": "user", "content": "a"},), ("b",)), tokenizer)
        except chat.RowError as error:
            raise ValueError(f"the tokenizer {tokenizer.name_or_path!r}: {error}") from error
        last = tokenizer(rendered.responses[0][-1].text, add_special_tokens=False).input_ids[-1]
        # of its own, whether it is called special or not; runs of blanks are added tokens too
        added = tokenizer.added_tokens_decoder.get(last)
        found |= {last} if added is not None and added.content.strip() else set()
    return tuple(sorted(found))


class Generator:
    """Compiled generation for one model.

    Args:
        model: its pure functions.
        tokenizer: for stop strings and the completions' text.
        rows: completions that are decoded together (a multiple of the mesh's row shards).
        max_length: tokens of a prompt with its completion; default: the model's positions.
        mesh: where to run; None: the default device.
        stop_ids: tokens that end a completion; default: `stop_tokens` of the tokenizer and the
            model.
        cache_dtype: of keys and values; default: the model's compute type.
        prompt_bucket: one padded prompt length for all calls; default: powers of two.  Needed with
            several processes, which must run the same programs whatever their own prompts are.
        keep: tokens of the cache that is kept behind requests which took one call, until the next
            call or ``forget``: requests of one sample that each begin with all the tokens of one of
            its rows go on there, and draw what they would draw.  0: none is.  With several
            processes, stop strings, a repetition penalty or a cache that cannot be ``rewound`` none
            is either.

    Raises:
        ValueError: rows that the mesh does not divide, or more tokens than the model has positions.
    """

    def __init__(
        self,
        model: Model | Mixture,
        tokenizer: PreTrainedTokenizerBase,
        *,
        rows: int = 64,
        max_length: int | None = None,
        mesh: jax.sharding.Mesh | None = None,
        stop_ids: Sequence[int] | None = None,
        cache_dtype: Any = None,
        prompt_bucket: int | None = None,
        keep: int = 0,
    ) -> None:
        shards = 1 if mesh is None else row_shards(mesh)
        if rows < 1 or rows % shards:
            raise ValueError(
                f"generation rows = {rows} must be a positive multiple of the {shards} row shards"
            )
        limit = model.config.longest
        if max_length is not None and max_length > limit:
            raise ValueError(
                f"max_length = {max_length} is more than the model's {limit} positions"
                + (" (for which its rotary embedding was chosen)" if model.config.limit else "")
            )
        if jax.process_count() > 1 and prompt_bucket is None:
            raise ValueError(
                "with several processes set prompt_bucket: all must run the same programs"
            )
        self._model, self._tokenizer, self._mesh = model, tokenizer, mesh
        self._max_length, self._bucket = max_length or limit, prompt_bucket
        self._cache_dtype = cache_dtype
        self._keep = 0 if jax.process_count() > 1 else keep
        self._kept: _Kept | None = None
        processes = jax.process_count()  # each brings an equal part of a call's rows
        self._rows, self._shards = rows // processes, max(1, shards // processes)
        own = model.config.end_tokens
        ids = stop_tokens(tokenizer, own) if stop_ids is None else tuple(stop_ids)
        self._stop_ids = np.full(
            -(-max(1, len(ids)) // _STOP_IDS_MULTIPLE) * _STOP_IDS_MULTIPLE, -1, np.int32
        )
        self._stop_ids[: len(ids)] = ids

    def __call__(
        self,
        params: Params,
        requests: Sequence[Request],
        report: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """Generate.

        Args:
            params: the model's parameters.
            requests: any number; this process's own where there are several.
            report: called with the number of completions finished by each call.

        Returns:
            For each request its completions.

        Raises:
            ValueError: a prompt that is empty or leaves no room for a token.
        """
        self._check(requests)
        found: list[list[Completion]] = [[] for _ in requests]
        kept, self._kept = self._kept, None
        rows = None if kept is None else self._rows_before(kept, requests)
        if kept is not None and rows is not None:
            found = self._go_on(params, requests, kept, rows)
            if report is not None:
                report(len(found))
            return found
        calls = list(self._plan(requests))
        for call in calls:
            asked = [requests[i] for i in call.indices]
            completions = self._run(params, asked, call, keep=len(calls) == 1)
            for i, several in zip(call.indices, completions):
                found[i].extend(several)
            if report is not None:
                report(sum(map(len, completions)))
        return found

    def forget(self) -> None:
        """Let go of what was kept of the last call: its memory, and its parameters' doing."""
        self._kept = None

    def keeps(self, state: Any, requests: Sequence[Request], calls: int) -> bool:
        """Tell whether requests of one sample could go on in the rows that some requests took so
        many calls for (``keep``).

        Args:
            state: where the rows have ended, arrays or shapes.
            requests: what they were asked for.
            calls: their number.
        """
        whole = calls == 1 and state.tokens.shape[0] == self._prompts(1) and state.seen is None
        stops = any(request.stop for request in requests)
        return whole and not stops and self._keep > 0 and caches.rewinds(state.cache, self._keep)

    def _rows_before(self, kept: _Kept, requests: Sequence[Request]) -> list[int] | None:
        """Find the row of the last call in which each request's prompt begins; None where that
        would not serve all of them, or be slower than to prefill."""
        free: dict[tuple[int, ...], list[int]] = {}
        for row, tokens in enumerate(kept.rows):
            free.setdefault(tokens, []).append(row)
        lengths, found, rest = sorted({len(one) for one in kept.rows} - {0}, reverse=True), [], 0
        for request in requests:
            parts = (request.prompt[:n] for n in lengths if n < len(request.prompt))
            rows = next((free[part] for part in parts if free.get(part)), None)
            if rows is None or request.samples != 1 or request.stop:
                return None
            found.append(rows.pop())
            rest = max(rest, len(request.prompt) - len(kept.rows[found[-1]]))
        shortest = min(len(request.prompt) for request in requests)
        return found if _TIMES_FASTER * rest < shortest else None

    def _go_on(
        self, params: Params, requests: Sequence[Request], kept: _Kept, rows: Sequence[int]
    ) -> list[list[Completion]]:
        """Answer requests that begin as these rows of the last call."""
        by_row = [_NOTHING] * len(kept.rows)
        for row, request in zip(rows, requests):
            by_row[row] = request
        length = max(len(request.prompt) for request in requests)
        call = _Call(tuple(range(len(by_row))), 0, 1, bucket(length, self._max_length))
        found = self._run(params, by_row, call, keep=True, kept=kept)
        return [found[row] for row in rows]

    def _tails(
        self, requests: Sequence[Request], kept: _Kept
    ) -> tuple[Int[np.ndarray, "N F"], Int[np.ndarray, "N"]]:
        """Return what requests add to their rows of the last call, that one's last token first."""
        tails = [
            request.prompt[len(row) - 1 :] if request.samples else ()
            for request, row in zip(requests, kept.rows)
        ]
        longest = bucket(max(map(len, tails)), self._max_length)
        tokens = np.zeros((len(tails), longest), np.int32)
        for row, tail in enumerate(tails):
            tokens[row, : len(tail)] = tail
        return tokens, np.array([len(tail) for tail in tails], np.int32)

    def stream(self, params: Params, request: Request) -> Iterator[Completion]:
        """Generate one completion and give it each time that it has grown, at last the whole.

        Args:
            params: the model's parameters.
            request: of one sample; what it draws is what a call with it draws.

        Raises:
            ValueError: a prompt that is empty or leaves no room for a token.
        """
        self._check([request])
        request = dataclasses.replace(request, samples=1)
        [call] = self._plan([request])
        for one in self._states(params, [request], call, every=1):
            yield self._collect(one, samples=1)[0][0]

    def _check(self, requests: Sequence[Request]) -> None:
        for i, request in enumerate(requests):
            if not 0 < len(request.prompt) < self._max_length:
                raise ValueError(
                    f"request {i}: its prompt has {len(request.prompt)} tokens; expected from 1 to "
                    f"{self._max_length - 1}, so that one new token fits"
                )

    def _plan(self, requests: Sequence[Request]) -> Iterator[_Call]:
        """Group requests of like shapes; a request with many samples takes several calls."""
        groups: dict[tuple[int, int, int], list[int]] = {}
        for i, request in enumerate(requests):
            size = self._bucket or bucket(len(request.prompt), self._max_length)
            size = max(size, request.room[0])
            most = min(request.samples, max(1, self._rows // self._shards))
            for first in range(0, request.samples, most):
                groups.setdefault((size, most, first), []).append(i)
        for (size, samples, first), indices in sorted(groups.items()):
            prompts = self._prompts(samples)
            for begin in range(0, len(indices), prompts):
                yield _Call(tuple(indices[begin : begin + prompts]), first, samples, size)

    def _prompts(self, samples: int) -> int:
        """Return how many prompts a call has, of so many samples each."""
        return max(self._shards, self._rows // samples // self._shards * self._shards)

    def _arrays(self, requests: Sequence[Request], call: _Call) -> _Arrays:
        """Write a call's requests, and the rows that fill it up, as this process's arrays."""
        prompts = self._prompts(call.samples)
        tokens, lengths = np.zeros((prompts, call.bucket), np.int32), np.ones(prompts, np.int32)
        for g, request in enumerate(requests):
            tokens[g, : len(request.prompt)], lengths[g] = request.prompt, len(request.prompt)
        filled = [
            RowSample(request, call.first + s) for request in requests for s in range(call.samples)
        ]
        fill = [0] * (prompts * call.samples - len(filled))
        limits = np.array([self._limit(row) for row in filled] + fill, np.int32)
        settings, filters = stack(
            [row.request.sampling for row in filled] + [Sampling()] * len(fill)
        )
        seeds = np.array([row.request.seed for row in filled] + fill)
        numbers = np.array([row.number for row in filled] + fill)
        most = max(max(request.max_new_tokens, request.room[1]) for request in requests)
        slots = bucket(most, self._max_length)
        keys = np.asarray(jax.random.key_data(row_keys(seeds, numbers)))
        return _Arrays(tokens, lengths, settings, limits, keys, filled, slots, filters)

    def _limit(self, row: RowSample) -> int:
        """Return how many tokens a row may get; 0 of a sample that was not asked for."""
        request = row.request
        if row.number >= request.samples:
            return 0
        return min(request.max_new_tokens, self._max_length - len(request.prompt))

    def _static(self, call: _Call, arrays: _Arrays) -> dict[str, Any]:
        """Return what the prefill is compiled for beside the arrays' shapes."""
        return {
            "samples": call.samples,
            "slots": arrays.slots,
            "filters": arrays.filters,
            "dtype": self._cache_dtype,
            "room": self._keep,
        }

    def _put(self, tree: Any) -> Any:
        if self._mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        return put_batch(self._mesh, tree)

    def _run(
        self,
        params: Params,
        requests: Sequence[Request],
        call: _Call,
        keep: bool,
        kept: _Kept | None = None,
    ) -> list[list[Completion]]:
        stops = any(request.stop for request in requests)
        looking = jax.process_count() > 1 or stops
        every = _STOP_CHECK_TOKENS if looking else self._max_length
        narrows = not (keep and self._keep) and jax.process_count() * self._shards == 1
        *_, last = self._states(params, requests, call, every, kept, narrows=narrows)
        if keep and self.keeps(last.state, requests, calls=1):
            tokens, counts = last.fields["tokens"], last.fields["counts"]
            rows: list[tuple[int, ...]] = [()] * len(counts)
            for row, (request, number) in enumerate(last.rows):
                if number < request.samples and counts[row]:
                    rows[row] = (*request.prompt, *tokens[row, : counts[row]].tolist())
            self._kept = _Kept(rows, last.state)
        return self._collect(last, call.samples)

    def _states(
        self,
        params: Params,
        requests: Sequence[Request],
        call: _Call,
        every: int,
        kept: _Kept | None = None,
        narrows: bool = False,
    ) -> Iterator[_Drawn]:
        """Prefill (or go on in what was kept) and decode to the end, giving what there is after
        every so many tokens.

        Each is to be read before the next is asked for, which takes its memory.  ``narrows``: where
        half of the rows are done the others go on alone, so that one long answer does not hold
        them.
        """
        arrays = self._arrays(requests, call)
        tokens, lengths, settings, limits, keys = self._put(arrays[:5])
        row_requests = decoding.RowRequests(
            jax.random.wrap_key_data(keys), settings, limits, jnp.asarray(self._stop_ids)
        )
        with context_mesh(self._mesh):
            if kept is None:
                sizes = self._static(call, arrays)
                state = decoding.prefill(
                    self._model, params, tokens, lengths, row_requests, **sizes
                )
            else:
                sizes = {"slots": arrays.slots, "filters": arrays.filters}
                tails = self._put(self._tails(requests, kept))
                state = decoding.extend(
                    self._model, params, *tails, row_requests, kept.state, **sizes
                )
        stops: dict[int, tuple[int, str]] = {}
        fields = {name: local_rows(getattr(state, name)).copy() for name in _FETCHED}
        done, live = fields["done"], np.arange(len(fields["done"]))  # the rows that state holds
        while True:
            self._find_stops(fields, arrays.rows, stops)
            done[list(stops)] = True
            step = int(local_rows(state.step))
            yield _Drawn(state, fields, arrays.rows, stops)
            if step >= arrays.slots or true_on_all_processes(bool(done.all())):
                return
            state = state._replace(done=self._put(done[live])) if stops else state
            until = np.int32(min(arrays.slots, step + every))
            narrows = narrows and arrays.slots - step >= _TOKENS_TO_COME
            with context_mesh(self._mesh):
                if narrows and (less := _narrowed(done[live])) is not None:
                    row_requests, state = decoding.narrow(row_requests, state, self._put(less))
                    live = live[less]
                few = len(live) // 2 if narrows and len(live) >= 2 * _FEWEST_ROWS else 0
                state = decoding.decode(
                    self._model,
                    params,
                    row_requests,
                    state,
                    until,
                    np.int32(few),
                    filters=arrays.filters,
                )
            for name, field in fields.items():
                field[live] = local_rows(getattr(state, name))

    def lower(
        self, params: Params, requests: Sequence[Request], platform: str | None = None
    ) -> Lowered:
        """Lower the two programs that answer these requests, from shapes alone.

        Args:
            params: the model's parameters, shapes with shardings.
            requests: only their sizes matter.
            platform: "tpu" for a topology's devices; None: the devices' own.

        Raises:
            ValueError: the requests take calls of several shapes, or there is no mesh.
        """
        if self._mesh is None:
            raise ValueError("lowering needs a mesh: it says where everything lies")
        calls = list(self._plan(requests))
        if len({(call.samples, call.bucket) for call in calls}) > 1:
            raise ValueError("expected requests of one shape, so that two programs serve them all")
        call = calls[0]
        arrays = self._arrays([requests[i] for i in call.indices], call)
        rows = row_sharding(self._mesh)

        def shape(x: Any, sharding: NamedSharding = rows) -> Any:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        tokens, lengths, settings, limits, keys = jax.tree.map(shape, arrays[:5])
        replicated = NamedSharding(self._mesh, PartitionSpec())
        row_requests = decoding.RowRequests(
            shape(jax.eval_shape(jax.random.wrap_key_data, keys)),
            settings,
            limits,
            shape(self._stop_ids, replicated),
        )
        prefill = lower(
            decoding.prefill,
            self._mesh,
            self._model,
            params,
            tokens,
            lengths,
            row_requests,
            **self._static(call, arrays),
            platform=platform,
        )
        state = jax.tree.map(
            shape, prefill.out_info, decoding.shardings(self._mesh, prefill.out_info)
        )
        until = jax.ShapeDtypeStruct((), np.int32, sharding=replicated)
        decode = lower(
            decoding.decode,
            self._mesh,
            self._model,
            params,
            row_requests,
            state,
            until,
            until,
            filters=arrays.filters,
            platform=platform,
        )
        return Lowered(prefill, decode, state, tokens.shape, len(calls))

    def _find_stops(
        self,
        fields: Mapping[str, np.ndarray],
        rows: Sequence[RowSample],
        stops: dict[int, tuple[int, str]],
    ) -> None:
        tokens, counts = fields["tokens"], fields["counts"]
        for row, (request, _) in enumerate(rows):
            if request.stop and row not in stops:
                ids = tokens[row, : counts[row]].tolist()
                found = find_stop(self._tokenizer, request.prompt, ids, request.stop)
                if found is not None:
                    stops[row] = found

    def _collect(self, drawn: _Drawn, samples: int) -> list[list[Completion]]:
        _, fields, rows, stops = drawn
        tokens, logps, drawn_logps, counts, _, stopped = (fields[name] for name in _FETCHED)
        found: list[list[Completion]] = []
        ends = set(self._stop_ids.tolist())
        for row, (request, number) in enumerate(rows):
            if row % samples == 0:
                found.append([])
            if number >= request.samples:
                continue
            n = int(counts[row])
            if row in stops:
                n, text = stops[row]
            else:
                ids = tokens[row, :n].tolist()
                text = completion_text(self._tokenizer, request.prompt, ids, ends)
            finish = "stop" if row in stops or stopped[row] else "length"
            own, own_logps, own_drawn = (x[row, :n].copy() for x in (tokens, logps, drawn_logps))
            found[-1].append(Completion(own, own_logps, own_drawn, text, finish))
        return found


def _narrowed(done: Bool[np.ndarray, "N"]) -> Int[np.ndarray, "n"] | None:
    """Return the rows to go on with, half of them or a half of that; None: all, for more than half
    are not done."""
    going, size = np.flatnonzero(~done), len(done)
    while size % 2 == 0 and size // 2 >= max(len(going), _FEWEST_ROWS):
        size //= 2
    if size == len(done):
        return None
    rest = np.flatnonzero(done)[: size - len(going)]
    return np.concatenate([going, rest]).astype(np.int32)


def context_mesh(mesh: jax.sharding.Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which this mesh, if it is one, is JAX's context mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def true_on_all_processes(flag: bool) -> bool:
    """Tell whether a flag is true in every process."""
    if jax.process_count() == 1:
        return flag
    return bool(np.all(multihost_utils.process_allgather(np.array(flag))))


def local_rows(x: jax.Array) -> np.ndarray:
    """Fetch this process's rows of an array that is sharded over the rows (all of it with one
    process)."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x.addressable_data(0) if x.is_fully_replicated else x)
    shards = {shard.index[0].start or 0: shard for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])
