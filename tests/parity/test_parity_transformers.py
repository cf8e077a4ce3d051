# SPDX-License-Identifier: Apache-2.0
"""DPO on real pairs with a real model: losses and rewards equal NumPy's from transformers'
logits."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from align_jax import losses
from align_jax.core.options import DataOptions
from align_jax.data import datasets, pipeline, tokenizer
from align_jax.data.layout import BatchSizes
from align_jax.interop import hf
from align_jax.models.model import build
from align_jax.training import steps

BETA = 0.1


def sequence_logps(folder, batch):
    """Sum the responses' log-probabilities from transformers' logits, in float64: [B, R]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(
            torch.tensor(batch.tokens, dtype=torch.long),
            attention_mask=torch.tensor(batch.segment_ids > 0),
        ).logits.double()
    logps = torch.log_softmax(logits[:, :-1], dim=-1).gather(
        2, torch.tensor(batch.tokens[:, 1:, None]).long()
    )[..., 0]
    return (logps.numpy() * batch.loss_mask[:, 1:]).sum(axis=1).reshape(batch.lengths.shape)


def test_dpo_on_real_pairs_equals_numpy_from_transformers_logits(testdata, tmp_path):
    folder = str(testdata / "models" / "TinyStories-656K")
    words = tokenizer.load_tokenizer(folder)
    pairs = datasets.load(
        str(testdata / "preference" / "hh_rlhf_harmless_test.jsonl.gz"),
        "pairs",
        DataOptions(),
        chat=False,
        limit=16,
    )
    batch = pipeline.make_pipeline(
        pairs, words, DataOptions(trim=False, shuffle=False), BatchSizes(16, 256)
    ).batch(0)
    config, params = hf.load(folder, dtype="float32")
    # a policy that is not the reference: the same weights, shaken
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    shaken = jax.tree.unflatten(
        tree,
        [leaf * (1 + 0.05 * jax.random.normal(key, leaf.shape)) for leaf, key in zip(leaves, keys)],
    )
    hf.save(str(tmp_path), config, shaken, dtype="float32")

    model, (term,) = build(config, compute_dtype="float32"), losses.resolve("dpo", {"beta": BETA})

    @jax.jit
    def ours(policy, reference, batch):
        outputs = [
            steps.forward(model, params, batch, chunk=64)[0] for params in (policy, reference)
        ]
        return term.loss.losses(losses.Inputs(batch, *outputs))

    found, metrics = ours(shaken, params, jax.tree.map(jnp.asarray, batch))
    ratios = sequence_logps(tmp_path, batch) - sequence_logps(folder, batch)
    expected = np.log1p(np.exp(-BETA * (ratios[:, 0] - ratios[:, 1])))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.ptp(expected) > 0.1  # the pairs do differ
    for column, name in enumerate(("chosen", "rejected")):
        total, count = metrics[f"rewards/{name}"]
        np.testing.assert_allclose(
            total / count, BETA * ratios[:, column].mean(), rtol=1e-4, atol=1e-5
        )
