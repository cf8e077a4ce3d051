# SPDX-License-Identifier: Apache-2.0
"""The tiny runs of ``tiny_runs``, to be asked for by name."""

import pytest
import tiny_runs


@pytest.fixture(scope="session")
def make_step_spec():
    return tiny_runs.step_spec_of


@pytest.fixture(scope="session")
def train_steps():
    return tiny_runs.steps_of


@pytest.fixture(scope="session")
def drawn_weights():
    return tiny_runs.weights_of


@pytest.fixture(scope="session")
def put_as():
    return tiny_runs.put


@pytest.fixture(scope="session")
def make_batch():
    return tiny_runs.random_batch
