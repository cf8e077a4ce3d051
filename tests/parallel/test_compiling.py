# SPDX-License-Identifier: Apache-2.0
"""What the compiler is asked for."""

import pytest

from align_jax.parallel import compiling
from align_jax.parallel.mesh import make_mesh


@pytest.mark.parametrize(
    "asked, given",
    [({"xla_cpu_experimental_ynn_fusion_type": ""}, True), ({"xla_cpu_no_such_thing": "1"}, False)],
)
def test_options_that_the_compiler_does_not_know_are_not_asked_for(monkeypatch, asked, given):
    monkeypatch.setattr(compiling, "_BY_PLATFORM", {"cpu": asked})
    compiling._known.cache_clear()
    try:
        assert compiling.options(make_mesh({"fsdp": -1})) == (asked if given else None)
    finally:
        compiling._known.cache_clear()
