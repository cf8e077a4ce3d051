# SPDX-License-Identifier: Apache-2.0
"""What to change so that a program fits, or does not gather for every token; the cheapest first."""

from __future__ import annotations

import collections
import math

from align_jax.core.options import Config
from align_jax.parallel.chips import GIB
from align_jax.planner.cost_model import CostEstimate

_OF_THE_PROGRAM = ("batch", "cache", "temporaries", "program")  # the rest is the run's


def advise(estimate: CostEstimate, config: Config, rows_a_device: float | int) -> list[str]:
    """Say what to change in a config; nothing where all is well.

    Args:
        estimate: of one of its programs.
        config: the config.
        rows_a_device: rows of a microbatch on one device.
    """
    if estimate.fits and estimate.name == "decode" and estimate.mesh["fsdp"] > 1:
        return [
            "gathers all weights for every token; config.rollout.tensor=4: four devices of a host "
            "hold a copy"
        ]
    if estimate.fits:
        return []
    memory, kinds = estimate.memory, collections.Counter(estimate.memory.kinds)
    used, capacity = memory.used, memory.capacity
    lines = [
        f"{estimate.name} needs {used / GIB:.2f} GiB of {capacity / GIB:.2f} GiB: "
        f"{-memory.free / GIB:.2f} GiB too much"
    ]
    static = used - sum(kinds[kind] for kind in _OF_THE_PROGRAM)
    if static < capacity:
        lines += _smaller_arrays(estimate.name, config, rows_a_device)
    if kinds["reference"] > 0.2 * capacity:
        lines.append("config.reference.mode=cached: no reference weights beside the policy")
    if kinds["optimizer"] + kinds["parameters"] > 0.5 * capacity and not config.model.lora.rank:
        lines.append("config.optimizer.moment_dtype=bfloat16: two bytes less a parameter")
        lines.append("config.model.lora.rank=16: train an adapter; base and reference are one copy")
    if static > 0.8 * capacity:
        chips = math.ceil(estimate.topology.chips * used / capacity)
        lines.append(f"a larger slice: at least {chips} chips, with mesh.fsdp=-1")
    return lines


def _smaller_arrays(name: str, config: Config, rows_a_device: float | int) -> list[str]:
    """Say what makes a program's own arrays smaller."""
    if name.startswith(("prefill", "decode")):
        return ["config.rollout.rows halved: fewer completions at a time, a smaller cache"]
    if name.startswith("reward "):
        return [f"config.rewards.{name.removeprefix('reward ')}.rows or .max_length halved"]
    if name == "eval":
        half = (config.eval.batch_size or config.batch_size) // 2
        return [f"config.eval.batch_size={half}: half the rows at a time"]
    lines = []
    if rows_a_device >= 2:
        lines.append(
            f"config.microbatches={config.microbatches * 2}: half the activations at a time"
        )
    if config.model.remat != "full" and name == "train":
        lines.append("config.model.remat=full: keep each layer's input only")
    if rows_a_device < 2:
        lines.append(
            "config.mesh.sequence or config.mesh.tensor doubled: split a row's activations"
        )
    return lines
