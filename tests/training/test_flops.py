# SPDX-License-Identifier: Apache-2.0
"""Operations counted from shapes agree with counts made by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import losses
from align_jax.core.options import ModelOptions, OptimizerOptions
from align_jax.data.layout import abstract_batch, mismatched_shape, one_group_shape
from align_jax.interop import hf
from align_jax.models.lora import LoraConfig
from align_jax.training import initialize, optim
from align_jax.training.flops import forward_flops, layer_weights, step_flops
from align_jax.training.steps import StepSpec

LLAMA_7B = dict(
    model_type="llama",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=4096,
)
TINY = dict(
    model_type="llama",
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
)


PLAIN = ModelOptions(compute_dtype="float32", remat="none", attention="xla")


def _step_spec(
    hf_config: dict,
    objective: str,
    *,
    remat: str = "full",
    lora: LoraConfig | None = None,
    microbatches: int = 1,
) -> StepSpec:
    terms = losses.resolve(objective, {}, None)
    models = initialize.make_models(
        hf.config_from(hf_config), terms, ModelOptions(remat=remat, attention="xla"), lora
    )
    adamw = OptimizerOptions(schedule="constant", clip_norm=0.0)
    schedule = optim.make_schedule(adamw, total_steps=10)
    return StepSpec(
        models.policy,
        models.base,
        terms,
        optim.make_optimizer(adamw, schedule, models.policy.roles()),
        schedule,
        microbatches=microbatches,
    )


def _batch(rows: int, length: int, positions: int, responses: int, kind: str):
    shape = one_group_shape(
        "plain",
        groups=rows // responses,
        responses=responses,
        prompt=length - positions,
        response=positions,
    )
    return abstract_batch(shape, "plain", kind)


def test_a_7b_dpo_step_agrees_with_the_hand_count():
    flops = step_flops(_step_spec(LLAMA_7B, "dpo"), _batch(64, 1024, 512, 2, "pairs"))
    assert (
        layer_weights(hf.config_from(LLAMA_7B))
        == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
        == 6_476_005_376
    )
    layers = 2 * 6_476_005_376 * 1024
    attention = 32 * 4 * 4096 * (1024 * 1025 // 2)  # causal: each query sees half the row
    head = 2 * 4096 * 32000 * 512
    one = layers + attention + head  # a forward pass over one response
    assert flops.model == pytest.approx(32 * 2 * (3 + 1) * one, rel=1e-6)
    assert flops.policy == 3 * flops.reference
    assert flops.recomputed == pytest.approx(64 * one, rel=1e-6)
    # the usual 8 N tokens, N with the embedding: leaves attention out and the head on prompts in
    assert flops.model == pytest.approx(8 * 6_738_415_616 * 64 * 1024, rel=0.02)


def test_a_matrix_product_is_counted_as_the_compiler_counts_it():
    spec = _step_spec(TINY, "sft", remat="none")
    # the compiler counts a scanned layer once
    config = hf.config_from(TINY | {"num_hidden_layers": 1})
    model = initialize.make_models(config, spec.terms, PLAIN).policy
    ids = jnp.zeros((4, 32), jnp.int32)

    def run(params):
        return model.unembed(params, model.hidden(params, ids, ids + 1, ids)[0])

    counted = jax.jit(run).lower(model.shapes()).compile().cost_analysis()["flops"]
    ours = forward_flops(model, rows=4, length=32, positions=32)
    # plain attention does not skip what the mask hides
    whole = ours.layers + 2 * ours.attention + ours.head
    assert 1.0 < counted / whole < 1.25  # norms, rotary angles, softmax and activations besides


@pytest.mark.parametrize("window, pairs", [(0, 32 * 33 / 2), (8, 8 * 9 / 2 + 24 * 8)])
def test_attention_counts_what_the_mask_shows(window, pairs):
    config = hf.config_from(TINY | {"model_type": "mistral", "sliding_window": window or None})
    model = initialize.make_models(config, losses.resolve("sft", {}, None), PLAIN).policy
    assert forward_flops(model, rows=3, length=32, positions=0).attention == 3 * 2 * 4 * 16 * pairs


def test_packed_rows_attend_within_segments_only():
    model = _step_spec(TINY, "sft").policy
    plain, packed = (
        forward_flops(model, rows=1, length=64, positions=0, segment_length=part)
        for part in (None, 16)
    )
    assert packed.attention / plain.attention == pytest.approx(17 / 65)


def test_an_adapter_saves_the_gradients_of_the_weights():
    full, adapted = (
        step_flops(_step_spec(LLAMA_7B, "dpo", lora=lora), _batch(2, 1024, 512, 2, "pairs"))
        for lora in (None, LoraConfig(16))
    )
    assert adapted.policy / full.policy == pytest.approx(2 / 3, rel=0.03)
    assert adapted.reference == full.reference


def test_statistics_of_the_whole_batch_cost_a_forward_only_where_there_are_microbatches():
    shape = one_group_shape("plain", groups=8, responses=1, prompt=16, response=16)
    batch = abstract_batch(
        shape, "plain", "unpaired", mismatched=mismatched_shape(shape, length=32, longest=32)
    )
    one, four = (step_flops(_step_spec(TINY, "kto", microbatches=parts), batch) for parts in (1, 4))
    # mismatched rows always; the rows themselves again for four
    assert four.statistics > one.statistics > 0
    np.testing.assert_allclose(four.statistics - one.statistics, one.policy / 3)


@pytest.mark.parametrize("remat", ["none", "dots", "attention", "full"])
def test_rematerialization_is_not_the_models_work(remat):
    batch = _batch(8, 32, 16, 2, "pairs")
    base, other = (
        step_flops(_step_spec(TINY, "dpo", remat=name), batch) for name in ("none", remat)
    )
    assert base.model == other.model
    assert base.recomputed <= other.recomputed
