# SPDX-License-Identifier: Apache-2.0
"""The table of objectives.  To add one: write its function, add a row here; the tests loop over the table."""
from __future__ import annotations

from typing import Any, Mapping, Sequence

from align_jax.losses import objective, preference, supervised
from align_jax.losses.objective import Objective, Term
from align_jax.losses.pairs import paired

_PAIRS: dict[str, Any] = {
    "data": "pairs", "reference": True, "metric": "rewards/accuracies up", "option_needs": {"wpo": ("log_sum_sq",)}}

OBJECTIVES: dict[str, Objective] = {
    "sft": Objective(
        supervised.sft, data="completions", formula="Σ -m a / Σ m over the global batch",
        paper="Ouyang et al. 2022, arXiv 2203.02155", metric="nll down"),
    "dpo": Objective(
        paired(preference.dpo), formula="-(1-ε) log σ(β d) - ε log σ(-β d) + sft_coef · NLL(chosen)",
        paper="arXiv 2305.18290", adds={"sft_coef": ("sft", 0.0)}, **_PAIRS),
}


def resolve(name: str, options: Mapping[str, Any] | None = None,
            weights: Sequence[float] | None = None) -> tuple[Term, ...]:
    """Turn "dpo+bco_pair+sft" with options and weights into terms; see ``objective.resolve``."""
    return objective.resolve(OBJECTIVES, name, options, weights)
