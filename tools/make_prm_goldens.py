# SPDX-License-Identifier: Apache-2.0
"""Make ``trl_process.npz``: what TRL's PRMTrainer makes of labeled steps, its loss and accuracy.

    python tools/make_prm_goldens.py

Needs ``pip install torch trl==1.9.0 datasets accelerate`` (later versions have no PRMTrainer); the
tests that read the file need none of them.

    rows (JSON): rows of labeled steps with what ``PRMTrainer.tokenize_row`` makes of them, where a
        byte is a token
    i/{policy,mask,step_labels}: scores [B, T] at the ends of steps; i/{loss,grad,accuracy}: of the
        token classifier that it trains, whose two logits differ by the score; ``cases`` (JSON) has
        their options
"""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers.loss.loss_utils import ForTokenClassification
from trl.experimental.prm.prm_trainer import PRMTrainer, compute_accuracy

SEED = 20240611
OUTPUT = pathlib.Path(__file__).parents[1] / "tests/golden/trl_process.npz"
BATCH, LENGTH = 5, 8
SUM = {"prompt": "2 + 2 + 2 ?", "completions": ["2 + 2 = 4", "4 + 2 = 7"], "labels": [True, False]}
UMLAUTS = {"prompt": "ä:", "completions": ["ö", "ü = 1", "so 1"], "labels": [True, True, False]}
ROWS = ((SUM, "\n"), (UMLAUTS, "\n"), (SUM, " ки\n"))


class Bytes:
    """A tokenizer of bytes, as PRMTrainer calls it."""

    bos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text, add_special_tokens)}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(text.encode())


def classify(columns: dict[str, np.ndarray], last: bool) -> dict[str, Any]:
    """Call the token classifier's loss, and the trainer's metric."""
    scores, mask = torch.tensor(columns["policy"]).requires_grad_(), columns["mask"]
    labels = np.where(mask, columns["step_labels"], -100).astype(np.int64)
    if last:  # as tokenize_row with train_on_last_step_only
        final = mask & (np.cumsum(mask[:, ::-1], axis=1)[:, ::-1] == 1)
        labels = np.where(final, labels, -100)
    logits = torch.stack([torch.zeros_like(scores), scores], dim=-1)
    loss = ForTokenClassification(logits, torch.tensor(labels), SimpleNamespace(num_labels=2))
    loss.backward()
    accuracy = compute_accuracy((logits.detach().numpy(), labels))["accuracy"]
    return {"loss": loss.item(), "grad": scores.grad.numpy(), "accuracy": accuracy}


def main() -> None:
    """Make all cases, at small and at large scores."""
    rng, cases, arrays = np.random.default_rng(SEED), [], {}
    for spread in (0.5, 8.0):
        for options in ({}, {"steps": "last"}):
            ends = rng.integers(3, LENGTH + 1, BATCH)[:, None]
            mask = (np.arange(LENGTH) % 3 != 0) & (np.arange(LENGTH) < ends)
            policy = np.where(mask, spread * rng.normal(size=mask.shape), 0).astype(np.float32)
            labels = np.where(mask, rng.integers(0, 2, mask.shape), 0).astype(np.float32)
            columns = {"policy": policy, "step_labels": labels, "mask": mask}
            found = columns | classify(columns, bool(options))
            arrays |= {f"{len(cases)}/{key}": value for key, value in found.items()}
            cases.append(options)
    rows = [
        {"row": row, "separator": separator}
        | PRMTrainer.tokenize_row(row, Bytes(), separator, None, None, False, False)
        for row, separator in ROWS
    ]
    versions = {name: importlib.metadata.version(name) for name in ("trl", "torch", "transformers")}
    header = {"versions": versions, "cases": cases, "rows": rows}
    np.savez_compressed(OUTPUT, header=np.array(json.dumps(header)), **arrays)


if __name__ == "__main__":
    main()
