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
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Int
from transformers import PreTrainedTokenizerBase

from align_jax.core.schema import Example
from align_jax.data import chat
from align_jax.inference import decoding
from align_jax.inference.samplers import Sampling, Settings, row_keys, stack
from align_jax.models.model import Model
from align_jax.parallel.lowering import lower
from align_jax.parallel.mesh import row_shards
from align_jax.parallel.sharding import put_batch, row_sharding

_STOP_CHECK_TOKENS = 16  # tokens drawn between two looks for stop strings, on the host
_STOP_IDS_MULTIPLE = 8  # stop tokens are padded to this many, so that one more does not recompile
_SMALLEST_BUCKET = 16  # tokens


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
    """

    prompt: tuple[int, ...]
    samples: int = 1
    max_new_tokens: int = 256
    sampling: Sampling = Sampling()
    seed: int = 0
    stop: tuple[str, ...] = ()


class Completion(NamedTuple):
    """One sampled continuation."""

    tokens: Int[np.ndarray, "n"]  # the stop token included
    token_logps: Float[np.ndarray, "n"]  # nats, under the model: what rescoring gives
    drawn_logps: Float[np.ndarray, "n"]  # nats, under the distribution that was sampled from
    text: str  # without special tokens and without the stop string
    finish: str  # "stop": by a stop token or string; "length": by the limit


class _Call(NamedTuple):
    """What goes to the device together: some of the requests, ``samples`` rows each, from ``first``
    on."""

    indices: tuple[int, ...]
    first: int
    samples: int
    bucket: int


class _Arrays(NamedTuple):
    """A call as this process's arrays, and what they mean."""

    tokens: Int[np.ndarray, "G T"]
    lengths: Int[np.ndarray, "G"]
    settings: Settings
    limits: Int[np.ndarray, "N"]
    keys: Any  # uint32 [N, 2]
    # of each row that is no filler: its request, and which of its samples it is
    each: list[tuple[Request, int]]
    slots: int
    filters: frozenset[str]


class Lowered(NamedTuple):
    """Generation's two programs, lowered."""

    prefill: jax.stages.Lowered
    decode: jax.stages.Lowered  # its loop's body draws one token in each row
    progress: Any  # what goes from one to the other, shapes with shardings: the cache most of all
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
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], tokens: Sequence[int]
) -> str:
    """Return what the tokens add to the prompt's text, special tokens left out.

    Some tokenizers drop the space before a text's first word, so tokens are decoded behind their
    prompt.
    """

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    before, whole = decode(list(prompt)), decode([*prompt, *tokens])
    return whole[len(before) :] if whole.startswith(before) else decode(list(tokens))


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
    text = completion_text(tokenizer, prompt, tokens)
    places = [place for place in map(text.find, stop) if place >= 0]
    if not places:
        return None
    low, high = 1, len(tokens)
    while low < high:  # the text grows with the tokens, so "holds a stop string" is monotonic
        middle = (low + high) // 2
        part = completion_text(tokenizer, prompt, tokens[:middle])
        low, high = (low, middle) if any(one in part for one in stop) else (middle + 1, high)
    return low, text[: min(places)]


def stop_tokens(tokenizer: PreTrainedTokenizerBase, path: str = "") -> tuple[int, ...]:
    """Return the tokens that end an answer: end of sequence, end of turn in the chat template, the
    checkpoint's own.

    Args:
        tokenizer: the tokenizer.
        path: folder of the checkpoint, whose ``generation_config.json`` may name more; "" = none.
    """
    found = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        rendered = chat.render(Example(({"role": "user", "content": "a"},), ("b",)), tokenizer)
        last = tokenizer(rendered.responses[0][-1].text, add_special_tokens=False).input_ids[-1]
        special = tokenizer.added_tokens_decoder.get(last)
        found |= {last} if special is not None and special.special else set()
    config = pathlib.Path(path) / "generation_config.json"
    if path and config.is_file():
        named = json.loads(config.read_text()).get("eos_token_id")
        found |= set(named if isinstance(named, list) else [named]) - {None}
    return tuple(sorted(found))


