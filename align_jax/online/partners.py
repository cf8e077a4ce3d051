# SPDX-License-Identifier: Apache-2.0
"""What stands beside the policy's own samples, or in their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from transformers import PreTrainedTokenizerBase

from align_jax.core.options import RolloutOptions
from align_jax.data import chat
from align_jax.inference.engines import Engine
from align_jax.inference.generate import Completion, completion_text, stop_tokens


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
        ends = stop_tokens(tokenizer)
        text = completion_text(tokenizer, prompt.tolist(), ids.tolist(), ends)
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


def others(options: RolloutOptions) -> int:
    """Return how many responses to a prompt meet the policy's samples; under "auto", which an
    objective has not yet decided, none."""
    samples = options.responses_per_prompt
    return {"auto": 0, "none": 0, "data": 1}.get(options.against, samples)


def needs_no_reward(kind: str, options: RolloutOptions, rewards: bool) -> bool:
    """Tell whether a run is online for what its samples meet alone: the data's answer, which is
    better than any of them.

    Args:
        kind: of data that is learned from.
        options: the rollout's.
        rewards: whether there are any.

    Raises:
        ValueError: what the samples meet is not better by itself, and there is no reward.
    """
    if options.against in ("auto", "none") or rewards:
        return False
    if options.against != "data" or kind not in ("pairs", "unpaired", "ranked"):
        raise ValueError(
            f"config.rollout.against = {options.against!r} compares scores: config.rewards must "
            "name at least one reward"
        )
    if kind != "unpaired" and options.responses_per_prompt != 1:
        raise ValueError(
            f"config.rollout.responses_per_prompt = {options.responses_per_prompt}: without "
            "config.rewards no sample is worse than another: set it to 1"
        )
    return True


def check_against(kind: str, options: RolloutOptions, learns_opponent: bool) -> None:
    """Refuse what does not go with another player, or has no effect with it.

    Args:
        kind: of data that is learned from.
        options: the rollout's, ``against`` resolved.
        learns_opponent: whether the reference's own samples are learned (XPO).

    Raises:
        ValueError: the key, and what to give instead.
    """
    default, against = RolloutOptions(), options.against
    if options.mixture != default.mixture and against != "mixture":
        raise ValueError(
            f"config.rollout.mixture = {options.mixture:g} has no effect with "
            f"config.rollout.against = {against!r}"
        )
    if learns_opponent and against != "reference":
        raise ValueError(
            f"config.rollout.against = {against!r}: the objective's exploration term is of samples "
            "of the reference: leave it at 'auto'"
        )
    if against == "none":
        return
    if kind == "completions":
        raise ValueError(
            f"config.rollout.against = {against!r}: the objective learns one response of each "
            "prompt, and compares none; for gkd see config.objective.on_policy"
        )
    refused = ["environment", "tries"] + ["pairing"] * (kind == "pairs")
    refused += ["min_difference", "threshold"] * (against == "data")
    for key in refused:
        if (value := getattr(options, key)) != getattr(default, key):
            raise ValueError(
                f"config.rollout.{key} = {value!r} does not go with config.rollout.against = "
                f"{against!r}: leave it at {getattr(default, key)!r}"
            )


class Opponent(NamedTuple):
    """Another player that samples.

    Attributes:
        engine: what generates.
        mixes: whether it is a mixture with the policy, else the reference itself.
    """

    engine: Engine
    mixes: bool

    def update(self, policy: Any, reference: Any) -> None:
        """Take the newest weights."""
        both = {"first": policy, "second": reference}
        self.engine.update(both if self.mixes else reference)


def judge(
    scores: Float[np.ndarray, "Q m"], options: RolloutOptions, *, wins: bool, judged: bool = False
) -> tuple[Float[np.ndarray, "Q k"], Float[np.ndarray, "Q k"]]:
    """Turn the scores of samples, and of what they meet, into what is learned.

    Args:
        scores: of the policy's samples, then of the others.
        options: the rollout's.
        wins: score a sample by the probability to win, σ(score - the other's), and leave the others
            out; else the others are learned too.
        judged: the scores are such probabilities already.

    Returns:
        The scores, and what they are selected by: in it the data's answer is better than any
        sample.

    >>> scores = np.array([[1.0, 3.0, 1.0]], np.float32)
    >>> options = RolloutOptions(responses_per_prompt=2, against="data")
    >>> judge(scores, options, wins=True)[0].tolist()
    [[0.5, 0.8807970881462097]]
    >>> judge(scores, options, wins=False)[1].tolist()
    [[1.0, 3.0, inf]]
    """
    n = options.responses_per_prompt
    if not others(options):
        return scores, scores
    if wins and judged:
        return scores[:, :n], scores[:, :n]
    if wins:
        gaps = (scores[:, :n] - scores[:, n:]).astype(np.float64)
        found = (0.5 * (1.0 + np.tanh(0.5 * gaps))).astype(np.float32)
        return found, found
    by = scores.copy()
    if options.against == "data":
        by[:, n:] = np.inf
    return scores, by
