# SPDX-License-Identifier: Apache-2.0
"""The data set as tokens: flat arrays with offsets, made once at the start and kept on disk.

With every length known before training, the packing, the drops, the budgets and the number of steps
are exact, and a batch costs a few copies.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm
from jaxtyping import Bool, Float, Int
from transformers import PreTrainedTokenizerBase

from align_jax.core.options import DataOptions
from align_jax.core.schema import Example
from align_jax.data import cache, chat
from align_jax.data.layout import TokenizedGroup
from align_jax.data.tokenizer import tokenizer_digest

VERSION = 5
_CHUNK = 1024  # examples tokenized at once
_EACH = 5_000  # examples for which another process is worth its start: seconds of its own


@dataclasses.dataclass(frozen=True)
class Encoded:
    """G groups of R responses as flat token arrays.

    Attributes:
        prompt_ids, prompt_ends: group g's prompt is
            ``prompt_ids[prompt_ends[g]:prompt_ends[g + 1]]``.
        response_ids, response_mask, response_ends: response r of group g is number ``g * R + r``.
        loss_tokens: how many tokens of each response are learned.
        last_turn: where the prompt's last turn begins, in tokens.
        header: how many tokens at the prompt's end ask for the answer.
        step_labels, step_ends: of group g's labeled steps,
            ``step_labels[step_ends[g]:step_ends[g + 1]]``.
        label, scores, margin, weight: as in Example; ``scores`` is NaN where there are none.
        prompt_key: equal for equal prompts.
        refused: the number of the reason why the chat template refused a group, whose tokens are
            then empty.
        reasons: by number; the first is "": not refused.
        notes: what the chat template makes otherwise of examples -> of how many.
    """

    prompt_ids: Int[np.ndarray, "p"]
    prompt_ends: Int[np.ndarray, "G1"]
    response_ids: Int[np.ndarray, "r"]
    response_mask: Bool[np.ndarray, "r"]
    response_ends: Int[np.ndarray, "GR1"]
    loss_tokens: Int[np.ndarray, "G R"]
    last_turn: Int[np.ndarray, "G"]
    header: Int[np.ndarray, "G"]
    step_labels: Float[np.ndarray, "s"]
    step_ends: Int[np.ndarray, "G1"]
    label: Bool[np.ndarray, "G"]
    scores: Float[np.ndarray, "G R"]
    margin: Float[np.ndarray, "G"]
    weight: Float[np.ndarray, "G"]
    prompt_key: Int[np.ndarray, "G"]
    refused: Int[np.ndarray, "G"]
    reasons: tuple[str, ...]
    notes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def groups(self) -> int:
        """The number of groups."""
        return len(self.weight)

    @property
    def responses(self) -> int:
        """The number of responses in a group."""
        return self.scores.shape[1]

    def prompt(self, group: int) -> Int[np.ndarray, "_"]:
        """Return a group's prompt."""
        return self.prompt_ids[self.prompt_ends[group] : self.prompt_ends[group + 1]]

    def response(
        self, group: int, index: int
    ) -> tuple[Int[np.ndarray, "_"], Bool[np.ndarray, "_"]]:
        """Return a response's tokens and loss mask."""
        number = group * self.responses + index
        part = slice(self.response_ends[number], self.response_ends[number + 1])
        return self.response_ids[part], self.response_mask[part]

    def group(self, group: int) -> TokenizedGroup:
        """Return a whole group."""
        responses = [self.response(group, index) for index in range(self.responses)]
        return TokenizedGroup(self.prompt(group), tuple(responses))


def encode_all(
    examples: Sequence[Any],  # a check of the elements' type would read them
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    *,
    digest: str = "",
    processes: int | None = None,
    unread: int | None = None,
) -> Encoded:
    """Tokenize all examples; those whose tokens are kept are not looked at.

    Args:
        examples: the examples, each with as many responses as the first.
        tokenizer: the tokenizer.
        options: ``cache`` and ``step_separator`` are read, and ``control_tokens``: R texts (or
            special tokens), put without loss before each response; or two for unpaired data: before
            desirable and before undesirable ones.
        digest: what the examples are made of (``Examples.digest``); part of the cache's key.
        processes: how many tokenize at once; None: one for every 5,000 examples, at most one a
            CPU.
        unread: a token that is left off the responses' ends: a reward model whose rows are filled
            with its end token gives its score before that (``inference.score.RewardModel``).

    Raises:
        ValueError: examples without responses or with unlike numbers of them, or one that cannot be
            rendered.
    """
    control = tuple(options.control_tokens)
    inputs = [VERSION, digest, tokenizer_digest(tokenizer), control, len(examples), options.invalid]
    inputs += [options.step_separator, unread]
    key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
    how = _How(tokenizer, control, options.invalid == "drop", options.step_separator, unread)

    def make() -> cache.Kept:
        return _encode_all(examples, how, processes)

    found = cache.keep(options.cache, f"tokens-{key[:24]}", make)
    told = found.notes
    return Encoded(**found.arrays, reasons=tuple(told["reasons"]), notes=told["notes"])


class _How(NamedTuple):
    """How examples become tokens: what a tokenizing process is told once."""

    tokenizer: PreTrainedTokenizerBase
    control: tuple[str, ...]
    drop: bool
    separator: str
    unread: int | None


