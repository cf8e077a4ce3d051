# SPDX-License-Identifier: Apache-2.0
"""The TPU compiler, without a TPU: steps fit, hold no logits of whole rows, and move what their
mesh must move."""

from __future__ import annotations

import math
import pathlib
import runpy

import pytest
from ml_collections import ConfigDict

pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu")

from align_jax import plan
from align_jax.models.attention import ATTENTION
from align_jax.parallel.chips import GIB
from align_jax.planner.advice import advise
from align_jax.planner.cost_model import estimate, tree_bytes
from align_jax.planner.programs import train_program
from align_jax.planner.topology import describe_topology
from align_jax.training.flops import layer_weights

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
LLAMA_2_7B = dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=4096,
)
# No other axis has the vocabulary's size, or half of it: an array that has it holds logits or the
# head.
MODEL = dict(
    vocab_size=1536,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
)


def _config(name: str, argument: str = "", **changes):
    config = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](*[argument] * bool(argument))
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    return plan.for_planning(config)


def _small(**changes):
    return _config(
        "tiny",
        "dpo",
        **(
            {
                "model__config": ConfigDict(MODEL),
                "model__compute_dtype": "bfloat16",
                "model__remat": "full",
                "reference__dtype": "bfloat16",
                "batch_size": 8,
                "max_length": 512,
            }
            | changes
        ),
    )


def _estimate(config, name: str):
    topology = describe_topology(name)
    run = plan.make_run(config, topology)
    return run, estimate(train_program(run), topology, run.mesh)


def _moved(found, *kinds: str, axes: str | None = None) -> float:
    return sum(
        row["bytes"]
        for row in found.collectives
        if row["kind"] in kinds and axes in (None, row["axes"])
    )


def _no_whole_rows_of_logits(run, found) -> None:
    """No array but the head has a vocabulary axis and as many elements beside it as the device's
    rows have tokens."""
    sizes = run.mesh.shape
    rows = run.batch().tokens.shape[0] // math.prod(
        sizes[axis] for axis in ("data", "fsdp", "expert")
    )
    tokens = rows * run.batch().tokens.shape[1] // sizes["sequence"] // run.config.microbatches
    vocab = {run.spec.policy.config.vocab_rows // split for split in (1, sizes["tensor"])}
    beside = {
        shape: math.prod(shape) // max(vocab & set(shape))
        for _, shape, _ in found.largest
        if vocab & set(shape)
    }
    wrong = [
        shape
        for shape, count in beside.items()
        if count >= tokens and count != run.spec.policy.config.hidden_size
    ]
    assert not wrong, wrong


def test_a_small_model_moves_what_its_mesh_must_move_and_no_more():
    config = _small(mesh__fsdp=2, mesh__sequence=2, mesh__tensor=2)
    run, found = _estimate(config, "v5e:2x4")
    assert found.fits and run.config.model.attention == "splash" in ATTENTION
    assert not _moved(found, "all-to-all", "ragged-all-to-all"), found.collectives
    assert {row["axes"] for row in found.collectives} & {"fsdp", "tensor"}
    _no_whole_rows_of_logits(run, found)
    assert found.lower_bound.keys() == {"fsdp", "tensor", "sequence", "fsdp+sequence"}
    # sequence: gradients that are not scattered yet are summed over it, and hidden states at loss
    # positions gathered
    for axes, most in (("tensor", 1.1), ("fsdp", 1.3), ("sequence", 2.0)):
        moved = sum(row["bytes"] for row in found.collectives if row["axes"] == axes)
        assert 0.9 * found.lower_bound[axes] < moved < most * found.lower_bound[axes], (
            axes,
            found.lower_bound,
            found.collectives,
        )


def test_slices_exchange_gradients_only_and_shards_of_them():
    run, found = _estimate(_small(mesh__data=2, mesh__fsdp=4), "2*v5e:2x2")
    between = _moved(found, "all-reduce", axes="data")
    gradients = tree_bytes(run.specs.trained)  # of one device, float32
    assert 0.4 * gradients < between < 1.3 * gradients, (between, gradients, found.collectives)
    assert found.seconds["network"] > 0


def test_a_step_that_does_not_fit_says_by_how_much():
    config = _small(batch_size=16384, model__remat="none", mesh__fsdp=1)
    run, found = _estimate(config, "v5e:1x1")
    assert not found.fits and found.memory.used > 16 * GIB
    lines = advise(found, run.config, run.rows_a_device)
    assert "GiB too much" in lines[0] and any("microbatches" in line for line in lines)


def test_dpo_of_7b_fits_v5e_in_less_than_the_prototype():
    config = _config(
        "dpo_7b", batch_size=32, model__family="llama", model__config=ConfigDict(LLAMA_2_7B)
    )
    run, found = _estimate(config, "v5e:4x8")
    # the prototype's, with the same model, rows and tokens
    assert found.memory.used < 5.3 * GIB, found.memory
    _no_whole_rows_of_logits(run, found)
    assert not _moved(found, "all-to-all"), found.collectives
    weights = 2 * (layer_weights(run.spec.policy.config) + 2 * 4096 * 32000)  # bfloat16
    # gathered three times, reduced once
    assert found.lower_bound["fsdp"] == pytest.approx(4 * weights * 31 / 32, rel=1e-3)
    assert found.received < 1.25 * found.lower_bound["fsdp"], found.collectives
