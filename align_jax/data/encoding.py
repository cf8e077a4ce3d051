# SPDX-License-Identifier: Apache-2.0
"""The data set as tokens: flat arrays with offsets, made once at the start and kept on disk.

With every length known before training, the packing, the drops, the budgets and the number of steps
are exact, and a batch costs a few copies.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from transformers import PreTrainedTokenizerBase

from align_jax.core.files import read_arrays
from align_jax.core.options import DataOptions
from align_jax.core.schema import Example
from align_jax.data import chat
from align_jax.data.layout import TokenizedGroup
from align_jax.data.tokenizer import tokenizer_digest

VERSION = 2
_CHUNK = 1024  # examples tokenized at once
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """G groups of R responses as flat token arrays.

    Attributes:
        prompt_ids, prompt_ends: group g's prompt is
            ``prompt_ids[prompt_ends[g]:prompt_ends[g + 1]]``.
        response_ids, response_mask, response_ends: response r of group g is number ``g * R + r``.
        last_turn: where the prompt's last turn begins, in tokens.
        header: how many tokens at the prompt's end ask for the answer.
        label, scores, margin, weight: as in Example; ``scores`` is NaN where there are none.
        prompt_key: equal for equal prompts.
        refused: why the chat template refused a group, whose tokens are then empty; else "".
    """

    prompt_ids: Int[np.ndarray, "p"]
    prompt_ends: Int[np.ndarray, "G1"]
    response_ids: Int[np.ndarray, "r"]
    response_mask: Bool[np.ndarray, "r"]
    response_ends: Int[np.ndarray, "GR1"]
    last_turn: Int[np.ndarray, "G"]
    header: Int[np.ndarray, "G"]
    label: Bool[np.ndarray, "G"]
    scores: Float[np.ndarray, "G R"]
    margin: Float[np.ndarray, "G"]
    weight: Float[np.ndarray, "G"]
    prompt_key: Int[np.ndarray, "G"]
    refused: np.ndarray

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
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    *,
    responses: int,
    digest: str = "",
    processes: int | None = None,
) -> Encoded:
    """Tokenize all examples.

    Args:
        examples: the examples, each with ``responses`` responses.
        tokenizer: the tokenizer.
        options: ``cache`` is read, and ``control_tokens``: R texts (or special tokens), put without
            loss before each response; or two for unpaired data: before desirable and before
            undesirable ones.
        responses: R.
        digest: what the examples are made of (``Examples.digest``); part of the cache's key.
        processes: how many tokenize at once; None: one for every 20,000 examples, at most one a
            CPU.

    Raises:
        ValueError: an example of another number of responses, or one that cannot be rendered.
    """
    path, control = "", list(options.control_tokens)
    if options.cache:
        inputs = [VERSION, digest, tokenizer_digest(tokenizer), responses, control, len(examples)]
        inputs += [options.invalid]
        key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
        path = os.path.join(options.cache, f"tokens-{key[:24]}.npz")
        if (found := _load(path)) is not None:
            return found
    if processes is None:
        processes = min(os.cpu_count() or 1, len(examples) // 20_000)
    drop = options.invalid == "drop"
    encoded = _encode_all(examples, tokenizer, responses, control, processes, drop)
    if path:
        _save(path, encoded)
    return encoded


def _encode_all(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    responses: int,
    control: Sequence[str],
    processes: int,
    drop: bool,
) -> Encoded:
    prompts, texts, masks, turns, headers, refused = [], [], [], [], [], []
    made = _tokens(examples, tokenizer, responses, processes, drop)
    for example, tokens in zip(examples, made):
        refused.append(tokens.refused)
        prompts.append(np.asarray(tokens.prompt, np.int32))
        turns.append(tokens.last_turn)
        headers.append(tokens.header)
        for index, (ids, mask) in enumerate(zip(tokens.responses, tokens.masks)):
            lead = [] if tokens.refused else _control_ids(tokenizer, control, example, index)
            texts.append(np.asarray(lead + ids, np.int32))
            masks.append(np.asarray([False] * len(lead) + mask, np.bool_))
    missing = (float("nan"),) * responses
    scores = np.asarray([example.scores or missing for example in examples], np.float32)
    return Encoded(
        prompt_ids=_flat(prompts, np.int32),
        prompt_ends=_ends(prompts),
        response_ids=_flat(texts, np.int32),
        response_mask=_flat(masks, np.bool_),
        response_ends=_ends(texts),
        last_turn=np.asarray(turns, np.int64),
        header=np.asarray(headers, np.int64),
        label=np.asarray([bool(example.label) for example in examples], np.bool_),
        scores=scores.reshape(len(examples), responses),
        margin=np.asarray([example.margin for example in examples], np.float32),
        weight=np.asarray([example.weight for example in examples], np.float32),
        prompt_key=np.asarray([_key(prompt) for prompt in prompts], np.int64),
        refused=np.asarray(refused, np.str_),
    )


def _key(prompt: np.ndarray) -> int:
    found = hashlib.blake2b(prompt.tobytes(), digest_size=8).digest()
    return int.from_bytes(found, "little", signed=True)


def _tokens(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    responses: int,
    processes: int,
    drop: bool,
) -> Iterator[chat.Tokens]:
    for example in examples:
        if len(example.responses) != responses:
            raise ValueError(
                f"{example.source}: {len(example.responses)} responses, expected {responses} as in "
                "the first example; --config.data.responses=2 gives every ranking two (the best, "
                "the worst) and leaves those with fewer out"
            )
    chunks = [examples[start : start + _CHUNK] for start in range(0, len(examples), _CHUNK)]
    if processes < 2:
        for chunk in chunks:
            yield from chat.encode_many(chunk, tokenizer, drop=drop)
        return
    # spawned, not forked: the parent may hold an accelerator's threads
    with concurrent.futures.ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(tokenizer, drop),
    ) as pool:
        for made in pool.map(_encode_chunk, chunks):
            yield from made


_TOKENIZER: list[tuple[PreTrainedTokenizerBase, bool]] = []  # of a tokenizing process


def _start(tokenizer: PreTrainedTokenizerBase, drop: bool) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _TOKENIZER.append((tokenizer, drop))


def _encode_chunk(chunk: Sequence[Example]) -> list[chat.Tokens]:
    tokenizer, drop = _TOKENIZER[0]
    return chat.encode_many(chunk, tokenizer, drop=drop)


def _control_ids(
    tokenizer: PreTrainedTokenizerBase, control: Sequence[str], example: Example, index: int
) -> list[int]:
    if not control:
        return []
    which = index if example.label is None else int(not example.label)
    if which >= len(control):
        raise ValueError(
            f"{example.source}: {len(example.responses)} responses, but control tokens for "
            f"{len(control)}"
        )
    return list(tokenizer(control[which], add_special_tokens=False).input_ids)


def _flat(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts])


def _ends(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)


def _save(path: str, encoded: Encoded) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=os.path.dirname(path), delete=False) as file:
        np.savez(file, **dataclasses.asdict(encoded))
    os.replace(file.name, path)  # another process may be writing the same file


def _load(path: str) -> Encoded | None:
    try:
        found = Encoded(**read_arrays(path))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:  # TypeError: arrays of other names
        _log.warning("the token cache is set aside and made anew: %s", error)
        os.replace(path, f"{path}.damaged")
        return None
    return found
