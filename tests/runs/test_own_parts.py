# SPDX-License-Identifier: Apache-2.0
"""Parts of the user's own, ``module:name`` in the config: to train, and for all that follows."""

import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors

import align_jax
from align_jax.core import own
from align_jax.core.options import OptimizerOptions
from align_jax.runs import config_file
from align_jax.runs.weights import load_model
from align_jax.training import optim

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs/own_parts.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
OWN, FAMILY = "\n\n".join(BLOCKS[:-1]) + "\nnumber = 3\n", BLOCKS[-1]
WRONG = """
import dataclasses

from my_family import FAMILY, tensor_maps


def maps(config):
    first, *rest = tensor_maps(config)
    rest = [dataclasses.replace(one, path=one.path.replace("gate", "gat")) for one in rest]
    return [dataclasses.replace(first, axes="D V -> D V"), *rest]


NONE = dataclasses.replace(FAMILY, from_hf=dict)
MAPS = dataclasses.replace(FAMILY, tensor_maps=maps)
"""
ROWS = [{"ask": f"{n}?", "a": "Yes.", "b": "No.", "votes": n % 3 - 1.5} for n in range(40)]
KEYS = {
    "objective": {"name": "my_parts:hinge", "beta": 0.5},
    "data.format": "my_parts:VOTES",
    "optimizer.name": "my_parts:plain",
    "model.family": "my_family:FAMILY",
    "model.config": {"dim": 32, "ffn_dim": 64, "n_layers": 1, "n_heads": 2},
    "batch_size": 8,
    "max_length": 32,
    "data.layout": "plain",
    "log.every_steps": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("own")
    (made / "my_parts.py").write_text(OWN)
    (made / "my_family.py").write_text(FAMILY)
    (made / "wrong.py").write_text(WRONG)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(made))
        yield made
    for name in ("my_parts", "my_family", "wrong"):
        sys.modules.pop(name, None)


def test_own_parts_train_and_serve_all_that_follows(folder, tmp_path):
    run = str(tmp_path / "run")
    result = align_jax.train("tiny:dpo", ROWS, workdir=run, total_steps=1, **KEYS)
    assert result.metrics[0]["eval/loss"] == 1.0  # policy and reference are one
    assert result.evaluate(ROWS[:8])["examples"] == 8
    _check_export(result, tmp_path / "hf")
    assert isinstance(align_jax.load(run).generate("7?", max_new_tokens=2), str)
    longer = align_jax.train("tiny:dpo", ROWS, workdir=run, total_steps=2, **KEYS)
    assert [row["step"] for row in longer.metrics if "grad_norm" in row] == [1, 2]


def _check_export(result, folder):
    """An export has the family's fields and names, and is read back by what its config.json says,
    or where that says nothing by the family that is asked for."""
    result.export(folder)
    with safetensors.safe_open(folder / "model.safetensors", "numpy") as tensors:
        assert "layers.0.attention.q_norm.weight" in tensors.keys()
    said = json.loads((folder / "config.json").read_text())
    assert said["dim"] == 32 and said.pop("align_jax_family") == "my_family:FAMILY"
    policy = load_model(str(folder), compute_dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, policy.params, result.params)
    assert policy.model.config.qk_norm == "head"
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"'my_family' is unknown; .*config.model.family"):
        load_model(str(folder))
    keys = {**KEYS, "model.config": {}}
    shown = align_jax.show_batch("tiny:dpo", ROWS, model=folder, tokenizer="", **keys)
    assert shown.examples


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"objective": {"name": "my_parts:hnge"}}, "has no function 'hnge'; did you mean 'hinge'"),
        ({"objective": {"name": "no_parts:f"}}, "no module 'no_parts'; start where it lies"),
        ({"objective": {"name": "my_parts:number"}}, "is a int; expected a function, or an "),
        ({"data.format": "my_parts:votes"}, "function; expected an align_jax.data.formats.Format"),
        ({"objective": {"name": "my_parts:hinge", "bta": 1}}, "did you mean 'beta'"),
        ({"model.family": "my_family:from_hf"}, "function; expected an align_jax.models.Family"),
        ({"model.family": "my_family:FAMLY"}, "no Family 'FAMLY'; did you mean 'FAMILY'"),
        ({"model.config": {"dim": 32}}, "my_family:FAMILY: from_hf: KeyError: 'ffn_dim'"),
        ({"model.family": "wrong:NONE"}, "from_hf returned a dict; expected a ModelConfig"),
        (
            {"model.family": "wrong:MAPS"},
            "layers/mlp/gat/kernel is no parameter of this decoder; did you mean '"
            "layers/mlp/gate/kernel'.*layers/mlp/gate/kernel has no tensor; "
            r"embed/tokens is \(272, 32\), 'D V -> D V' makes \(32, 272\) of tok_embeddings",
        ),
    ],
)
def test_what_is_no_part_is_told(folder, keys, said):
    with pytest.raises(ValueError, match=said):
        align_jax.show_batch("tiny:dpo", ROWS, **{**KEYS, **keys})


def test_an_own_optimizer_reads_every_option(folder):
    options = OptimizerOptions(name="my_parts:plain", b1=0.5, eps=1e-3)
    assert optim.make_optimizer(options, lambda step: 0.1, {}).init({}) is not None


def test_a_changed_file_is_another_one(folder):
    before = own.digest("my_parts:VOTES")
    (folder / "my_parts.py").write_text(OWN + "\n")
    assert own.digest("my_parts:VOTES") != before and own.digest("pairs") == ""


def test_the_command_finds_parts_where_it_is_started(folder):
    start = "import sys, align_jax.__main__ as m; sys.argv[0] = 'align-jax'; m.main()"
    words = ["config", "objective", "--config=my_parts:hinge+sft"]
    command = [sys.executable, "-P", "-c", f"import sys; sys.path.append({str(ROOT)!r}); {start}"]
    found = subprocess.run([*command, *words], cwd=folder, capture_output=True, text=True)
    assert found.returncode == 0 and "my_parts:hinge+sft" in found.stdout, found.stderr


def test_an_own_objective_s_name_is_a_recipe(folder):
    for name in ("my_parts:hinge", "tiny:my_parts:hinge"):
        assert align_jax.recipe(name).objective.name == "my_parts:hinge"
    assert config_file.find("online_my_parts", "hinge")[1] == "online_my_parts:hinge"
