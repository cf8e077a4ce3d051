# SPDX-License-Identifier: Apache-2.0
"""Make ``trl_experimental.npz``: losses and gradients of TRL's experimental trainers on random
token log-probabilities: BCO with underlying distribution matching, XPO, Nash-MD, MiniLLM.

    python tools/make_trl_experimental_goldens.py

Needs ``pip install torch trl==1.9.0 datasets accelerate scikit-learn joblib`` (later versions have
none of these trainers); the tests that read the file need none of them.  Its layout is that of
``trl_objectives.npz``.  What is not TRL's as it stands:

    bco: the density ratios are a column ``weight``; ``embeddings`` and ``labels`` are of the pool
        that its classifier was fitted on, whose first rows are the batch's
    xpo: a group holds the policy's sample, then the reference's
    minillm: TRL lets the gradient through the advantages, which the paper does not: they are
        detached here.  With ``single_step`` its sums begin at the token itself, the paper's behind
        it: here they are TRL's, moved by a token.
"""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import trl
from make_trl_goldens import Accelerator, draw, rollout
from sklearn.linear_model import LogisticRegression
from trl.experimental.bco.bco_trainer import BCOTrainer, RunningMoments
from trl.experimental.minillm.minillm_trainer import MiniLLMTrainer
from trl.experimental.nash_md.nash_md_trainer import NashMDTrainer
from trl.experimental.xpo.xpo_trainer import XPOTrainer

SEED = 20261127
OUTPUT = pathlib.Path(__file__).parents[1] / "tests/golden/trl_experimental.npz"
BATCH, LENGTH, POOL, WIDTH, VOCABULARY = 6, 8, 40, 3, 7
Found = tuple[dict[str, np.ndarray], torch.Tensor, torch.Tensor]  # columns, loss, policy


def bco(rng: np.random.Generator, options: dict[str, Any], spread: float) -> Found:
    """Call BCOTrainer.bco_loss, with its classifier's weights where they are asked for."""
    columns = draw(rng, BATCH, LENGTH, spread=spread)
    labels = np.arange(POOL) % 3 != 1
    embeddings = rng.normal(size=(POOL, WIDTH)) + 0.5 * labels[:, None] * np.array([1, -1, 0])
    columns["label"], wanted = labels[:BATCH], torch.tensor(labels[:BATCH])
    policy = torch.tensor(columns["policy"]).requires_grad_()
    accelerator = Accelerator()
    accelerator.use_distributed, accelerator.process_index = False, 0
    me = SimpleNamespace(
        accelerator=accelerator,
        beta=options.get("beta", 0.1),
        running=RunningMoments(accelerator),
        args=SimpleNamespace(min_density_ratio=0.5, max_density_ratio=10.0),
        match_underlying_distribution=options.get("density_ratio", False),
        embedding_tokenizer=SimpleNamespace(pad_token_id=0),
        clf=LogisticRegression(class_weight="balanced").fit(embeddings, labels),
    )
    me._get_chosen_prob = lambda x: BCOTrainer._get_chosen_prob(me, x)
    me._get_udm_weight = lambda x: BCOTrainer._get_udm_weight(me, x)
    batch = torch.tensor(embeddings[:BATCH])
    sums, base = policy.sum(-1), torch.tensor(columns["reference"]).sum(-1)
    losses, *_ = BCOTrainer.bco_loss(
        me, sums[wanted], sums[~wanted], base[wanted], base[~wanted], batch[wanted], batch[~wanted]
    )
    if me.match_underlying_distribution:
        weight = np.ones(BATCH)
        weight[~columns["label"]] = me._get_udm_weight(batch[~wanted]).numpy()
        columns |= {"weight": weight.astype(np.float32), "embeddings": embeddings, "labels": labels}
    return columns, losses.nanmean(), policy


def xpo(rng: np.random.Generator, options: dict[str, Any], spread: float) -> Found:
    """Call XPOTrainer._compute_losses."""
    columns = draw(rng, BATCH, 2, LENGTH, spread=spread)
    columns["scores"] = rng.normal(size=(BATCH, 2)).astype(np.float32)
    policy = torch.tensor(columns["policy"]).requires_grad_()
    base, wins = (
        torch.tensor(columns["reference"]),
        columns["scores"][:, 0] > columns["scores"][:, 1],
    )
    me = SimpleNamespace(
        beta=options.get("beta", 0.1),
        alpha=options.get("alpha", 1e-5),
        args=SimpleNamespace(loss_type=options.get("form", "sigmoid")),
    )
    loss, *_ = XPOTrainer._compute_losses(
        me, policy[:, 0], policy[:, 1], base[:, 1], base[:, 0], torch.tensor(wins)
    )
    return columns, loss, policy


