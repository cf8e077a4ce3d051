# SPDX-License-Identifier: Apache-2.0
"""Evaluations of a policy: each a function from an EvaluatedPolicy and examples to numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from align_jax.evals.generation import generation
from align_jax.evals.perplexity import perplexity
from align_jax.evals.preference import preference
from align_jax.evals.win_rate import win_rate


@dataclasses.dataclass(frozen=True)
class Eval:
    """A row of the table.

    Attributes:
        fn: (policy, examples, [what it ``takes``], **options) -> metric -> number.
        kind: of examples.
        takes: "" nothing more, "rewards" a weighted sum of rewards, "compare" a comparison of two
            answers.
    """

    fn: Callable[..., dict[str, float]]
    kind: str
    takes: str = ""


EVALS: Mapping[str, Eval] = {
    "preference": Eval(preference, "pairs"),
    "perplexity": Eval(perplexity, "completions"),
    "generation": Eval(generation, "prompts", "rewards"),
    "win_rate": Eval(win_rate, "prompts", "compare"),
}
