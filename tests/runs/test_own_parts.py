# SPDX-License-Identifier: Apache-2.0
"""Parts of the user's own, ``module:name`` in the config: to train, and for all that follows."""

import pathlib
import subprocess
import sys

import pytest

import align_jax
from align_jax.core import own
from align_jax.core.options import OptimizerOptions
from align_jax.training import optim

ROOT = pathlib.Path(__file__).parents[2]
OWN = '''
import optax
import jax

from align_jax.core.schema import Example
from align_jax.data.formats import Format
from align_jax.losses.pairs import Beta


def hinge(pair, *, beta: Beta = 0.1):
    """Margin of one."""
    return jax.nn.relu(1.0 - beta * (pair.chosen - pair.rejected))


def votes(row, chat):
    better, worse = (row["a"], row["b"]) if row["votes"] > 0 else (row["b"], row["a"])
    return Example(row["ask"], (better, worse))


VOTES = Format("pairs", ("ask", "votes"), votes)


def plain(options, schedule, roles):
    return optax.sgd(schedule, momentum=options.b1)


number = 3
'''
ROWS = [{"ask": f"{n}?", "a": "Yes.", "b": "No.", "votes": n % 3 - 1.5} for n in range(40)]
KEYS = {
    "objective": {"name": "own_parts:hinge", "beta": 0.5},
    "data.format": "own_parts:VOTES",
    "optimizer.name": "own_parts:plain",
    "model.config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "batch_size": 8,
    "max_length": 32,
    "data.layout": "plain",
    "log.every_steps": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("own")
    (made / "own_parts.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(made))
        yield made
    sys.modules.pop("own_parts", None)


def test_own_parts_train_and_serve_all_that_follows(folder, tmp_path):
    run = str(tmp_path / "run")
    result = align_jax.train("tiny:dpo", ROWS, workdir=run, total_steps=1, **KEYS)
    assert result.metrics[0]["eval/loss"] == 1.0  # policy and reference are one
    assert result.evaluate(ROWS[:8])["examples"] == 8
    result.export(tmp_path / "hf")
    assert isinstance(align_jax.load(run).generate("7?", max_new_tokens=2), str)
    longer = align_jax.train("tiny:dpo", ROWS, workdir=run, total_steps=2, **KEYS)
    assert [row["step"] for row in longer.metrics if "grad_norm" in row] == [1, 2]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"objective": {"name": "own_parts:hnge"}}, "has no function 'hnge'; did you mean 'hinge'"),
        ({"objective": {"name": "no_parts:f"}}, "no module 'no_parts'; start where it lies"),
        ({"objective": {"name": "own_parts:number"}}, "is a int; expected a function, or a "),
        ({"data.format": "own_parts:votes"}, "function; expected a align_jax.data.formats.Format"),
        ({"objective": {"name": "own_parts:hinge", "bta": 1}}, "did you mean 'beta'"),
    ],
)
def test_what_is_no_part_is_told(folder, keys, said):
    with pytest.raises(ValueError, match=said):
        align_jax.show_batch("tiny:dpo", ROWS, **{**KEYS, **keys})


def test_an_own_optimizer_reads_every_option(folder):
    options = OptimizerOptions(name="own_parts:plain", b1=0.5, eps=1e-3)
    assert optim.make_optimizer(options, lambda step: 0.1, {}).init({}) is not None


def test_a_changed_file_is_another_one(folder):
    before = own.digest("own_parts:VOTES")
    (folder / "own_parts.py").write_text(OWN + "\n")
    assert own.digest("own_parts:VOTES") != before and own.digest("pairs") == ""


def test_the_command_finds_parts_where_it_is_started(folder):
    start = "import sys, align_jax.__main__ as m; sys.argv[0] = 'align-jax'; m.main()"
    words = ["config", "objective", "--config=tiny:own_parts:hinge"]
    command = [sys.executable, "-P", "-c", f"import sys; sys.path.append({str(ROOT)!r}); {start}"]
    found = subprocess.run([*command, *words], cwd=folder, capture_output=True, text=True)
    assert found.returncode == 0 and "own_parts:hinge" in found.stdout, found.stderr
