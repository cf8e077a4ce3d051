# SPDX-License-Identifier: Apache-2.0
"""Labeled steps become tokens, and scores at their ends a loss, as in TRL's PRMTrainer."""

import json
import pathlib

import jax
import numpy as np
import pytest

from align_jax import losses
from align_jax.core.options import DataOptions
from align_jax.data import encoding, formats
from align_jax.data.tokenizer import load_tokenizer
from align_jax.losses import arrays

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "trl_process.npz"
with np.load(GOLDEN) as _file:
    ARRAYS = dict(_file)
HEADER = json.loads(ARRAYS.pop("header").item())


@pytest.mark.parametrize("one", HEADER["rows"])
def test_steps_are_tokenized_and_labeled_as_trl_does(one):
    tokenizer = load_tokenizer("byte")
    (example,) = formats.read(one["row"], "stepwise", chat=False)
    options = DataOptions(step_separator=one["separator"])
    encoded = encoding.encode_all([example], tokenizer, options)
    ids, mask = encoded.response(0, 0)
    whole = np.concatenate([encoded.prompt(0), ids])
    text = tokenizer.decode(whole, skip_special_tokens=True)
    assert list(text.encode()) == one["input_ids"]
    labels = np.full(len(ids), -100)
    labels[mask] = encoded.step_labels
    assert labels.tolist() == one["labels"][-len(ids) :]
    assert set(one["labels"][: -len(ids)]) == {-100}


@pytest.mark.parametrize("index", range(len(HEADER["cases"])))
def test_loss_gradient_and_accuracy_equal_trl(index):
    options = HEADER["cases"][index]
    found = {key: ARRAYS[f"{index}/{key}"] for key in ("mask", "step_labels")}
    terms = losses.resolve("reward_process", options)

    def f(policy):
        inputs = arrays.make_inputs(terms, "stepwise", {"policy": policy, **found})
        evaluated = arrays.evaluate(terms, inputs)
        return evaluated.loss, evaluated.metrics

    (loss, metrics), grad = jax.value_and_grad(f, has_aux=True)(
        jax.numpy.asarray(ARRAYS[f"{index}/policy"])
    )
    np.testing.assert_allclose(loss, ARRAYS[f"{index}/loss"], rtol=1e-5)
    np.testing.assert_allclose(grad, ARRAYS[f"{index}/grad"], rtol=1e-5, atol=1e-6)
    if not options:  # TRL's accuracy is that of the steps that are learned
        np.testing.assert_allclose(metrics["accuracy"], ARRAYS[f"{index}/accuracy"], rtol=1e-6)
