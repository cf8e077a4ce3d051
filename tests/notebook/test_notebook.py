# SPDX-License-Identifier: Apache-2.0
"""The front door: rows from Python are a file's rows, and a result does what the programs do."""

import importlib
import inspect
import itertools
import json
import re
import subprocess
import sys
import types

import grain
import numpy as np
import pandas
import pyarrow
import pytest

import align_jax
from align_jax.core.options import DataOptions
from align_jax.data import datasets
from align_jax.data import given as rows_of_python
from align_jax.data.given import given
from align_jax.notebook.asked import ask
from align_jax.notebook.result import learns_from
from align_jax.runs.elsewhere import ELSEWHERE
from align_jax.runs.setup import resolve_config

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
ROWS = [{"prompt": f"{n}: how?", "chosen": "Well.", "rejected": f"No, {n}."} for n in range(40)]
KEYS = {
    "batch_size": 8,
    "total_steps": 2,
    "max_length": 32,
    "data.layout": "plain",
    "model.config": SMALL,
    "log.every_steps": 1,
}


class Table:
    """As a datasets.Dataset gives rows: in a format that was asked for, or as dicts."""

    column_names = list(ROWS[0])

    def __init__(self, kind=None, columns=column_names, every=False):
        self.kind, self.columns = kind, columns
        self.format = {"type": kind, "columns": columns, "output_all_columns": every}

    def with_format(self, kind, columns, every):
        return Table(kind, columns, every)

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        row = {name: ROWS[index][name] for name in self.columns}
        if self.kind == "custom":  # as the user's transform makes it
            return {"text": row["prompt"]}
        return row if self.kind is None else pandas.DataFrame([row])


class Lazy:
    """As a polars.LazyFrame, which is a frame once it is collected."""

    def __init__(self, rows):
        self.collect_schema, self.rows = None, rows

    def collect(self):
        return types.SimpleNamespace(to_dicts=lambda: self.rows)


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        iter,
        pandas.DataFrame,
        pyarrow.Table.from_pylist,
        grain.MapDataset.source,
        lambda rows: grain.MapDataset.source([{}, *rows]).filter(bool),
        lambda rows: grain.MapDataset.source(rows).to_iter_dataset(),
        lambda rows: Table("pandas"),
        Lazy,
        lambda rows: ({name: np.str_(text) for name, text in row.items()} for row in rows),
    ],
)
def test_rows_of_whatever_holds_them_are_a_file_s(make, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    source = given(make(ROWS), "data")
    assert source.spec == given(ROWS, "data").spec
    ours, theirs = (
        datasets.load([one], "pairs", DataOptions(), chat=False) for one in (source, str(file))
    )
    assert [one.responses for one in ours.items] == [one.responses for one in theirs.items]
    assert ours[3].source == "data[3]" and theirs[3].source == f"{file}:4"


def test_a_data_set_s_columns_and_transform_are_the_user_s():
    assert given(Table("pandas", ["chosen"]), "data")[1] == {"chosen": "Well."}
    assert given(Table("custom"), "data")[1] == {"text": "1: how?"}


def test_a_frame_s_missing_values_are_none():
    frame = pandas.DataFrame({"prompt": ["a", "b"], "chosen": ["c", None], "margin": [1.0, np.nan]})
    assert given(frame, "data")[1] == {"prompt": "b", "chosen": None, "margin": None}
    assert given(frame.set_index("prompt"), "data")[1] == given(frame, "data")[1]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "data: no rows"),
        ([{"prompt": "a"}, "b"], r"data\[1\]: expected a dict with named fields, got str"),
        ([{1: "a"}], r"data\[0\]: a field's name is a text, got 1"),
        ([{"a": b"\xff"}], r"data\[0\]: bytes that are no UTF-8"),
        ({"prompt": ["a"]}, "a dict with the keys 'prompt': give rows"),
        ({"train": Table(), "test": Table()}, r"'test': give one of them, as data\['train'\]"),
        (pandas.DataFrame(ROWS).to_dict(), "a dict with the keys 'prompt', .*: give rows"),
        (pandas.DataFrame(ROWS)["prompt"], "data: a frame's column alone: give the frame"),
        (lambda: iter(ROWS), "or the name of a source; got function, which is to be called"),
        (pandas.DataFrame([[1, 2]], columns=["a", "a"]), "columns of the same name"),
        (grain.MapDataset.source(ROWS).repeat(), "a Grain data set that repeats"),
        (itertools.cycle(ROWS), "data: more than 100 rows; is it endless"),
        ([*ROWS[:17], {**ROWS[17], "chosen": 3}], r"data\[17\]: .*chosen"),
        ([{"prompt": "a", "other": "b"}], r"data\[0\]: "),
        ([{"q": "a", "good": "b"}], r"^data\[0\]: .*by config.data.columns.*of pairs: "),
        ([{"Prompts": "a", "chosen": "b", "rejected": "c"}], "Prompts seems to be their prompt"),
        ([{"prompt": "a", "completion": "b", "label": True}] * 3, "^data: no pairs are left of 3"),
        (7, "data: expected a list of dicts, .* or the name of a source; got int"),
    ],
)
def test_a_wrong_row_is_told_by_its_number(data, said, monkeypatch):
    monkeypatch.setattr(rows_of_python, "MOST_STREAMED", 100)
    with pytest.raises((ValueError, TypeError), match=said):
        align_jax.show_batch("tiny:dpo", data, **KEYS)


