# SPDX-License-Identifier: Apache-2.0
"""The communication lower bound, against counts by hand."""

import numpy as np
import pytest

from align_jax import losses
from align_jax.core.options import ModelOptions, OptimizerOptions, ReferenceOptions
from align_jax.core.schema import Batch
from align_jax.interop import hf
from align_jax.models.lora import LoraConfig
from align_jax.parallel.mesh import make_mesh
from align_jax.planner import communication
from align_jax.training import initialize, optim
from align_jax.training.steps import StepSpec

L, D, H, K, h, F, V = 3, 64, 8, 4, 8, 128, 256
N, T, P = 16, 32, 16
MODEL = dict(
    model_type="llama",
    vocab_size=V,
    hidden_size=D,
    intermediate_size=F,
    num_hidden_layers=L,
    num_attention_heads=H,
    num_key_value_heads=K,
    head_dim=h,
    max_position_embeddings=64,
)
LAYERS = L * (2 * D * H * h + 2 * D * K * h + 3 * D * F)  # weights of all layers
HEADS = 2 * V * D  # embedding and output head
NORMS = (2 * L + 1) * D
MIXTURE = dict(MODEL, model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)


def bound(name="dpo", sizes=None, *, model=MODEL, rank=0, parts=1, remat="full", train=True):
    terms = losses.resolve(name, {})
    lora = LoraConfig(rank) if rank else None
    options = ModelOptions(compute_dtype="bfloat16", remat=remat, attention="xla")
    models = initialize.make_models(hf.config_from(model), terms, options, lora)
    adamw = OptimizerOptions(schedule="constant", clip_norm=0.0)
    schedule = optim.make_schedule(adamw, total_steps=10)
    spec = StepSpec(
        models.policy,
        models.base,
        terms,
        optim.make_optimizer(adamw, schedule, models.policy.roles()),
        schedule,
        microbatches=parts,
    )
    mesh = make_mesh(sizes)
    specs = initialize.make_state_specs(spec, mesh, options, ReferenceOptions(dtype="bfloat16"))
    by_token = np.zeros((N, T), np.int32)
    batch = Batch(*[by_token] * len(Batch._fields))._replace(
        loss_index=np.zeros((N, P), np.int32), reference_token_logps=None, mismatched=None
    )
    found = communication.lower_bound(
        communication.model_calls(spec, specs, batch, train=train),
        mesh.shape,
        specs.trained if train else (),
        parts,
    )
    return {axes: pytest.approx(size) for axes, size in found.items()}


def test_fsdp_gathers_weights_for_each_pass_and_scatters_gradients():
    weights = 2 * (LAYERS + HEADS) * 7 / 8  # bytes of them, less what is here
    norms = {"fsdp": 2 * 7 / 8 * 2 * NORMS}  # replicated, so their gradients are summed
    # policy twice, reference, gradient
    assert bound(sizes={"fsdp": 8}) == {"fsdp": 4 * weights + norms["fsdp"]}
    assert bound("simpo", {"fsdp": 8}) == {"fsdp": 3 * weights + norms["fsdp"]}
    assert bound("simpo", {"fsdp": 8}, remat="none") == {"fsdp": 2 * weights + norms["fsdp"]}
    assert bound(sizes={"fsdp": 8}, parts=4) == {"fsdp": 16 * weights + norms["fsdp"]}
    assert bound(sizes={"fsdp": 8}, train=False) == {"fsdp": 2 * weights}


def test_copies_of_the_weights_sum_their_gradients_once():
    size = 2 * (LAYERS + HEADS + NORMS)
    assert bound("simpo", {"data": 8}, parts=2) == {"data": 2 * 7 / 8 * size}
    found = bound("simpo", {"data": 2, "fsdp": 4})
    assert found == {
        "fsdp": 3 * 2 * (LAYERS + HEADS) * 3 / 4,
        "data": (2 * 1 / 2) * 2 * (LAYERS + HEADS) / 4,
        "data+fsdp": 2 * 7 / 8 * 2 * NORMS,
    }


def test_tensor_sums_states_twice_a_layer_and_pass():
    states, positions = N * T * D * 2, N * P * D * 2
    # forward; attention's again, for the feed-forward part; backward
    sums = {"full": 2 + 1 + 2, "dots": 2 + 2}
    for remat, count in sums.items():
        moved = states * (L * count + 1) + positions
        found = bound("simpo", {"tensor": 4, "data": 2}, remat=remat)
        assert found["tensor"] == 2 * 3 / 4 * moved / 2  # half of the rows


def test_sequence_gathers_keys_and_values_and_scatters_their_gradients():
    keys = 2 * N * T * K * h * 2 * L
    found = bound("dpo", {"sequence": 4, "data": 2})
    assert found["sequence"] == 3 / 4 * keys / 2 * (3 + 1)  # policy, again, backward; reference
    assert found["data+sequence"] == 2 * 7 / 8 * 2 * (LAYERS + HEADS + NORMS)


def test_experts_gather_tokens_and_scatter_what_they_add():
    states = N * T * D * 2 / 8
    found = bound("simpo", {"expert": 4, "fsdp": 2}, model=MIXTURE)
    # bytes of what experts share, the router with it
    others = 2 * (LAYERS - L * 3 * D * F + HEADS + L * D * 4) / 2
    assert found["expert"] == states * L * 3 * (2 + 1 + 2) + 2 * 3 / 4 * others
    assert found["fsdp+expert"] == 2 * 7 / 8 * 2 * NORMS


def test_an_adapter_s_gradient_alone_is_scattered():
    weights = 2 * (LAYERS + HEADS) * 7 / 8
    found = bound(sizes={"fsdp": 8}, rank=2)["fsdp"]
    assert found.expected == pytest.approx(3 * weights, rel=0.05) and found.expected > 3 * weights
