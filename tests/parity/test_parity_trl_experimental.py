# SPDX-License-Identifier: Apache-2.0
"""BCO, XPO, Nash-MD and MiniLLM equal TRL 1.9's experimental trainers: losses and gradients."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import losses
from align_jax.data import density
from align_jax.losses import arrays

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "trl_experimental.npz"
with np.load(GOLDEN) as _file:
    ARRAYS = dict(_file)
HEADER = json.loads(ARRAYS.pop("cases").item())
CASES = HEADER["cases"]
ADVICE = (
    "our loss and TRL {trl}'s differ: find out which formula is right; "
    "tools/make_trl_experimental_goldens.py made the golden"
).format(**HEADER["versions"])


def label(index):
    case = CASES[index]
    return f"{index}-{case['name']}-{case['options']}"


@pytest.mark.parametrize("index", range(len(CASES)), ids=label)
def test_loss_and_gradient_equal_trl(index):
    case = CASES[index]
    given = {key: jnp.asarray(ARRAYS[f"{index}/{key}"]) for key in case["columns"]}
    policy = given.pop("policy")
    for other in ("embeddings", "labels", "entropy"):
        given.pop(other, None)
    terms = losses.resolve(case["name"], case["options"])
    kind = losses.objective.data_kind(terms)

    def f(policy):
        return arrays.evaluate(
            terms, arrays.make_inputs(terms, kind, {"policy": policy, **given})
        ).loss

    loss, grad = jax.value_and_grad(f)(policy)
    for found, expected in ((loss, "loss"), (grad, "grad")):
        true = ARRAYS[f"{index}/{expected}"]
        np.testing.assert_allclose(
            found, true, rtol=1e-5, atol=1e-5 * np.abs(true).max(), err_msg=ADVICE
        )


def test_density_ratios_equal_trl():
    asked = [i for i, case in enumerate(CASES) if "embeddings" in case["columns"]]
    for index in asked:
        embeddings, labels, expected = (
            ARRAYS[f"{index}/{name}"] for name in ("embeddings", "labels", "weight")
        )
        found = density.density_ratios(embeddings, labels)[: len(expected)]
        # scikit-learn stops at a gradient of 1e-4
        np.testing.assert_allclose(found, expected, rtol=2e-3, err_msg=ADVICE)
        assert len(set(found.round(3))) > 2 and found.min() >= 0.5
    assert len(asked) == 4


def test_a_classifier_that_is_fitted_has_no_slope_left():
    """Both labels weigh the same; the penalty spares the intercept."""
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(50, 4)), rng.uniform(size=50) < 0.8
    found = density.fit_classifier(x, labels, strength=0.3)
    p = 1 / (1 + np.exp(-(x @ found[:-1] + found[-1])))
    each = 0.3 * 50 / (2 * np.where(labels, labels.sum(), (~labels).sum())) * (p - labels)
    np.testing.assert_allclose(found[:-1] + each @ x, 0, atol=1e-6)
    np.testing.assert_allclose(each.sum(), 0, atol=1e-6)


@pytest.mark.parametrize(
    "labels, bounds, words",
    [
        ([True, True], {}, "desirable and undesirable prompts to compare, got 2 and 0"),
        ([True], {}, r"labels \[n\], got \[2, 1\], \[1\]"),
        ([True, False], {"low": 0.0}, "expected 0 < low"),
        ([True, False], {"low": 2.0, "high": 1.0}, "low = 2, high = 1"),
    ],
)
def test_what_cannot_be_weighed_is_refused(labels, bounds, words):
    with pytest.raises(ValueError, match=words):
        density.density_ratios(np.zeros((2, 1)), labels, **bounds)
