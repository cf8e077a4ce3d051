# SPDX-License-Identifier: Apache-2.0
"""Evaluations of a policy: each a function from an EvaluatedPolicy and examples to numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from align_jax.evals.generation import generation
from align_jax.evals.pass_at_k import pass_at_k
from align_jax.evals.perplexity import perplexity
from align_jax.evals.preference import preference
from align_jax.evals.process import process
from align_jax.evals.reward import reward
from align_jax.evals.win_rate import win_rate


@dataclasses.dataclass(frozen=True)
class Eval:
    """A row of the table.

    Attributes:
        fn: (policy, examples, [what it ``takes``], **options) -> metric -> number.
        kind: of examples.
        takes: "" nothing more, "rewards" a weighted sum of rewards, "compare" a comparison of two
            answers.
        sampled: answers are sampled; else the data's are scored.
        head: what of the policy it asks: "" its words, "score" its rewards, "steps" those of steps.
    """

    fn: Callable[..., dict[str, float]]
    kind: str
    takes: str = ""
    sampled: bool = False
    head: str = ""


EVALS: Mapping[str, Eval] = {
    "preference": Eval(preference, "pairs"),
    "reward": Eval(reward, "pairs", head="score"),
    "process": Eval(process, "stepwise", head="steps"),
    "perplexity": Eval(perplexity, "completions"),
    "generation": Eval(generation, "prompts", "rewards", sampled=True),
    "pass_at_k": Eval(pass_at_k, "prompts", "rewards", sampled=True),
    "win_rate": Eval(win_rate, "prompts", "compare", sampled=True),
}
