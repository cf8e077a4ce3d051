# SPDX-License-Identifier: Apache-2.0
"""The main job as its user runs it: it learns, resumes to the bit, exports, and finds mistakes
before it compiles."""

import contextlib
import functools
import gzip
import importlib
import json
import operator
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import evaluate, export, report, sample
from align_jax.core import config as configs
from align_jax.data.sources import open_source
from align_jax.data.tokenizer import load_tokenizer
from align_jax.inference.engines import Request
from align_jax.online.rollout import Rollouts
from align_jax.runs import loop, reported, setup, trained
from align_jax.storage import checkpoint

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def tiny(objective="dpo", **overrides):
    """configs/tiny.py, smaller still: for tests."""
    spec = importlib.util.spec_from_file_location("tiny", CONFIGS / "tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(objective)
    config.model.config.update(hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    config.data.train += "?size=256"
    settings = dict(
        total_steps=6,
        batch_size=8,
        max_length=112,
        checkpoint__every_steps=100,
        eval__every_steps=0,
        eval__max_examples=16,
        log__every_steps=1,
    )
    for key, value in {**settings, **overrides}.items():
        group, _, name = key.replace("__", ".").rpartition(".")
        parts = filter(None, group.split("."))
        setattr(functools.reduce(operator.getitem, parts, config), name, value)
    return config


def rows(workdir):
    return [
        json.loads(line)
        for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    ]


def params(workdir):
    return jax.device_get(trained.restore(str(workdir)).params)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run of six steps, with checkpoints of the third and the last."""
    workdir = tmp_path_factory.mktemp("run")
    loop.train(tiny(checkpoint__every_steps=3), str(workdir))
    return workdir


def test_a_run_writes_the_metrics_that_dashboards_know(finished):
    found = rows(finished)
    assert [row["step"] for row in found if "loss" in row] == [1, 2, 3, 4, 5, 6]
    last = [row for row in found if "loss" in row][-1]
    for name in (
        "loss",
        "grad_norm",
        "learning_rate",
        "num_tokens",
        "tokens_per_second",
        "padding_fraction",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    ):
        assert name in last, name
    assert found[0]["eval/loss"] == pytest.approx(np.log(2), abs=1e-6)
    record = json.loads((finished / "config.json").read_text())
    assert record["config"]["objective"]["beta"] == 0.1 and "jax" in record["versions"]


def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(
    finished, tmp_path, monkeypatch, capsys
):
    @contextlib.contextmanager
    def stop_after_three():
        yield lambda step: step == 3

    with monkeypatch.context() as patch:
        patch.setattr(loop.distributed, "stop_signal", stop_after_three)
        loop.train(tiny(), str(tmp_path))
    assert trained.restore(str(tmp_path)).step == 3
    loop.train(tiny(), str(tmp_path))
    whole = {row["step"]: row for row in rows(finished) if "loss" in row}
    halves = {row["step"]: row for row in rows(tmp_path) if "loss" in row}
    for step in range(1, 7):
        for name in ("loss", "grad_norm", "num_tokens", "rewards/margins"):
            assert whole[step][name] == halves[step][name], (step, name)
    jax.tree.map(np.testing.assert_array_equal, params(finished), params(tmp_path))
    monkeypatch.setattr(checkpoint.files, "most_bytes", lambda: 3)  # it has nothing to write
    loop.train(tiny(), str(tmp_path))
    assert (
        "nothing left to train: step 6 is saved, and config.total_steps = 6; raise"
        in capsys.readouterr().err
    )


def test_a_run_whose_checkpoints_have_no_room_ends_before_its_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.files, "most_bytes", lambda: 3)
    with pytest.raises(checkpoint.StorageError, match="a file may have 3 here: ulimit -f"):
        loop.train(tiny(), str(tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists() or not rows(tmp_path)


def listing(folder):
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


def test_programs_that_read_a_run_leave_its_folder_byte_for_byte(finished, tmp_path):
    before, prompts = listing(finished), tmp_path / "pairs.jsonl"
    prompts.write_text('{"prompt": "a?", "chosen": "b", "rejected": "c"}\n' * 2)
    small = {"batch_size": 8, "max_length": 64}
    evaluate.evaluate(
        evaluate.run_policy(str(finished)), [f"preference={prompts}"], options={"preference": small}
    )
    policy = sample.load_run(str(finished), rows=8, max_length=64)
    request = Request((), samples=1, max_new_tokens=4)
    sample.sample_file(policy, str(prompts), str(tmp_path / "out.jsonl"), request, show=False)
    assert export.export_run(str(finished), str(tmp_path / "model")) == 6
    report.write(reported.read_runs([str(finished)]), str(tmp_path / "report"))
    assert listing(finished) == before


def test_a_checkpoint_that_the_run_removes_while_it_is_read_is_passed_over(
    finished, tmp_path, monkeypatch
):
    run, read, gone = shutil.copytree(finished, tmp_path / "run"), checkpoint._read_here, {"6"}

    def removed(path, *given):
        if path.name in gone and path.exists():
            path.rmtree()
        return read(path, *given)

    monkeypatch.setattr(checkpoint, "_read_here", removed)
    assert export.export_run(str(run), str(tmp_path / "model")) == 3
    gone.add("3")
    with pytest.raises(FileNotFoundError, match="checkpoints/3 was removed while it was read"):
        evaluate.run_policy(str(run), "3")


def test_a_run_that_gains_nothing_stops_early_and_a_resumed_one_at_the_same_step(
    tmp_path, monkeypatch, capsys
):
    @contextlib.contextmanager
    def stop_after_two():
        yield lambda step: step == 2

    config = tiny(eval__every_steps=1, eval__stop_metric="-eval/loss", eval__patience=3)
    config.optimizer.learning_rate = 1e-30
    row = '{{"prompt": "{0}?", "chosen": "Yes.", "rejected": "No {0}."}}'
    config.data.train = pairs_file(tmp_path, *map(row.format, range(24)))
    config.data.eval_fraction = 0.3
    with monkeypatch.context() as patch:
        patch.setattr(loop.distributed, "stop_signal", stop_after_two)
        loop.train(config, str(tmp_path))
    assert "stopped by a signal after step 2" in capsys.readouterr().err
    for _ in range(2):  # the second start finds nothing to do
        loop.train(config, str(tmp_path))
    said = capsys.readouterr().err
    assert said.count("not been better than 0.6931 (step 0) in 3 evaluations") == 1, said
    assert said.count("step 3 is saved, where it stopped early, and config.eval.patience = 3") == 1
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == [1, 2, 3]
    assert trained.restore(str(tmp_path)).step == 3


def test_the_exported_model_speaks_in_transformers_as_here(finished, tmp_path):
    import torch
    import transformers

    export.export_run(str(finished), str(tmp_path), dtype="float32")
    card = (tmp_path / "README.md").read_text()
    assert "| loss | 0.6931 |" in card and "`dpo`, 6 steps of 8 groups" in card
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = jnp.asarray([tokenizer.encode("How do I paint a door?")], jnp.int32)
    restored = trained.restore(str(finished))
    model = restored.resolved.models.policy
    hidden, _ = model.hidden(
        restored.params, ids, jnp.ones_like(ids), jnp.arange(ids.shape[1])[None]
    )
    ours = model.unembed(restored.params, hidden)
    with torch.no_grad():
        np.testing.assert_allclose(
            ours, theirs(torch.tensor(np.asarray(ids), dtype=torch.long)).logits, atol=1e-4
        )


@pytest.mark.parametrize(
    "overrides",
    [
        dict(data__layout="packed", row_length=448, data__groups_per_row=2, batch_size=16),
        dict(
            data__layout="shared_prefix",
            row_length=448,
            data__groups_per_row=2,
            batch_size=16,
            reference__mode="cached",
        ),
    ],
    ids=["packed", "shared_prefix_and_cached_reference"],
)
def test_layout_and_cache_leave_the_held_out_measure_unchanged(finished, tmp_path, overrides):
    config = tiny(total_steps=1, optimizer__learning_rate=1e-30, eval__batch_size=16, **overrides)
    loop.train(config, str(tmp_path))
    ours, theirs = (
        next(row for row in rows(path) if "eval/loss" in row) for path in (tmp_path, finished)
    )
    for name in ("eval/logps/chosen", "eval/logps/rejected", "eval/loss"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(tmp_path):
    config = tiny(
        optimizer__name="sgd",
        objective__beta=1e30,  # the squares of such gradients are beyond float32
        optimizer__clip_norm=0.0,
        optimizer__warmup_fraction=0.0,
    )
    with pytest.raises(
        FloatingPointError,
        match=r"step \d: .*Last good checkpoint: none.*builtin:preferences:train",
    ):
        loop.train(config, str(tmp_path))


def test_an_online_step_that_is_not_finite_names_the_prompts_of_its_own_rows(tmp_path, monkeypatch):
    taken, steps = Rollouts.next, []

    def poisoned(source, weights):
        batch = taken(source, weights)
        steps.append(load_tokenizer("byte").batch_decode(np.asarray(batch.tokens)))
        if len(steps) == 2:
            batch = batch._replace(advantages=np.full_like(batch.advantages, np.nan))
        return batch

    monkeypatch.setattr(Rollouts, "next", poisoned)
    config = tiny("grpo", total_steps=4, log__every_steps=2, eval__max_examples=0)
    config.data.eval_fraction = 0.0
    with pytest.raises(FloatingPointError, match="^step 2: loss is nan") as caught:
        loop.train(config, str(tmp_path))
    source = open_source(config.data.train)
    numbers = map(int, re.findall(r"builtin:arithmetic:train\[(\d+)\]", str(caught.value)))
    prompts = [source[number]["question"] for number in numbers]
    before, own = ("\n".join(step) for step in steps[:2])
    assert len(prompts) > 1 and all(prompt in own for prompt in prompts), (prompts, own)
    assert not all(prompt in before for prompt in prompts)  # not those of the step before


@functools.cache
def pairs_file(folder, *lines):
    path = pathlib.Path(folder) / f"{abs(hash(lines))}.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return str(path)


GOOD = '{"prompt": "a", "chosen": "b", "rejected": "c"}'
MISTAKES = {
    "unknown objective option": (dict(objective__name="ipo"), "label_smoothing|no option"),
    "unknown objective": (dict(objective__name="dp0"), "did you mean 'dpo'"),
    "unknown optimizer": (dict(optimizer__name="adamm"), "did you mean 'adamw'"),
    "missing file": (dict(data__train="nowhere.jsonl"), "nowhere.jsonl"),
    "missing model": (dict(model__path="./nowhere"), "nowhere"),
    "batch and mesh": (dict(batch_size=6), "batch_size 6 is not divisible by 8"),
    "mesh and devices": (dict(mesh__data=3), "divisible|devices"),
    "mesh and parameters": (dict(mesh__tensor=8, mesh__fsdp=1), "does not divide"),
    "early stopping, nothing held out": (
        dict(eval__stop_metric="-eval/loss", eval__every_steps=2, data__eval_fraction=0.0),
        "nothing is held out to measure it on: name data.eval",
    ),
    "early stopping, no evaluation": (dict(eval__stop_metric="-eval/loss"), "every_steps > 0"),
    "patience alone": (dict(eval__patience=5), "patience = 5 has no effect without"),
    "compile cache": (
        dict(debug__compile_cache="c"),
        "on 8 CPU devices.*compile_cache='' compiles",
    ),
    "positions": (dict(max_length=100000), "positions"),
    "batch and memory": (
        dict(batch_size=8 * 10**7),
        "at least .* GiB on each of 8 devices.*batch of [0-9,]+ rows of.*lower config.batch_size",
    ),
    "model and memory": (
        dict(model__config__intermediate_size=2 * 10**9),
        "GiB: .* of weights and optimizer.*a smaller model",
    ),
    "malformed line": ([GOOD, "{oops"], r"gz:2"),
    "missing field": ([GOOD, '{"prompt": "a", "chosen": "b"}'], r"gz:2.*rejected"),
    "empty response": (['{"prompt": "a", "chosen": "", "rejected": "c"}'], r"gz:1.*(empty|chosen)"),
    "no rows": ([""], "no rows|empty|no examples"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_before_anything_compiles(name, tmp_path, monkeypatch):
    overrides, said = MISTAKES[name]
    if isinstance(overrides, list):
        overrides = dict(data__train=pairs_file(tmp_path, *overrides))
    monkeypatch.setattr(jax, "jit", lambda *_, **__: pytest.fail("compiled"))
    with pytest.raises((ValueError, KeyError, FileNotFoundError), match=f"(?s){said}"):
        setup.prepare(configs.read(tiny(**overrides)), str(tmp_path))


def test_another_config_s_workdir_is_refused_and_the_difference_named(finished):
    with pytest.raises(ValueError, match="objective.beta: 0.1 there, 0.5 here"):
        setup.prepare(configs.read(tiny(objective__beta=0.5)), str(finished))


def test_real_pairs_train_a_real_model(testdata, tmp_path):
    flags = dict(
        model__path=testdata / "models" / "TinyStories-656K",
        total_steps=12,
        batch_size=16,
        max_length=256,
        data__train=testdata / "preference" / "rasbt_instruction_preference.json",
        optimizer__learning_rate=3e-4,
        eval__max_examples=64,
    )
    command = [
        sys.executable,
        "-m",
        "align_jax.train",
        f"--config={CONFIGS / 'tiny.py'}:dpo",
        f"--workdir={tmp_path}",
        *(f"--config.{key.replace('__', '.')}={value}" for key, value in flags.items()),
    ]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(
        command, env=environment, cwd=CONFIGS.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    last = [row for row in rows(tmp_path) if "eval/loss" in row][-1]
    assert (
        last["step"] == 12
        and last["eval/rewards/margins"] > 0.05
        and last["eval/rewards/accuracies"] > 0.6
    )