def nash_md(rng: np.random.Generator, options: dict[str, Any], spread: float) -> Found:
    """Call NashMDTrainer._compute_losses."""
    columns = draw(rng, BATCH, 1, LENGTH, spread=spread)
    columns["scores"] = rng.uniform(size=(BATCH, 1)).astype(np.float32)
    policy = torch.tensor(columns["policy"]).requires_grad_()
    me = SimpleNamespace(beta=options.get("beta", 0.1))
    loss, *_ = NashMDTrainer._compute_losses(
        me,
        policy[:, 0],
        torch.tensor(columns["reference"][:, 0]),
        torch.tensor(columns["scores"][:, 0]),
    )
    return columns, loss, policy


def minillm(rng: np.random.Generator, options: dict[str, Any], spread: float) -> Found:
    """Call MiniLLMTrainer._compute_advantage and _single_step_decomposition_loss, and the loss of
    GRPOTrainer that it inherits; all responses are of one length, as TRL counts padding."""
    shape = (3, 2, LENGTH)
    columns = draw(rng, *shape, spread=spread)
    full = draw(rng, *shape, spread=spread)
    while not full["mask"].all():  # draw until the rest has tokens too: what is masked is 0
        more = draw(rng, *shape, spread=spread)
        for name in ("policy", "reference"):
            full[name] = np.where(full["mask"], full[name], more[name])
        full["mask"] |= more["mask"]
    columns |= full
    old = columns["policy"] + spread * rng.normal(size=shape)
    columns["old_token_logps"] = np.minimum(old, 0).astype(np.float32)
    columns["entropy"] = np.zeros(shape, np.float32)
    student, teacher = (
        torch.log_softmax(torch.tensor(rng.normal(size=(*shape, VOCABULARY))), -1) for _ in range(2)
    )
    me = SimpleNamespace(
        gamma=options.get("gamma", 1.0),
        length_normalization=options.get("length_normalization", True),
    )
    rows = [torch.tensor(columns[name].reshape(-1, LENGTH)) for name in ("policy", "reference")]
    ours = MiniLLMTrainer._compute_advantage(me, *rows).numpy()
    if options.get("single_step", True):
        ours = np.concatenate([ours[:, 1:], np.zeros_like(ours[:, :1])], axis=1)
    given = np.broadcast_to(rng.normal(size=(3, 2, 1)), shape).astype(np.float32)
    columns["advantages"] = given + ours.reshape(shape)
    chosen = {"loss_type": "bnpo", "epsilon_low": options.get("epsilon", 0.2)}
    found = rollout(columns, "grpo", chosen, by_token=True)
    columns["advantages"] = given
    total = torch.tensor(found["loss"])
    if options.get("single_step", True):
        parts = MiniLLMTrainer._single_step_decomposition_loss(me, student, teacher, reduction="no")
        columns["divergence"] = parts.sum(-1).numpy().astype(np.float32)
        ones = torch.ones(shape, dtype=torch.bool)
        total = total + MiniLLMTrainer._single_step_decomposition_loss(me, student, teacher, ones)
    policy = torch.tensor(columns["policy"])
    policy.grad = torch.tensor(found["grad"])
    return columns, total, policy


CASES: list[tuple[Any, dict[str, Any]]] = [
    (bco, {}),
    (bco, {"density_ratio": True}),
    (bco, {"density_ratio": True, "beta": 0.5}),
    (xpo, {}),
    (xpo, {"beta": 0.5, "alpha": 0.1}),
    (xpo, {"form": "ipo", "beta": 0.3, "alpha": 0.01}),
    (nash_md, {}),
    (nash_md, {"beta": 0.7}),
    (minillm, {}),
    (minillm, {"gamma": 0.7, "epsilon": 0.05}),
    (minillm, {"length_normalization": False}),
    (minillm, {"single_step": False}),
    (minillm, {"single_step": False, "gamma": 0.8}),
    (minillm, {"single_step": False, "length_normalization": False}),
]


def main() -> None:
    """Make all cases, at small and at large log-ratios."""
    rng = np.random.default_rng(SEED)
    cases, arrays = [], {}
    for spread in (0.05, 0.8):
        for make, options in CASES:
            columns, loss, policy = make(rng, options, spread)
            if loss.requires_grad:
                loss.backward()
            columns.pop("log_sum_sq")
            index = len(cases)
            cases.append({"name": make.__name__, "options": options, "columns": sorted(columns)})
            arrays |= {f"{index}/{key}": value for key, value in columns.items()}
            grad = np.where(columns["mask"], policy.grad.numpy(), 0).astype(np.float32)
            arrays |= {f"{index}/loss": np.float32(loss.item()), f"{index}/grad": grad}
    packages = ("trl", "torch", "scikit-learn", "numpy")
    versions = {package: importlib.metadata.version(package) for package in packages}
    arrays["cases"] = np.array(json.dumps({"versions": versions, "seed": SEED, "cases": cases}))
    np.savez_compressed(OUTPUT, **arrays)
    size = OUTPUT.stat().st_size
    print(f"{OUTPUT.name}: {len(cases)} cases, trl {trl.__version__}, {size} bytes")


if __name__ == "__main__":
    main()
