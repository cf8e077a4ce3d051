# SPDX-License-Identifier: Apache-2.0
"""The metric log: rows, means, resumption, and what is said without a terminal."""

import functools
import importlib.util
import io
import json
import math
import operator
import os
import sys
import types

import jax.numpy as jnp
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from align_jax.core import metrics, progress


def _rows(folder):
    return metrics.read_rows(folder / "metrics.jsonl")


def test_push_hands_back_the_step_before(tmp_path):
    recorder = metrics.Recorder(metrics.open_writers(str(tmp_path)), every_steps=1)
    assert recorder.push(1, {"loss": jnp.float32(3.0)}) is None
    assert recorder.push(2, {"loss": jnp.float32(2.0)}) == (1, {"loss": 3.0})
    assert recorder.flush() == (2, {"loss": 2.0})
    assert recorder.flush() is None
    recorder.close()
    assert [(row["step"], row["loss"]) for row in _rows(tmp_path)] == [(1, 3.0), (2, 2.0)]


def test_rows_hold_interval_means_the_last_learning_rate_and_running_tokens(tmp_path):
    recorder = metrics.Recorder(
        metrics.open_writers(str(tmp_path)),
        every_steps=2,
        start_tokens=100,
        flops_per_step=10.0,
        peak_flops=1e3,
    )
    for step in range(1, 6):
        recorder.push(
            step,
            {
                "loss": jnp.float32(step),
                "learning_rate": jnp.float32(step),
                "num_tokens": jnp.int32(7),
                "rewards/chosen": jnp.float32(math.nan if step == 3 else step),
            },
        )
    recorder.close()
    rows = _rows(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert [row["loss"] for row in rows] == [1.5, 3.5, 5.0]
    assert [row["learning_rate"] for row in rows] == [2.0, 4.0, 5.0]
    assert [row["num_tokens"] for row in rows] == [114, 128, 135]
    assert rows[1]["rewards/chosen"] == 4.0  # a step without chosen responses says nothing of them
    assert all(row["tokens_per_second"] > 0 and row["mfu"] > 0 for row in rows[:2])


def test_throughput_leaves_out_the_first_step_and_pauses(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    recorder = metrics.Recorder(metrics.open_writers(str(tmp_path)), every_steps=3)
    for step, seconds in ((1, 60.0), (2, 2.0), (3, 2.0)):
        now[0] += seconds
        recorder.push(step, {"num_tokens": 10})
        recorder.flush()
        with recorder.paused():
            now[0] += 1000.0
    recorder.close()
    assert _rows(tmp_path)[0]["tokens_per_second"] == pytest.approx(20 / 4)


def test_a_resumed_run_drops_the_rows_that_it_will_write_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    writer = metrics.JsonLines(path, start_step=1)
    writer.write(2, {"loss": math.nan})
    writer.close()
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first == {"step": 1, "loss": 1.0}
    assert (second["step"], second["loss"]) == (2, None)


def test_rows_are_read_by_bytes_and_a_cut_character_is_no_end_of_the_run(tmp_path):
    path = tmp_path / "samples.jsonl"
    rows = [{"step": 1, "output": "a\u2028b\x85c"}, {"step": 2, "output": "é"}]
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(lines[0] + b"\n" + lines[1][:-4])  # a crash within the character
    assert metrics.read_rows(path) == rows[:1]
    writer = metrics.JsonLines(path, start_step=1)
    writer.append(rows[1])
    writer.close()
    assert metrics.read_rows(path) == rows


def test_a_run_that_begins_anew_keeps_no_row_of_an_earlier_start(tmp_path):
    for _ in range(2):  # killed after its first evaluation, before its first checkpoint
        (writer,) = metrics.open_writers(str(tmp_path))
        writer.write(0, {"eval/loss": 1.0})
        writer.close()
    assert [row["step"] for row in _rows(tmp_path)] == [0]


class _Bucket(MemoryFileSystem):
    """A gs:// that lives in memory."""

    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("gs://").strip("/")


def test_in_a_bucket_the_file_is_written_anew(monkeypatch):
    bucket = "gs://bucket/run"
    monkeypatch.setattr(
        "etils.epath.backend.fsspec_backend._get_filesystem", lambda name: _Bucket()
    )
    monkeypatch.setattr(metrics, "UPLOAD_SECONDS", 0.0)
    for start in (0, 3):
        recorder = metrics.Recorder(
            metrics.open_writers(bucket, start_step=start), every_steps=1, start_step=start
        )
        for step in range(start + 1, start + 6):
            recorder.push(step, {"loss": step / 2})
        recorder.close()
    rows = metrics.read_rows(f"{bucket}/metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [
        (step, step / 2) for step in range(1, 9)
    ]
    monkeypatch.setattr(metrics, "UPLOAD_SECONDS", 1e9)  # a kill comes before the next upload
    recorder = metrics.Recorder(metrics.open_writers(bucket, start_step=8), every_steps=1)
    recorder.push(9, {"loss": 4.5})
    recorder.flush()
    recorder.sync()  # a checkpoint follows
    assert metrics.read_rows(f"{bucket}/metrics.jsonl")[-1]["step"] == 9


def test_a_bad_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: expected a JSON object with 'step'"):
        metrics.read_rows(path)


def test_means_are_weighted_and_nan_without_weight():
    total = None
    for value, weight in ((3.0, 1.0), (10.0, 4.0)):
        total = metrics.add_sums(
            total, {"a": (jnp.float32(value), jnp.float32(weight)), "b": (0.0, 0.0)}
        )
    result = metrics.means(total)
    assert result["a"] == pytest.approx(13 / 5)
    assert math.isnan(result["b"])
    with pytest.raises(ValueError, match="metrics changed between batches"):
        metrics.add_sums(total, {"a": (1.0, 1.0)})


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_step_stops_the_run_and_says_where(name, value):
    values = {"loss": 1.0, "grad_norm": 1.0, "rewards/chosen": math.nan}
    # a run from a cache reads no row for a step that is as it should be
    metrics.check_finite(values, step=7, saved=5, position=lambda: pytest.fail("rows were read"))
    with pytest.raises(FloatingPointError, match=f"step 7: {name} is .*step 5.*train.jsonl:3"):
        metrics.check_finite(
            values | {name: value}, step=7, saved=5, position=lambda: "train.jsonl:3"
        )


def test_tensorboard_files_appear_when_asked_and_a_missing_package_is_named(tmp_path, monkeypatch):
    writers = metrics.open_writers(str(tmp_path), tensorboard=True)
    for writer in writers:
        writer.write(1, {"loss": 1.0})
        writer.close()
    assert list((tmp_path / "tensorboard").glob("events.*"))
    asked = {"every_steps": 1, "tensorboard": True, "wandb": "project"}
    for package, words in (
        ("tensorboardX", "config.log.tensorboard = True needs tensorboardX.*pip install.* False"),
        ("wandb", "config.log.wandb = 'project' needs wandb.*align_jax.wandb.* ''"),
    ):
        others = functools.partial(operator.ne, package)
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, there=others: there(name) or None
        )
        with pytest.raises(ValueError, match=words):
            metrics.check_installed(asked)
    metrics.check_installed({"every_steps": 1, "tensorboard": False, "wandb": ""})


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    runs = []
    run = types.SimpleNamespace(
        log=lambda values, step: runs.append((step, values)), finish=lambda: None
    )
    fake = types.SimpleNamespace(
        util=types.SimpleNamespace(generate_id=lambda: f"id{len(runs)}"),
        init=lambda **options: runs.append(options["id"]) or run,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        writer = metrics.open_writers(str(tmp_path), wandb="project")[-1]
        writer.write(3, {"loss": 1.0})
        writer.close()
    assert runs == ["id0", (3, {"loss": 1.0}), "id0", (3, {"loss": 1.0})]


def test_trackio_goes_on_in_the_same_run(tmp_path, monkeypatch):
    runs = []
    run = types.SimpleNamespace(
        log=lambda values, step: runs.append((step, values)), finish=lambda: None
    )
    fake = types.SimpleNamespace(
        init=lambda project, **options: runs.append((project, options)) or run
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    for _ in range(2):
        writer = metrics.open_writers(str(tmp_path), trackio="project", config={"seed": 1})[-1]
        writer.write(3, {"loss": 1.0})
        writer.close()
    (project, options), row, *again = runs
    assert project == "project" and row == (3, {"loss": 1.0}) and again == runs[:2]
    assert options["resume"] == "allow" and options["config"] == {"seed": 1}
    assert options["name"].startswith(f"{tmp_path.name}-")


def test_without_a_terminal_there_is_a_line_every_k_steps():
    stream = io.StringIO()
    bar = progress.Progress(10, start_step=2, every_steps=3, stream=stream)
    for step in range(3, 11):
        bar.update(step, {"loss": 0.5, "rewards/margins": 0.25, "tokens_per_second": 1000.0})
    bar.note("saved")
    bar.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[2] for line in lines[:-1]] == ["5/10", "8/10", "10/10"]
    assert (
        "loss 0.5  margin 0.25  tokens/s 1,000" in lines[0]
        and lines[1].endswith("left")
        and lines[-1] == "saved"
    )


def test_on_a_terminal_there_is_a_bar(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    bar = progress.Progress(4, stream=stream)
    bar.update(4, {"loss": 0.5})
    bar.close()
    assert "loss=0.5" in stream.getvalue() and "4/4" in stream.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_outlives_whoever_watched_it(terminal):
    reading, writing = os.pipe()
    stream = open(writing, "w")
    stream.isatty = lambda: terminal
    bar = progress.Progress(9, every_steps=1, stream=stream)
    os.close(reading)
    for step in range(1, 9):
        bar.update(step, {"loss": 0.5})
        bar.note("saved")
    bar.close()
    print("said by another part", file=stream, flush=True)
    stream.close()


def test_other_processes_say_nothing():
    stream = io.StringIO()
    bar = progress.Progress(4, every_steps=1, stream=stream, shown=False)
    bar.update(1, {"loss": 0.5})
    bar.note("hello")
    assert not stream.getvalue()


@pytest.mark.parametrize("width", [80, 50])
def test_samples_are_a_table_that_fits_the_screen(width):
    rows = [
        {"prompt": [{"role": "user", "content": "What is " + "1 + " * 40 + "2?"}], "output": "3."},
        {"prompt": "hi\n\nthere", "output": "你好" * 60, "other": "é" * 90, "win": 0.5},
        {"prompt": "", "output": "\x1b[2J", "other": "", "win": None, "reward": -0.12345678},
    ]
    text = progress.samples_table(rows, width=width)
    lines = text.splitlines()
    assert len(lines) == 4 and "\x1b" not in text and "\\x1b[2J" in text
    assert lines[0].split() == ["prompt", "output", "other", "reward", "win"]
    assert all(len(line) + sum(one in "你好" for one in line) <= width for line in lines)
    assert "+ 2?" in lines[1] and lines[1].startswith("…") and "hi there" in lines[2]
    assert "-0.1235" in lines[3] and lines[2].endswith("0.5")


def test_samples_go_to_the_screen_and_the_dashboards(tmp_path, monkeypatch):
    rows = [
        {"prompt": [{"role": "user", "content": "Hi"}], "output": "# a\nb", "reward": 0.5},
        {"prompt": "Ho", "output": "c", "reward": None, "finish": "length"},
    ]
    cells = [["Hi", "# a\nb", 0.5, None], ["Ho", "c", None, "length"]]
    shown = []
    run = types.SimpleNamespace(
        log=lambda values, step: shown.append((step, values["samples"])), finish=lambda: None
    )
    wandb = types.SimpleNamespace(
        util=types.SimpleNamespace(generate_id=lambda: "id"),
        init=lambda **_: run,
        Table=lambda columns, data: (columns, data),
    )
    trackio = types.SimpleNamespace(init=lambda *_, **__: run, Table=wandb.Table)
    for name, fake in {"wandb": wandb, "trackio": trackio}.items():
        monkeypatch.setitem(sys.modules, name, fake)
    writers = metrics.open_writers(str(tmp_path), tensorboard=True, wandb="p", trackio="p")
    stream = io.StringIO()
    recorder = metrics.Recorder(writers, progress.Progress(9, stream=stream))
    recorder.show_samples(7, rows)
    recorder.close()
    assert shown == [(7, (list(metrics.SAMPLE_FIELDS), cells))] * 2
    assert "samples at step 7:\nprompt" in stream.getvalue()
    (events,) = (tmp_path / "tensorboard").glob("events.*")
    assert b"    output: # a\n    b" in events.read_bytes()
