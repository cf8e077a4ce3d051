# SPDX-License-Identifier: Apache-2.0
"""Our training of a tiny Llama follows TRL's trainers: the same batches, the same AdamW, 20 steps,
float32."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import losses
from align_jax.core.options import ModelOptions, OptimizerOptions
from align_jax.core.schema import Batch
from align_jax.interop import hf
from align_jax.training import optim, steps
from align_jax.training.initialize import make_models

FOLDER = pathlib.Path(__file__).parents[1] / "golden" / "trl_trajectories"
with np.load(FOLDER / "trajectories.npz") as _file:
    ARRAYS = dict(_file)
HEADER = json.loads(ARRAYS.pop("header").item())
OPTIONS = {
    "dpo": ("dpo", {"beta": 0.1}),
    "kto": ("kto", {"beta": 0.1, "desirable_weight": 1.2, "undesirable_weight": 0.9}),
    "reward": ("reward", {"center_coef": 0.01}),
}


def make_batch(tokens, attention, mask, responses, **fields):
    """Make a plain batch (one response a row) of what TRL collated: [N, T], padded on the right."""
    rows, length = tokens.shape
    indices = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    mask = mask.astype(bool)
    lengths = mask.sum(1).astype(np.int32).reshape(-1, responses)
    last = attention.sum(1).astype(np.int32).reshape(-1, responses) - 1
    loss_index = np.sort(np.where(mask, indices, length), axis=1).astype(np.int32)
    batch = Batch(
        tokens=tokens.astype(np.int32),
        segment_ids=attention.astype(np.int32),
        positions=indices,
        source_index=np.maximum(indices - 1, 0),
        loss_mask=mask,
        slot=np.zeros(tokens.shape, np.int32),
        loss_index=loss_index,
        lengths=lengths,
        weight=np.ones(len(lengths), np.float32),
        last_index=last,
        **fields,
    )
    return jax.tree.map(jnp.asarray, batch)


def interleaved(x):
    """[2 B, T], the chosen ones first -> each chosen one followed by its rejected one."""
    return np.stack(np.split(x, 2), axis=1).reshape(x.shape)


def batch_of(method, step):
    """Turn TRL's inputs of a step into our batch."""
    x = {
        key.split("/")[1]: value[step]
        for key, value in ARRAYS.items()
        if key.startswith(f"{method}/")
    }
    if method == "kto":
        mismatched = make_batch(
            x["KL_input_ids"], x["KL_attention_mask"], x["KL_completion_mask"], 1
        )
        return make_batch(
            x["input_ids"],
            x["attention_mask"],
            x["completion_mask"],
            1,
            label=x["label"],
            mismatched=mismatched,
        )
    tokens, attention = interleaved(x["input_ids"]), interleaved(x["attention_mask"])
    mask = (
        interleaved(x["completion_mask"])
        if method == "dpo"
        else attention * (np.arange(tokens.shape[1]) > 0)
    )
    return make_batch(tokens, attention, mask, 2)


@pytest.mark.parametrize("method", OPTIONS)
def test_losses_of_twenty_steps_equal_trl(method):
    name, options = OPTIONS[method]
    terms = losses.resolve(name, options)
    config = hf.load_config(str(FOLDER / ("reward" if method == "reward" else "causal")))
    policy, base, _ = make_models(
        config, terms, ModelOptions(compute_dtype="float32", remat="none")
    )
    heads = ("score",) if method == "reward" else ()
    folder = str(FOLDER / ("reward" if method == "reward" else "causal"))
    params = hf.load(folder, dtype=jnp.float32, heads=heads, unembed=method != "reward")[1]
    with_adam = HEADER["optimizer"]
    adamw = OptimizerOptions(
        learning_rate=with_adam["learning_rate"],
        schedule="constant",
        weight_decay=with_adam["weight_decay"],
        clip_norm=with_adam["max_grad_norm"],
        b1=with_adam["adam_beta1"],
        b2=with_adam["adam_beta2"],
        eps=with_adam["adam_epsilon"],
    )
    schedule = optim.make_schedule(adamw, total_steps=20)
    optimizer = optim.make_optimizer(adamw, schedule, policy.roles())
    spec = steps.StepSpec(policy, base, terms, optimizer, schedule)
    state = steps.init_state(spec, params)
    frozen = {"base": {} if method == "reward" else params}
    step = jax.jit(lambda state, frozen, batch: steps.train_step(spec, state, frozen, batch))
    found = []
    for i in range(len(ARRAYS[f"{method}/loss"])):
        state, metrics = step(state, frozen, batch_of(method, i))
        found.append(float(metrics["loss"]))
    np.testing.assert_allclose(found, ARRAYS[f"{method}/loss"], rtol=1e-4)
