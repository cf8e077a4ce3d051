# SPDX-License-Identifier: Apache-2.0
"""Write the loss of TRL's GKDTrainer and its gradient for made logits, for the tests to compare
with.

    python tools/make_trl_divergence.py         (with TRL 1.16 and torch)
"""

from __future__ import annotations

import importlib.metadata
import json
import pathlib

import numpy as np
import torch
from trl.experimental.gkd.gkd_trainer import GKDTrainer

OUTPUT = pathlib.Path(__file__).parents[1] / "tests/golden/trl_divergence.npz"
SEED, ROWS, LENGTH, VOCABULARY = 0, 3, 6, 11
CASES = [
    {"beta": beta, "temperature": temperature, "spread": spread}
    for spread in (1.0, 3.0)
    for beta, temperature in ((0.0, 1.0), (1.0, 1.0), (0.5, 1.0), (0.1, 0.7), (0.9, 2.0))
]


def main() -> None:
    """Make all cases: logits that differ a little, and much."""
    rng = np.random.default_rng(SEED)
    arrays = {}
    for index, case in enumerate(CASES):
        teacher = rng.normal(size=(ROWS, LENGTH, VOCABULARY)).astype(np.float32)
        noise = case["spread"] * rng.normal(size=teacher.shape)
        student = torch.tensor(teacher + noise.astype(np.float32), requires_grad=True)
        mask = np.arange(LENGTH) < rng.integers(2, LENGTH + 1, ROWS)[:, None]
        loss = GKDTrainer.generalized_jsd_loss(
            student,
            torch.tensor(teacher),
            labels=torch.tensor(np.where(mask, 1, -100)),
            beta=case["beta"],
            temperature=case["temperature"],
        )
        loss.backward()
        found = {"student": student.detach().numpy(), "teacher": teacher, "mask": mask}
        found |= {"loss": np.float32(loss.item()), "grad": student.grad.numpy()}
        arrays |= {f"{index}/{name}": x for name, x in found.items()}
    versions = {name: importlib.metadata.version(name) for name in ("trl", "torch", "numpy")}
    arrays["cases"] = np.array(json.dumps({"versions": versions, "seed": SEED, "cases": CASES}))
    np.savez_compressed(OUTPUT, **arrays)
    print(f"{OUTPUT.name}: {len(CASES)} cases, {OUTPUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