class Generator:
    """Compiled generation for one model.

    Args:
        model: its pure functions.
        tokenizer: for stop strings and the completions' text.
        rows: completions that are decoded together (a multiple of the mesh's row shards).
        max_length: tokens of a prompt with its completion; default: the model's positions.
        mesh: where to run; None: the default device.
        stop_ids: tokens that end a completion; default: `stop_tokens` of the tokenizer.
        cache_dtype: of keys and values; default: the model's compute type.
        prompt_bucket: one padded prompt length for all calls; default: powers of two.  Needed with
            several processes, which must run the same programs whatever their own prompts are.

    Raises:
        ValueError: rows that the mesh does not divide, or more tokens than the model has positions.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase,
        *,
        rows: int = 64,
        max_length: int | None = None,
        mesh: jax.sharding.Mesh | None = None,
        stop_ids: Sequence[int] | None = None,
        cache_dtype: Any = None,
        prompt_bucket: int | None = None,
    ) -> None:
        shards = 1 if mesh is None else row_shards(mesh)
        if rows < 1 or rows % shards:
            raise ValueError(
                f"generation rows = {rows} must be a positive multiple of the {shards} row shards"
            )
        limit = model.config.max_positions
        if max_length is not None and max_length > limit:
            raise ValueError(
                f"max_length = {max_length} is more than the model's {limit} positions"
            )
        if jax.process_count() > 1 and prompt_bucket is None:
            raise ValueError(
                "with several processes set prompt_bucket: all must run the same programs"
            )
        self._model, self._tokenizer, self._mesh = model, tokenizer, mesh
        self._rows, self._max_length, self._bucket = rows, max_length or limit, prompt_bucket
        self._shards, self._dtype = shards, cache_dtype
        ids = stop_tokens(tokenizer) if stop_ids is None else tuple(stop_ids)
        self._stop_ids = np.full(
            -(-max(1, len(ids)) // _STOP_IDS_MULTIPLE) * _STOP_IDS_MULTIPLE, -1, np.int32
        )
        self._stop_ids[: len(ids)] = ids

    def __call__(
        self,
        params: Any,
        requests: Sequence[Request],
        report: Callable[[int], None] = lambda done: None,
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
        for i, request in enumerate(requests):
            if not 0 < len(request.prompt) < self._max_length:
                raise ValueError(
                    f"request {i}: its prompt has {len(request.prompt)} tokens; "
                    "expected from 1 to "
                    f"{self._max_length - 1}, so that one new token fits"
                )
        found: list[list[Completion]] = [[] for _ in requests]
        for call in self._plan(requests):
            completions = self._run(params, [requests[i] for i in call.indices], call)
            for i, several in zip(call.indices, completions):
                found[i].extend(several)
            report(sum(map(len, completions)))
        return found

    def _plan(self, requests: Sequence[Request]) -> Iterator[_Call]:
        """Group requests of like shapes; a request with many samples takes several calls."""
        share = jax.process_count()  # each process brings an equal part of a call's rows
        rows, shards = self._rows // share, max(1, self._shards // share)
        groups: dict[tuple[int, int, int], list[int]] = {}
        for i, request in enumerate(requests):
            size = self._bucket or bucket(len(request.prompt), self._max_length)
            most = min(request.samples, max(1, rows // shards))
            for first in range(0, request.samples, most):
                groups.setdefault((size, most, first), []).append(i)
        for (size, samples, first), indices in sorted(groups.items()):
            prompts = max(shards, rows // samples // shards * shards)
            for begin in range(0, len(indices), prompts):
                yield _Call(tuple(indices[begin : begin + prompts]), first, samples, size)

    def _arrays(self, requests: Sequence[Request], call: _Call) -> _Arrays:
        """Write a call's requests, and the rows that fill it up, as this process's arrays."""
        share = jax.process_count()
        rows, shards = self._rows // share, max(1, self._shards // share)
        prompts = max(shards, rows // call.samples // shards * shards)
        tokens, lengths = np.zeros((prompts, call.bucket), np.int32), np.ones(prompts, np.int32)
        for g, request in enumerate(requests):
            tokens[g, : len(request.prompt)], lengths[g] = request.prompt, len(request.prompt)
        each = [(request, call.first + s) for request in requests for s in range(call.samples)]
        fill = prompts * call.samples - len(each)
        limits = [
            min(request.max_new_tokens, self._max_length - len(request.prompt))
            if s < request.samples
            else 0
            for request, s in each
        ] + [0] * fill
        settings, filters = stack([request.sampling for request, _ in each] + [Sampling()] * fill)
        seeds = np.array([request.seed for request, _ in each] + [0] * fill)
        numbers = np.array([s for _, s in each] + [0] * fill)
        slots = bucket(max(request.max_new_tokens for request in requests), self._max_length)
        keys = np.asarray(jax.random.key_data(row_keys(seeds, numbers)))
        return _Arrays(
            tokens, lengths, settings, np.array(limits, np.int32), keys, each, slots, filters
        )

    def _run(self, params: Any, requests: Sequence[Request], call: _Call) -> list[list[Completion]]:
        arrays = self._arrays(requests, call)
        put = (
            (lambda tree: jax.tree.map(jnp.asarray, tree))
            if self._mesh is None
            else (lambda tree: put_batch(self._mesh, tree))
        )
        tokens, lengths, settings, limits, keys = put(arrays[:5])
        asked = decoding.Rows(
            jax.random.wrap_key_data(keys), settings, limits, jnp.asarray(self._stop_ids)
        )
        with ambient(self._mesh):
            progress = decoding.start(
                self._model,
                params,
                tokens,
                lengths,
                asked,
                samples=call.samples,
                slots=arrays.slots,
                filters=arrays.filters,
                dtype=self._dtype,
            )
            progress, cuts = self._finish(
                params, asked, progress, arrays.each, arrays.slots, arrays.filters
            )
        return self._collect(progress, arrays.each, call.samples, cuts)

    def lower(
        self, params: Any, requests: Sequence[Request], platform: str | None = None
    ) -> Lowered:
        """Lower the two programs that answer these requests, from shapes alone.

        Args:
            params: the model's parameters, shapes with shardings.
            requests: what would be asked for; only the sizes matter.
            platform: "tpu" for a topology's devices; None: the devices' own.

        Raises:
            ValueError: the requests take calls of several shapes.
        """
        calls = list(self._plan(requests))
        if len({(call.samples, call.bucket) for call in calls}) > 1:
            raise ValueError("expected requests of one shape, so that two programs serve them all")
        call = calls[0]
        arrays = self._arrays([requests[i] for i in call.indices], call)
        rows = row_sharding(self._mesh)

        def shape(x, sharding=rows):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        tokens, lengths, settings, limits, keys = jax.tree.map(shape, arrays[:5])
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        asked = decoding.Rows(
            shape(jax.eval_shape(jax.random.wrap_key_data, keys)),
            settings,
            limits,
            shape(self._stop_ids, everywhere),
        )
        prefill = lower(
            decoding.start,
            self._mesh,
            self._model,
            params,
            tokens,
            lengths,
            asked,
            samples=call.samples,
            slots=arrays.slots,
            filters=arrays.filters,
            dtype=self._dtype,
            platform=platform,
        )
        progress = jax.tree.map(
            shape, prefill.out_info, decoding.shardings(self._mesh, prefill.out_info)
        )
        until = jax.ShapeDtypeStruct((), np.int32, sharding=everywhere)
        decode = lower(
            decoding.advance,
            self._mesh,
            self._model,
            params,
            asked,
            progress,
            until,
            filters=arrays.filters,
            platform=platform,
        )
        return Lowered(prefill, decode, progress, tokens.shape, len(calls))

    def _finish(
        self,
        params: Any,
        asked: decoding.Rows,
        progress: decoding.Progress,
        each: Sequence,
        slots: int,
        filters: frozenset[str],
    ) -> tuple[decoding.Progress, Mapping[int, tuple[int, str]]]:
        """Advance to the end, looking for stop strings in between where any row has one."""
        if not any(request.stop for request, _ in each) and jax.process_count() == 1:
            return decoding.advance(
                self._model, params, asked, progress, np.int32(slots), filters=filters
            ), {}
        cuts: dict[int, tuple[int, str]] = {}
        while True:
            self._cut(progress, each, cuts)
            done = local(progress.done).copy()
            done[list(cuts)] = True
            if int(local(progress.step)) >= slots or everywhere(bool(done.all())):
                return progress, cuts
            flags = put_batch(self._mesh, done) if self._mesh is not None else jnp.asarray(done)
            until = np.int32(min(slots, int(local(progress.step)) + _STOP_CHECK_TOKENS))
            progress = decoding.advance(
                self._model, params, asked, progress._replace(done=flags), until, filters=filters
            )

    def _cut(
        self, progress: decoding.Progress, each: Sequence, cuts: dict[int, tuple[int, str]]
    ) -> None:
        tokens, count = local(progress.tokens), local(progress.count)
        for row, (request, _) in enumerate(each):
            if request.stop and row not in cuts:
                cut = find_stop(
                    self._tokenizer,
                    request.prompt,
                    tokens[row, : count[row]].tolist(),
                    request.stop,
                )
                if cut is not None:
                    cuts[row] = cut

    def _collect(
        self,
        progress: decoding.Progress,
        each: Sequence,
        samples: int,
        cuts: Mapping[int, tuple[int, str]],
    ) -> list[list[Completion]]:
        tokens, count, stopped = (
            local(progress.tokens),
            local(progress.count),
            local(progress.stopped),
        )
        logps, drawn = local(progress.token_logps), local(progress.drawn_logps)
        found: list[list[Completion]] = []
        for row, (request, number) in enumerate(each):
            if row % samples == 0:
                found.append([])
            if number >= request.samples:
                continue
            n = int(count[row])
            if row in cuts:
                n, text = cuts[row]
            else:
                text = completion_text(self._tokenizer, request.prompt, tokens[row, :n].tolist())
            finish = "stop" if row in cuts or stopped[row] else "length"
            found[-1].append(
                Completion(
                    tokens[row, :n].copy(),
                    logps[row, :n].copy(),
                    drawn[row, :n].copy(),
                    text,
                    finish,
                )
            )
        return found


def ambient(mesh: jax.sharding.Mesh | None) -> Any:
    """Return a context in which this mesh, if it is one, is the ambient one."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def everywhere(flag: bool) -> bool:
    """Tell whether a flag is true in every process."""
    if jax.process_count() == 1:
        return flag
    return bool(np.all(multihost_utils.process_allgather(np.array(flag))))


def local(x: jax.Array) -> np.ndarray:
    """Fetch this process's rows of an array that is sharded over the rows (all of it with one
    process)."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x.addressable_data(0) if x.is_fully_replicated else x)
    shards = {shard.index[0].start or 0: shard for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])
