# SPDX-License-Identifier: Apache-2.0
"""An online run of two processes is that of one: the same samples, rewards and updates.

Its weights are dealt out anew for generation, two devices of a process to a copy, and an
environment answers: episodes end after one turn, or two.
"""

import json

import processes
import pytest


def run(folder, count):
    arguments = [
        "--config=configs/tiny.py:grpo",
        f"--workdir={folder}",
        "--config.total_steps=2",
        "--config.batch_size=4",
        "--config.rollout.responses_per_prompt=2",
        "--config.rollout.max_new_tokens=24",
        "--config.rollout.max_turn_tokens=6",
        "--config.rollout.max_turns=2",
        "--config.rollout.environment=tests.faults.answers:odd",
        "--config.max_length=64",
        "--config.rewards={'length': {'target': 3, 'unit': 'characters'}}",
        "--config.model.config.hidden_size=32",
        "--config.model.config.intermediate_size=32",
        "--config.log.every_steps=1",
        "--config.rollout.log_samples_every_steps=1",
        "--config.rollout.tensor=2",
        "--config.rollout.normalize_scores=True",  # by moments of both processes' scores
    ]
    log = folder.with_suffix(".log")
    started = processes.fork("align_jax.train", arguments, count, devices=4 // count, log=log)
    processes.wait(started, log, seconds=600)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_online_as_one_does(tmp_path):
    alone, together = (run(tmp_path / f"run{count}", count) for count in (1, 2))
    compared = (
        "reward",
        "reward_std",
        "completions/mean_length",
        "completions/clipped_ratio",
        "environment/turns",
    )
    # steps', held-out prompts'
    kinds = [(*compared, "grad_norm"), tuple(f"eval/{name}" for name in compared)]
    # held out, two steps, held out
    assert [kinds[0][0] in row for row in alone] == [False, True, True, False]
    for one, both in zip(alone, together, strict=True):
        for name in kinds["eval/reward" in one]:
            assert both[name] == pytest.approx(one[name], rel=1e-4), name
