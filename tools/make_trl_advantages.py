# SPDX-License-Identifier: Apache-2.0
"""Make ``trl_advantages.npz``: advantages that TRL's own code makes of several rewards.

    python tools/make_trl_advantages.py

Needs ``pip install torch trl==1.16.0 datasets accelerate``; the test that reads the file needs none
of them.  The lines of GRPOTrainer between the rewards and the advantages are taken from its source
and run as they are, on a stand-in that has the attributes they read.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import pathlib
import textwrap
from types import SimpleNamespace

import numpy as np
import torch
from trl.trainer import grpo_trainer

SEED = 20260105
OUTPUT = pathlib.Path(__file__).parents[1] / "tests/golden/trl_advantages.npz"
FIRST, LAST = "unscorable_mask = ", "# Slice to keep only the local part"
CASES = [
    {"multi_objective_aggregation": "normalize_then_sum", "weights": [1.0, 1.0]},
    {"multi_objective_aggregation": "normalize_then_sum", "weights": [1.0, 0.2, 3.0]},
    *(
        {"multi_objective_aggregation": "sum_then_normalize", "weights": [1.0, 0.5], "scale": scale}
        for scale in ("group", "batch", "none")
    ),
]


def advantages(each: np.ndarray, case: dict) -> np.ndarray:
    """Run TRL's lines on rewards [B, R, K]."""
    source = inspect.getsource(grpo_trainer.GRPOTrainer._generate_and_score_completions)
    begin = source.rindex("\n", 0, source.index(FIRST)) + 1
    lines = textwrap.dedent(source[begin : source.rindex("\n", 0, source.index(LAST))])
    me = SimpleNamespace(
        multi_objective_aggregation=case["multi_objective_aggregation"],
        scale_rewards=case.get("scale", "group"),
        reward_weights=torch.tensor(case["weights"]),
        reward_funcs=case["weights"],
    )
    names = {
        "self": me,
        "rewards_per_func": torch.tensor(each.reshape(-1, each.shape[-1])),
        "num_generations": each.shape[1],
        "device": "cpu",
    }
    exec(lines, vars(grpo_trainer) | names, names)  # TRL's own lines
    return names["advantages"].numpy().reshape(each.shape[:2])


def main() -> None:
    """Make all cases; in some a reward says nothing, of one response none says anything."""
    rng, arrays = np.random.default_rng(SEED), {}
    for number, case in enumerate(CASES):
        each = rng.normal(size=(6, 4, len(case["weights"]))).astype(np.float32)
        each[0, :, 0] = 0.5
        if number < 2:
            each[1, 2, 0] = each[2, :2, 1] = each[3, 3] = np.nan
        arrays |= {f"{number}/each": each, f"{number}/advantages": advantages(each, case)}
    versions = {name: importlib.metadata.version(name) for name in ("trl", "torch", "numpy")}
    arrays["cases"] = np.array(json.dumps({"versions": versions, "seed": SEED, "cases": CASES}))
    np.savez_compressed(OUTPUT, **arrays)
    print(f"{OUTPUT.name}: {len(CASES)} cases")


if __name__ == "__main__":
    main()
