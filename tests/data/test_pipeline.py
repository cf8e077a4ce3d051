# SPDX-License-Identifier: Apache-2.0
"""A batch is a pure function of (seed, step), and its arrays say what the examples say."""
import numpy as np
import pytest

from align_jax.data import datasets, pipeline, tokenizer


@pytest.fixture(scope="module")
def byte():
    return tokenizer.load_tokenizer("byte")


@pytest.fixture(scope="module")
def pairs():
    return datasets.load("builtin:preferences:train?size=40", kind="pairs", chat=True)


def assert_same(left, right):
    for name, a, b in zip(left._fields, left, right):
        assert (a is None) == (b is None), name
        if a is not None:
            np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("layout", ["plain", "packed", "shared_prefix"])
def test_a_batch_depends_on_the_step_alone(byte, pairs, layout):
    pipe = pipeline.make_pipeline(pairs, byte, batch_size=8, max_length=128, layout=layout, seed=3)
    iterator = pipe.iterator(7)
    for step in range(7, 12):
        assert_same(next(iterator), pipe.batch(step))
