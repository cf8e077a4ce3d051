# SPDX-License-Identifier: Apache-2.0
"""What stands beside the policy's own samples, or in their place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int
from transformers import PreTrainedTokenizerBase

from align_jax.data import chat
from align_jax.inference.generate import Completion, completion_text


class Answers:
    """The data's own answers to prompts, in their order.

    Args:
        most: tokens of an answer that are kept.

    Attributes:
        truncated: answers that had more.
    """

    def __init__(self, most: int) -> None:
        self._most, self.truncated = most, 0
        self._found: list[tuple[Int[np.ndarray, "n"], Bool[np.ndarray, "n"], bool]] = []

    def add(self, tokens: chat.Tokens) -> None:
        """Take the next example's first response."""
        ids, mask = np.asarray(tokens.responses[0], np.int32), np.asarray(tokens.masks[0], np.bool_)
        whole = len(ids) <= self._most
        self.truncated += not whole
        self._found.append((ids[: self._most], mask[: self._most], whole))

    def completion(
        self, place: int, prompt: Int[np.ndarray, "p"], tokenizer: PreTrainedTokenizerBase
    ) -> Completion:
        """Return an answer as a completion; nobody drew it, so its log-probabilities are 0."""
        ids, mask, whole = self._found[place]
        zeros = np.zeros(len(ids), np.float32)
        text = completion_text(tokenizer, prompt.tolist(), ids.tolist())
        return Completion(ids, zeros, zeros, text, "stop" if whole else "length", mask)


def sampled_positions(positions: Sequence[int], share: float) -> list[int]:
    """Choose whose responses are sampled, another draw for each rollout: always as many.

    Args:
        positions: of this process's prompts in the stream.
        share: of them.

    >>> sampled_positions(range(8, 12), 0.5), sampled_positions(range(2), 1.0)
    ([9, 11], [0, 1])
    """
    chosen = np.random.default_rng(positions[0]).permutation(len(positions))
    return sorted(positions[i] for i in chosen[: round(share * len(positions))].tolist())