def _encode_all(examples: Sequence[Any], how: _How, processes: int | None) -> cache.Kept:
    _check_responses(examples)
    _check_control(how.control, examples[0])
    if processes is None:
        processes = min(len(os.sched_getaffinity(0)), len(examples) // _EACH)
    with tqdm.tqdm(total=len(examples), desc="tokenizing", unit="examples", disable=None) as bar:
        parts: list[Mapping[str, np.ndarray]] = []
        reasons = {"": 0}
        notes: collections.Counter[str] = collections.Counter()
        for part, refusals, noted in _encoded_chunks(examples, how, processes):
            numbers = [reasons.setdefault(reason, len(reasons)) for reason in refusals]
            parts.append({**part, "refused": np.asarray(numbers, np.int32)})
            notes.update(noted)
            bar.update(len(numbers))
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for name in ("prompt_ends", "response_ends", "step_ends"):
        arrays[name] = np.concatenate([[0], np.cumsum(arrays[name])])  # of lengths
    return cache.Kept(arrays, {"reasons": list(reasons), "notes": dict(notes)})


def _check_responses(examples: Sequence[Any]) -> None:
    responses = len(examples[0].responses)
    if not responses:
        raise ValueError(
            f"{examples[0].source}: prompts without responses: they are for rollouts, not for "
            "batches"
        )
    for example in examples:
        if len(example.responses) != responses:
            raise ValueError(
                f"{example.source}: {len(example.responses)} responses, expected {responses} as in "
                "the first example; --config.data.responses=2 gives every ranking two (the best, "
                "the worst) and leaves those with fewer out"
            )


def _check_control(control: Sequence[str], example: Example) -> None:
    """Refuse control tokens that no response would get.

    Raises:
        ValueError: their number is not that of the responses (of labeled ones: two).
    """
    wanted = len(example.responses) if example.label is None else 2
    if control and len(control) != wanted:
        raise ValueError(
            f"config.data.control_tokens = {tuple(control)}: expected {wanted}, "
            + ("one a response" if example.label is None else "of desirable and undesirable ones")
        )


# Encoded's fields, lengths for ends; refusals; notes
_Part = tuple[dict[str, np.ndarray], list[str], collections.Counter[str]]


def _encoded_chunks(examples: Sequence[Any], how: _How, processes: int) -> Iterator[_Part]:
    starts = range(0, len(examples), _CHUNK)
    if processes < 2:
        for start in starts:
            yield _encode_chunk(examples[start : start + _CHUNK], how)
        return
    # spawned, not forked: the parent may hold an accelerator's threads
    with concurrent.futures.ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(how,),
    ) as pool:
        waiting: list[concurrent.futures.Future[_Part]] = []
        try:
            for start in starts:  # a few chunks ahead: what is made is taken as it comes
                with _without_main():
                    waiting.append(pool.submit(_encode_told, examples[start : start + _CHUNK]))
                if len(waiting) > 2 * processes:
                    yield waiting.pop(0).result()
            for future in waiting:
                yield future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise RuntimeError(
                "a process that tokenizes was ended from outside, perhaps for want of memory"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Hide the script from the processes that are spawned: they would run it again, and where it
    has no main guard they would spawn in turn."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


_TOLD: list[_How] = []  # a tokenizing process


def _start(how: _How) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _TOLD.append(how)


def _encode_told(chunk: Sequence[Example]) -> _Part:
    return _encode_chunk(chunk, _TOLD[0])


def _encode_chunk(chunk: Sequence[Example], how: _How) -> _Part:
    """Tokenize a chunk into the fields of Encoded, with lengths in the place of ends."""
    prompts, texts, masks, refusals = [], [], [], []
    made = chat.encode_many(chunk, how.tokenizer, drop=how.drop, separator=how.separator)
    steps = [[label for _, label in one.steps or () if label is not None] for one in chunk]
    for example, tokens in zip(chunk, made):
        refusals.append(tokens.refused)
        prompts.append(np.asarray(tokens.prompt, np.int32))
        for index, (ids, mask) in enumerate(zip(tokens.responses, tokens.masks)):
            lead = [] if tokens.refused else _control_ids(how, example, index)
            while len(ids) > 1 and ids[-1] == how.unread:
                ids, mask = ids[:-1], mask[:-1]
            texts.append(np.asarray(lead + ids, np.int32))
            masks.append(np.asarray([False] * len(lead) + mask, np.bool_))
    responses = len(chunk[0].responses)
    missing = (float("nan"),) * responses
    scores = np.asarray([example.scores or missing for example in chunk], np.float32)
    part: dict[str, np.ndarray] = {
        "prompt_ids": np.concatenate(prompts),
        "prompt_ends": np.asarray([len(ids) for ids in prompts], np.int64),
        "response_ids": np.concatenate(texts),
        "response_mask": np.concatenate(masks),
        "response_ends": np.asarray([len(ids) for ids in texts], np.int64),
        "loss_tokens": np.asarray([mask.sum() for mask in masks], np.int64).reshape(-1, responses),
        "last_turn": np.asarray([tokens.last_turn for tokens in made], np.int64),
        "header": np.asarray([tokens.header for tokens in made], np.int64),
        "step_labels": np.asarray([label for own in steps for label in own], np.float32),
        "step_ends": np.asarray([len(own) for own in steps], np.int64),
        "label": np.asarray([bool(example.label) for example in chunk], np.bool_),
        "scores": scores.reshape(-1, responses),
        "margin": np.asarray([example.margin for example in chunk], np.float32),
        "weight": np.asarray([example.weight for example in chunk], np.float32),
        "prompt_key": np.asarray([_key(prompt) for prompt in prompts], np.int64),
    }
    return part, refusals, collections.Counter(note for tokens in made for note in tokens.notes)


def _key(prompt: np.ndarray) -> int:
    found = hashlib.blake2b(prompt.tobytes(), digest_size=8).digest()
    return int.from_bytes(found, "little", signed=True)


def _control_ids(how: _How, example: Example, index: int) -> list[int]:
    if not how.control:
        return []
    which = index if example.label is None else int(not example.label)
    return list(how.tokenizer(how.control[which], add_special_tokens=False).input_ids)