@pytest.mark.parametrize(
    ("config", "keys", "said"),
    [
        ("tiny:dp0", {}, "did you mean 'dpo'"),
        ("dp0", {}, "config dp0: no such recipe, objective or config file; did you mean 'dpo'"),
        ("tiny:dpo", {"optimizer": {"learning_rte": 1}}, "did you mean 'learning_rate'"),
        ("tiny:dpo", {"learning_rate": 1}, "did you mean 'config.optimizer.learning_rate'"),
        ("tiny:dpo", {"optimizer": 1e-3}, "optimizer = 0.001: expected a dict of its keys"),
        ("tiny:dpo", {"objective": {"bta": 1}}, "did you mean 'beta'"),
        ("tiny:dpo", {"objective": {"name": "ip0"}}, "did you mean 'ipo'"),
        ("tiny:dpo", {"batch_size": "8"}, "config.batch_size = '8': expected an integer"),
        ("tiny:grpo", {"rewards": lambda prompts, completions, extras: []}, "a name of its own"),
        ({"batch_sizes": 8}, {}, "did you mean 'batch_size'"),
    ],
)
def test_a_wrong_key_is_told_with_the_nearest(config, keys, said):
    with pytest.raises(ValueError, match=said):
        align_jax.show_batch(config, ROWS, **keys)


@pytest.mark.parametrize("name, key", ELSEWHERE.items())
def test_what_other_trainers_call_a_key_is_answered_with_it(name, key):
    config = align_jax.recipe("tiny:dpo")
    with pytest.raises(ValueError, match=f"did you mean '{key}'"):
        ask(config, None, None, "", {name: 1})
    arguments = {*inspect.signature(align_jax.train).parameters}
    node = config
    for part in key.split(".")[1:]:
        node = node[part]  # is there
    assert key in arguments or key.startswith("config.")


def test_a_notebook_shows_a_mistake_s_message_alone_and_another_s_error_whole(tmp_path):
    (tmp_path / "file").touch()

    def stop(step, values):
        raise ValueError("enough")

    for keys, said in (
        ({"eval_data": 7}, "TypeError: eval_data: expected a list of dicts"),
        ({"workdir": tmp_path / "file"}, "Usage: workdir=.*file: expected a folder"),
        ({"on_log": stop}, ""),
    ):
        with pytest.raises((ValueError, TypeError)) as found:
            align_jax.train("tiny:dpo", ROWS, **{**KEYS, **keys})
        shown = getattr(found.value, "_render_traceback_", lambda: [""])()
        assert len(shown) == 1 and re.match(said + "$" * (not said), shown[0])


def agree(prompts, completions, extras):
    return [0.0 for _ in completions]


def test_a_function_is_a_reward_by_its_name():
    for rewards in (agree, [agree], {agree: 1.0}):
        made = ask("tiny:grpo", None, None, "", {"rewards": rewards}).config.rewards
        assert made == {"agree": {"kind": "function", "path": f"{__name__}:agree", "weight": 1.0}}
    mixed = ask(
        "tiny:grpo", None, None, "", {"rewards": {agree: 2.0, "length": 0.5}}
    ).config.rewards
    assert mixed["agree"]["weight"] == 2.0 and mixed["length"] == 0.5


@pytest.mark.parametrize(("name", "kind"), [("online_dpo", "rollout"), ("dpo", "pairs")])
def test_a_run_is_measured_on_the_kind_of_data_that_it_learns_from(name, kind):
    config = ask(f"tiny:{name}", ROWS, None, "", {"model.config": SMALL}).config
    assert learns_from(config, resolve_config(config, 1)) == kind


