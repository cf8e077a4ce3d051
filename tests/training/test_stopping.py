# SPDX-License-Identifier: Apache-2.0
"""When early stopping stops."""

import math

import pytest

from align_jax.core.options import EvalOptions
from align_jax.training.evaluation import Stopping


def after(values, **options):
    options, seen = EvalOptions(**options), Stopping()
    for step, value in enumerate(values):
        seen = seen.after(step, {"eval/loss": value, "eval/accuracy": value}, options)
        if seen.is_spent(options):
            return step
    return None


@pytest.mark.parametrize(
    ("values", "options", "stops"),
    [
        ([3, 2, 2, 2, 1], dict(stop_metric="-eval/loss", patience=2), 3),
        ([3, 2, 2, 1, 1], dict(stop_metric="-eval/loss", patience=2), None),
        ([3, 2, 4, 5], dict(stop_metric="eval/accuracy", patience=3), None),
        ([3, 4, 4.05, 4.1], dict(stop_metric="eval/accuracy", patience=2, least_gain=0.2), 3),
        ([math.nan, math.nan, 1.0], dict(stop_metric="eval/accuracy", patience=2), 1),
        ([1, 1, 1, 1], dict(), None),
    ],
)
def test_a_run_stops_after_so_many_evaluations_without_a_better_one(values, options, stops):
    assert after(map(float, values), **options) == stops


def test_a_metric_that_no_evaluation_gives_is_told_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'eval/accuracy'"):
        after([1.0], stop_metric="eval/acuracy")
