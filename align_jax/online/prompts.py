# SPDX-License-Identifier: Apache-2.0
"""The prompts of online learning: tokenized once, drawn in an endless seeded order."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from align_jax.core.schema import Example
from align_jax.data import batching, chat


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, size: int) -> Int[np.ndarray, "n"]:
    return np.random.default_rng((seed, epoch)).permutation(size)


class Prompts:
    """Prompts by their place in an endless stream; each epoch has an order of its own.

    Args:
        examples: of kind "prompts".
        tokenizer: the policy's.
        max_length: tokens of a prompt with its completion.
        max_new_tokens: tokens kept free for the completion.
        truncation: of prompts that are too long: "keep_start", "keep_end", or "drop" the prompt.
        seed: of the order.
        shuffle: a new order each epoch; else the data's own.

    Attributes:
        report: counts of truncated and dropped prompts.
        longest: tokens of the longest prompt.

    Raises:
        ValueError: no room for a prompt, or none left.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        max_new_tokens: int,
        truncation: str = "keep_end",
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        if max_new_tokens >= max_length:
            raise ValueError(
                f"rollout.max_new_tokens = {max_new_tokens} leaves no room for a "
                "prompt in max_length = "
                f"{max_length} tokens"
            )
        self._seed, self._shuffle = seed, shuffle
        self._kept: list[tuple[Example, Int[np.ndarray, "p"]]] = []
        truncated = 0
        for example, tokens in zip(examples, chat.encode_many(examples, tokenizer)):
            ids = np.asarray(tokens.prompt, np.int32)
            cut = batching.truncate(
                len(ids),
                [max_new_tokens],
                turn=tokens.turn,
                tail=tokens.tail,
                max_length=max_length,
                bos=bool(len(ids)) and int(ids[0]) == tokenizer.bos_token_id,
                policy=truncation,
                max_prompt_length=max_length - max_new_tokens,
            )
            if cut.reason or not len(ids):
                continue
            kept = batching.cut_prompt(ids, cut)
            truncated += len(kept) < len(ids)
            self._kept.append((example, kept))
        if not self._kept:
            raise ValueError(
                f"no prompts left of {len(examples)}: all are empty or longer than "
                "max_length - "
                f"max_new_tokens = {max_length - max_new_tokens} tokens"
            )
        self.report = {
            "prompts": len(self._kept),
            "truncated prompts": int(truncated),
            "dropped prompts": len(examples) - len(self._kept),
        }
        self.longest = max(len(ids) for _, ids in self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def number(self, place: int) -> int:
        """Return which prompt stands at a place of the stream."""
        epoch, index = divmod(place, len(self._kept))
        if not self._shuffle:
            return index
        return int(_order(self._seed, epoch, len(self._kept))[index])

    def __getitem__(self, place: int) -> tuple[Example, Int[np.ndarray, "p"]]:
        """Return the prompt at a place of the stream, as an example and as token ids."""
        return self._kept[self.number(place)]

    def seed(self, place: int) -> int:
        """Return the seed of the draws at a place of the stream."""
        return int(np.random.SeedSequence((self._seed, place)).generate_state(1)[0])