def test_keys_change_a_copy_of_the_config():
    config = align_jax.recipe("tiny:dpo")
    asked = {
        "objective": {"name": "ipo"},
        "optimizer.b2": 0.9,
        "data": {"columns": {"chosen": "c"}},
    }
    made = ask(config, ROWS, None, "", asked).config
    assert (made.objective.name, made.optimizer.b2, made.optimizer.warmup_fraction) == (
        "ipo",
        0.9,
        0.1,
    )
    assert "label_smoothing" in config.objective and "label_smoothing" not in made.objective.options
    assert made.data.columns == {"chosen": "c"}
    assert config.objective.name == "dpo"
    nested = ask(
        {"objective": {"beta": 0.2}, "model": {"config": SMALL}, "total_steps": 1},
        ROWS,
        None,
        "",
        {},
    )
    assert (
        nested.config.objective.options["beta"] == 0.2 and dict(nested.config.model.config) == SMALL
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    told = []
    folder = tmp_path_factory.mktemp("run") / "run"
    result = align_jax.train(
        "tiny:dpo",
        ROWS,
        ROWS[:4],
        workdir=folder,
        on_log=lambda step, values: told.append((step, values)),
        **KEYS,
    )
    return result, told


def test_a_callback_and_the_metrics_tell_each_logged_step(trained):
    result, told = trained
    assert [step for step, _ in told] == [row["step"] for row in result.metrics] == [0, 1, 2, 2]
    assert told[1][1]["loss"] == result.frame()["loss"].dropna().iloc[0]
    assert result.evaluate()["rewards/accuracies"] == told[-1][1]["eval/rewards/accuracies"]


def test_a_result_answers_is_measured_and_exported(trained, tmp_path):
    result, _ = trained
    one = result.generate("7?", max_new_tokens=3, temperature=0)
    assert isinstance(one, str)
    several = result.generate(["7?", "8?"], samples=2, max_new_tokens=3, temperature=0)
    assert several[0] == [one, one] and len(several) == 2
    found, held_out = result.evaluate(ROWS[:4]), result.evaluate()
    assert found["examples"] == 4
    for name in ("logps/chosen", "rewards/margins"):  # the reference is drawn as it was
        assert found[name] == pytest.approx(held_out[name], abs=1e-4)
    with pytest.raises(FileExistsError, match="is there already"):
        result.save(tmp_path)
    saved = align_jax.load(result.save(tmp_path / "saved"))
    assert saved.generate("7?", max_new_tokens=3, temperature=0) == one
    result.export(tmp_path / "hf")
    assert (tmp_path / "hf" / "model.safetensors").exists()
    assert "implicit rewards" in result._repr_html_() and "Result(" in repr(result)
    with pytest.raises(ValueError, match="max_new_tokens = 0: expected at least 1"):
        result.generate("7?", max_new_tokens=0)
    with pytest.raises(ValueError, match="prompts: expected"):
        result.generate([])


def test_a_run_goes_on_with_its_own_rows_alone(trained):
    result, _ = trained
    again = {"eval_data": ROWS[:4], "workdir": result.workdir, **KEYS}
    with pytest.raises(
        ValueError, match=r"data.train: 'rows:data@\w+' there, 'rows:data@\w+' here"
    ):
        align_jax.train("tiny:dpo", ROWS[1:], **again)
    longer = align_jax.train("tiny:dpo", iter(ROWS), **{**again, "total_steps": 3})
    assert [row["step"] for row in longer.metrics if "loss" in row] == [1, 2, 3]
    spec = given(ROWS, "data").spec
    with pytest.raises(ValueError, match="given in Python: give them to it again"):
        align_jax.train("tiny:dpo", spec, **again)


def test_the_package_is_imported_at_once_and_offers_its_names():
    light = """if True:
        import importlib, sys, align_jax
        dir(align_jax)
        assert not {'jax', 'numpy'} & set(sys.modules)
        importlib.import_module("align_jax.train")  # says its first line before slow imports
        assert not {'jax', 'transformers'} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", light], check=True, timeout=60)
    assert set(align_jax.__all__) == set(align_jax._FROM) <= set(dir(align_jax))
    assert all(getattr(align_jax, name) for name in align_jax.__all__)
    importlib.import_module("align_jax.train")  # the program's file, of the same name
    assert align_jax.train.__module__ == "align_jax.notebook.training"
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = align_jax.trian
