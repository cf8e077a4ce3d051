# SPDX-License-Identifier: Apache-2.0
"""Evaluations of a policy: each a function from an EvaluatedPolicy and examples to numbers."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping


@dataclasses.dataclass(frozen=True)
class Eval:
    """A row of the table.

    Attributes:
        name: of its module in this folder, and of the function there.
        kind: of examples.
        takes: "" nothing more, "rewards" a weighted sum of rewards, "compare" a comparison of two
            answers.
        sampled: answers are sampled; else the data's are scored.
        head: what of the policy it asks: "" its words, "score" its rewards, "steps" those of steps.
    """

    name: str
    kind: str
    takes: str = ""
    sampled: bool = False
    head: str = ""

    @property
    def fn(self) -> Callable[..., dict[str, float]]:
        """The function of (policy, examples, [what it ``takes``], **options) to metric -> number;
        imported when it is asked for, because that takes seconds and the names alone none."""
        module = importlib.import_module(f"{__name__}.{self.name}")
        found: Callable[..., dict[str, float]] = getattr(module, self.name)
        return found


EVALS: Mapping[str, Eval] = {
    row.name: row
    for row in (
        Eval("preference", "pairs"),
        Eval("feedback", "unpaired"),
        Eval("reward", "pairs", head="score"),
        Eval("process", "stepwise", head="steps"),
        Eval("perplexity", "completions"),
        Eval("generation", "prompts", "rewards", sampled=True),
        Eval("pass_at_k", "prompts", "rewards", sampled=True),
        Eval("win_rate", "prompts", "compare", sampled=True),
    )
}
