# SPDX-License-Identifier: Apache-2.0
"""What each parameter of a model is, as its module says."""

import jax
import pytest

from align_jax.core.tree import flatten
from align_jax.interop import hf
from align_jax.models import FAMILIES
from align_jax.models.lora import LoraConfig
from align_jax.models.model import build

ADAPTED = LoraConfig(2, dora=True, targets="attention/.*")


# maps to heads' features
SPLIT = """query query_b key value key_value_b mixed gates output_gate projection""".split()
# what a family's own defaults leave open
NEEDED = {
    "glm4_moe": {"head_dim": 128},  # they make no whole number of it
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "deepseek_v2": {"num_experts_per_tok": 2},
}


def leaves(family, **options):
    """(role, axes, shape) of each parameter."""
    raw = {"model_type": family, **NEEDED.get(family, {})}
    model = build(hf.config_from(raw), **options)
    trees = (flatten(tree) for tree in (model.roles(), model.axes(), model.shapes()))
    roles, axes, shapes = trees
    assert roles.keys() == axes.keys() == shapes.keys()
    return {path: (roles[path], axes[path], shapes[path].shape) for path in roles}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_role_counts_the_axes_that_stand_before_a_matrix_and_those_it_contracts(family):
    for path, (role, axes, shape) in leaves(family, lora=ADAPTED, heads=("value_mlp",)).items():
        stacked = [name for name in axes if name in ("layers", "experts")]
        assert role.leading == len(stacked), path
        assert tuple(axes[: role.leading]) == tuple(stacked), path
        if role.hidden_matrix:
            outputs = len(shape) - role.leading - role.inputs
            assert outputs == (2 if path.split("/")[-2] in SPLIT else 1) or (
                path.endswith("lora_a") and outputs == 1
            ), path
        vector = path.endswith(("/scale", "bias", "/lora_m", "/sinks", "_taps", "/speed", "/shift"))
        assert role.matrix == (not vector), path


def test_the_parts_of_a_mixture_with_an_adapter_and_a_head():
    found: dict[str, set[str]] = {}
    for path, (role, *_) in leaves("mixtral", lora=ADAPTED, heads=("score",)).items():
        found.setdefault(role.part, set()).add(path)
    names = ("query", "key", "value", "output")
    assert found == {
        "embedding": {"embed/tokens"},
        "norm": {"final_norm/scale", "layers/attention_norm/scale", "layers/mlp_norm/scale"},
        "linear": {f"layers/attention/{name}/kernel" for name in names},
        "router": {"layers/moe/router"},
        "expert": {f"layers/moe/{name}" for name in ("gate", "up", "down")},
        "adapter": {
            f"layers/attention/{name}/lora_{leaf}" for name in names for leaf in ("a", "b", "m")
        },
        "head": {"score/out/kernel"},
    }
    quantized = {path for path, (role, *_) in leaves("mixtral").items() if role.quantized}
    assert quantized == found["linear"] | found["expert"]
    assert leaves("mixtral")["output/kernel"][0].part == "output"


def test_parameters_and_roles_are_one_tree():
    model = build(hf.config_from({"model_type": "gpt2"}), heads=("value",))
    assert jax.tree.structure(model.shapes()) == jax.tree.structure(model.roles())
