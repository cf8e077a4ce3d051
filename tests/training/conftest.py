# SPDX-License-Identifier: Apache-2.0
"""A tiny Llama, batches of random tokens, and a few steps over any mesh: compiled once for each setting."""
import functools

import jax
import numpy as np
import pytest

from align_jax import losses
from align_jax.core.schema import Batch
from align_jax.models import hf
from align_jax.models.lora import LoraConfig
from align_jax.parallel.mesh import make_mesh
from align_jax.parallel.sharding import put_batch
from align_jax.training import assembly, optim, placement
from align_jax.training.steps import Recipe

CONFIG = hf.config_from(dict(model_type="llama", vocab_size=64, hidden_size=16, intermediate_size=32,
                             num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                             max_position_embeddings=32))


def random_batch(seed: int, *, responses: int = 2, groups: int = 16, length: int = 12, kind: str = "pairs") -> Batch:
    """Rows of one response each, of random lengths, the last group a filler."""
    rng = np.random.default_rng(seed)
    rows = groups * responses
    index = np.broadcast_to(np.arange(length), (rows, length)).astype(np.int32)
    ends, starts = rng.integers(6, length + 1, (rows, 1)), rng.integers(2, 5, (rows, 1))
    real = index < ends
    loss_mask = real & (index >= starts)
    order = np.argsort(~loss_mask, axis=1, kind="stable").astype(np.int32)
    counts = loss_mask.sum(axis=1)
    weight = np.ones(groups, np.float32)
    weight[-1] = 0.0
    last = (ends[:, 0] - 1).astype(np.int32).reshape(groups, responses)
    return Batch(
        tokens=np.where(real, rng.integers(1, 64, (rows, length)), 0).astype(np.int32),
        segment_ids=real.astype(np.int32), positions=np.where(real, index, 0).astype(np.int32),
        source_index=np.maximum(index - 1, 0), loss_mask=loss_mask, slot=np.zeros((rows, length), np.int32),
        loss_index=np.where(np.arange(length)[None] < counts[:, None], order, length).astype(np.int32),
        lengths=counts.reshape(groups, responses).astype(np.int32), weight=weight, last_index=last,
        label=rng.random(groups) < 0.6 if kind == "unpaired" else None,
        mismatched=random_batch(seed + 1000, responses=1, groups=groups, length=length) if kind == "unpaired" else None)


@functools.cache
def steps_of(name: str, mesh: tuple = (), microbatches: int = 1, rank: int = 0, devices: int = 1, steps: int = 3,
             options: tuple = (), optimizer: str = "adamw", **recipe_options):
    """Train for a few steps; return (each step's metrics, the trained parameters, the compiled step, its parts)."""
    terms = losses.resolve(name, dict(options))
    lora = LoraConfig(rank) if rank else None
    models = assembly.make_models(CONFIG.padded(dict(mesh).get("tensor", 1)), terms, compute_dtype="float32",
                                  remat="full", attention="xla", lora=lora)
    schedule = optim.make_schedule(learning_rate=1e-2, schedule="constant", total_steps=10)
    recipe = Recipe(models.policy, models.base, terms, optim.make_optimizer(schedule, name=optimizer, clip_norm=1.0),
                    schedule, microbatches=microbatches, chunk=4, **recipe_options)
    device_mesh = make_mesh(dict(mesh) or {"data": 1}, jax.devices()[:devices])
    kind = terms[0].objective.data
    with jax.set_mesh(device_mesh):
        plan = assembly.make_plan(recipe, device_mesh, param_dtype="float32", frozen_dtype="float32")
        frozen = assembly.load_frozen(recipe, plan, path="", seed=0)
        state = assembly.first_state(recipe, plan, assembly.load_trained(recipe, plan, frozen, path="", seed=0))
        step = placement.jit_train_step(recipe, plan.state, device_mesh)
        metrics = []
        for number in range(steps):
            batch = put_batch(device_mesh, random_batch(number, responses=1 if kind == "unpaired" else 2, kind=kind))
            with jax.transfer_guard("disallow"):
                state, values = step(state, frozen, batch)
            metrics.append({key: float(value) for key, value in values.items()})
        return metrics, jax.device_get(state["params"]), step, (plan, recipe, device_mesh, batch)


@pytest.fixture(scope="session")
def train_steps():
    return steps_of


@pytest.fixture(scope="session")
def make_batch():
    return random_batch
