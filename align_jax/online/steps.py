# SPDX-License-Identifier: Apache-2.0
"""Process rewards: what a process reward model says of each step of a completion.

    "4 + 3 = 7\\n7 + 5 = 2\\n" ─ split_steps ─► steps, and where each ends in the text
        ─ the model, read at the separators as it was trained ─► a reward a step
        ─ token_places ─► the policy's own token that each step ends with

A completion is split at the separator; a piece of white space alone is no step, nor is the rest of
a completion that was cut off.  The last step of one that ended by itself needs no separator: its
reward stands at the completion's last token.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from transformers import PreTrainedTokenizerBase

from align_jax.core.choose import choose
from align_jax.core.schema import Example
from align_jax.data.tokenizer import load_tokenizer
from align_jax.inference.generate import Completion, completion_text
from align_jax.inference.score import RewardModel
from align_jax.online.functions import Extras, RewardFunction, Scores

StepRewards = list[tuple[int, float]]  # of a completion: where each step ends, and its reward
StepFunction = Callable[[Sequence[str], Sequence[str], Extras], list[StepRewards]]
Scorer = Callable[[Sequence[Example], str], list[Float[np.ndarray, "s"]]]  # RewardModel.steps


def _probability(scores: Float[np.ndarray, "s"]) -> Float[np.ndarray, "s"]:
    return 0.5 * (1.0 + np.tanh(0.5 * scores.astype(np.float64)))


FORMS: Mapping[str, Callable[..., Float[np.ndarray, "s"]]] = {
    "probability": _probability,
    "signed": lambda scores: 2.0 * _probability(scores) - 1.0,
    "logit": np.asarray,
}
AGGREGATES: Mapping[str, Callable[..., Any]] = {
    "min": np.min,
    "product": np.prod,
    "mean": np.mean,
    "last": lambda rewards: rewards[-1],
}


@dataclasses.dataclass(frozen=True)
class StepReward:
    """A reward that stands at the ends of steps.

    Attributes:
        fn: gives each completion's steps, in their order.
        separator: between steps.
    """

    fn: StepFunction
    separator: str


def split_steps(text: str, separator: str, finished: bool) -> list[tuple[str, int]]:
    """Cut a completion into steps.

    Args:
        text: of it.
        separator: between steps.
        finished: it ended by itself, so that what follows the last separator is a step.

    Returns:
        Each step's text, and the character that its separator ends before; of a last step without
        separator one more than there are.

    >>> split_steps("a\\n\\nbc\\nd", "\\n", True), split_steps("a\\nb", "\\n", False)
    ([('a', 2), ('bc', 6), ('d', 8)], [('a', 2)])
    """
    *whole, rest = text.split(separator)
    found, end = [], 0
    for piece in whole:
        end += len(piece) + len(separator)
        found.append((piece, end))
    if finished:
        found.append((rest, len(text) + 1))
    return [(piece, end) for piece, end in found if piece.strip()]


def token_places(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    completion: Completion,
    steps: StepRewards,
) -> list[int]:
    """Return which of a completion's tokens each step ends with: of a last step without separator
    the very last one.  A token may end several steps."""
    tokens, text = completion.tokens.tolist(), completion.text

    places, first = [], 1
    for end, _ in steps:
        if end > len(text):
            places.append(len(tokens) - 1)
            break
        start = text[:end]

        def has(count: int, start: str = start) -> bool:
            return completion_text(tokenizer, prompt, tokens[:count]).startswith(start)

        # the fewest tokens whose text has the step; all of them, where fewer have not
        first += bisect.bisect_left(range(first, len(tokens)), True, key=has)
        places.append(first - 1)
    return places


def process(
    path: str,
    separator: str = "",
    form: str = "probability",
    aggregate: str = "",
    rows: int = 16,
    max_length: int = 0,
    compute_dtype: str = "float32",
    *,
    load_model: Callable[..., Any],
    mesh: Mesh | None = None,
) -> RewardFunction | StepReward:
    """Score each step by a process reward model, trained by ``reward_process``.

    Args:
        path: directory or hub id of its checkpoint.
        separator: behind each step; "" = the one that it was trained with, which its checkpoint
            says where ``align_jax.export`` has written it.
        form: of a step's reward: the "probability" that it is right, from 0 to 1; "signed", the
            same from -1 to 1; or its "logit".
        aggregate: "": each reward stands at its step's end, which policy gradients on rollouts
            learn from; "min", "product", "mean" or "last" of the steps' rewards: one number a
            completion, as other rewards are.
        rows: texts scored at once.
        max_length: tokens of a prompt with its completion; 0 = the model's positions.
        compute_dtype: of weights and activations; the head is always float32.
        load_model: reads the checkpoint; given by the program.
        mesh: where its weights lie and its forwards run; given by the program.

    Raises:
        ValueError: an unknown form or aggregate, a product of what is no probability, a checkpoint
            that is no process reward model's, or no separator.
    """
    choose(FORMS, form, "form")
    if aggregate:
        choose(AGGREGATES, aggregate, "aggregate")
    if aggregate == "product" and form != "probability":
        raise ValueError(f"aggregate = 'product' is of probabilities; got form = {form!r}")
    how = {"compute_dtype": compute_dtype, "max_length": max_length}
    loaded = load_model(path, mesh=mesh, heads=("score",), steps=True, **how)
    said = json.loads(loaded.model.config.hf).get("step_separator", "")
    if separator and said and separator != said:
        raise ValueError(
            f"separator = {separator!r}: the process reward model {path} was trained with {said!r} "
            "behind each step; leave it at ''"
        )
    separator = separator or said
    if not separator:
        raise ValueError(
            f"the process reward model {path} does not say what stands behind each step, by which "
            "the steps of a completion are told apart: name it by separator"
        )
    scorer = RewardModel(
        loaded, load_tokenizer(path), rows=rows, max_length=max_length or None, mesh=mesh
    )
    fn = _step_function(scorer.steps, scorer.chat, separator, form)
    return _aggregated(fn, aggregate) if aggregate else StepReward(fn, separator)


def _step_function(scorer: Scorer, takes_turns: bool, separator: str, form: str) -> StepFunction:
    """Make what scores each completion's steps."""

    def score(
        prompts: Sequence[str], completions: Sequence[str], extras: Extras
    ) -> list[StepRewards]:
        examples, ends = [], []
        for prompt, completion, row in zip(prompts, completions, extras, strict=True):
            turns = takes_turns and "messages" in row
            steps = split_steps(completion, separator, bool(row.get("finished", True)))
            texts = [text for text, _ in steps]
            if turns and texts:  # templates strip an answer
                texts[0], texts[-1] = texts[0].lstrip(), texts[-1].rstrip()
            # a label says that a step's end is to be read
            labeled = tuple((text, 1.0) for text in texts)
            examples.append(Example(tuple(row["messages"]) if turns else prompt, (), steps=labeled))
            ends.append([end for _, end in steps])
        return [
            list(zip(own, FORMS[form](scores).tolist())) if len(scores) else []
            for own, scores in zip(ends, scorer(examples, separator))
        ]

    return score


def _aggregated(fn: StepFunction, aggregate: str) -> RewardFunction:
    """Make one number of each completion's steps; None of one without steps."""

    def score(prompts: Sequence[str], completions: Sequence[str], extras: Extras) -> Scores:
        return [
            float(AGGREGATES[aggregate]([reward for _, reward in steps])) if steps else None
            for steps in fn(prompts, completions, extras)
        ]

    return score


def check_separator(separator: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a policy can write what stands between steps.

    Raises:
        ValueError: its tokenizer does not give the separator back: special tokens, or characters
            that it does not know.
    """
    ids = tokenizer(f"a{separator}b", add_special_tokens=False).input_ids
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if separator not in text:
        raise ValueError(
            f"the process rewards' steps are told apart by {separator!r}, which the policy's "
            "tokenizer cannot write: no completion would have a step's end; train the process "
            "reward model with a data.step_separator of plain text"
        )
