# SPDX-License-Identifier: Apache-2.0
"""Command lines, config files and samples to be labeled, damaged: done, or one message and status
2."""

import importlib
import io
import json
import os
import pathlib
import re
import runpy
import signal
import sys
import warnings

import hypothesis
import junk
import pytest
from hypothesis import strategies as st
from oracle import Wrong, fuzzed, judge

from align_jax import config as program
from align_jax import label
from align_jax.core import config as configs
from align_jax.core.options import DataOptions
from align_jax.data import datasets
from align_jax.online import rewards
from align_jax.runs.weights import load_model

ROOT = pathlib.Path(__file__).parents[2]
CONFIG_FILE = """from align_jax.core import config

def get_config(arg=None):
    made = config.defaults()
    made.total_steps = 2
    made.data.train = "a.jsonl"
    made.optimizer.learning_rate = 1e-3
    made.objective = {"name": "dpo", "beta": 0.1}
    return made
"""
SAMPLES = [
    {
        "prompt": [{"role": "user", "content": f"q{i}"}],
        "output": f"a{i}{j}",
        "prompt_id": i,
        "sample_id": j,
        "reward": 0.5 * i + j,
        "finish": "stop",
    }
    for i in range(2)
    for j in range(3)
]
KEYS = [key.name for key in program.keys(configs.defaults())]
# program -> what is always typed; a model or run that is not there ends those that would compute
TYPED = {
    "config": ["--config=good.py"],
    "objectives": [],
    "label": ["--samples=samples.jsonl", "--output=out.jsonl"],
    "report": ["--output=out"],
    "export": ["--model=./none", "--output=out"],
    "sample": ["--model=./none", "--prompts=p.jsonl", "--output=out.jsonl"],
    "evaluate": ["--model=./none", "--eval=preference=p.jsonl"],
    "plan": ["--config=good.py", "--topology=v9:1x1"],
}
FLAGS = {
    name: re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", (ROOT / f"align_jax/{name}.py").read_text())
    for name in TYPED
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    for name in TYPED:  # once, not in each fork
        importlib.import_module(f"align_jax.{name}")
    for name in ("huggingface_hub", "transformers.models.auto", "safetensors"):
        importlib.import_module(name)
    made = tmp_path_factory.mktemp("a") / "b/c/d"
    made.mkdir(parents=True)
    (made / "good.py").write_text(CONFIG_FILE)
    (made / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in SAMPLES))
    return made


class Typed(SystemExit):
    """What a program said as it left with another status than 0."""


def run(name, arguments, folder):
    """Run a program in a fork of this process and return what it printed.

    Raises:
        SystemExit: it made a mistake known, with status 2.
        AssertionError: any other status.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX's threads: the child computes nothing
        child = os.fork()
    if not child:
        os.close(reading)
        _child(name, arguments, folder, writing)
    os.close(writing)
    try:
        with open(reading, "rb") as source:
            said = source.read().decode(errors="replace")
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 2 and "Traceback" not in said:
        raise SystemExit(said)
    assert status == 0, f"status {status}: {said[-300:]}"
    return said


def _child(name, arguments, folder, writing):
    status = 70
    try:
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(n, "wb"), "utf-8") for n in (1, 2))
        os.chdir(folder)
        sys.argv = [name, *arguments]
        # runpy would keep what the tests' import hook makes of a program under the program's name
        sys.dont_write_bytecode = True
        runpy.run_module(f"align_jax.{name}", run_name="__main__", alter_sys=True)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        print(f"Traceback {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


words = st.one_of(junk.texts, junk.numbers.map(lambda value: f"{value}"[:400]), st.text(max_size=4))


def typable(text):
    """Tell whether a terminal can hand this to a program."""
    try:
        return "\0" not in text and bool(text.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:
        return False


@st.composite
def lines(draw):
    """(program, arguments)."""
    name = draw(st.sampled_from(list(TYPED)))
    arguments = list(TYPED[name])
    for _ in range(draw(st.integers(1, 2))):
        value = draw(words)
        keys = [f"config.{key}" for key in KEYS] if "--config=good.py" in arguments else []
        flag = draw(st.sampled_from([*keys, *FLAGS[name], "xyzzy", "config.a.b", "help", "debug2"]))
        form = draw(
            st.sampled_from(("--{}={}",) * 6 + ("--{0}", "-{}={}", "--no{}", "{1}", "--{1}"))
        )
        arguments.append(form.format(flag, value))
    return name, [one for one in arguments if typable(one)]


@fuzzed(short=25, share=1)
@hypothesis.given(case=lines())
def test_a_command_line_is_done_or_one_message(folder, case):
    name, arguments = case
    judge(
        "command lines", case, lambda: run(name, arguments, folder), names=[f"align_jax.{name}: "]
    )


@st.composite
def files(draw):
    """A config file's text, damaged."""
    text = CONFIG_FILE
    for _ in range(draw(st.integers(1, 2))):
        how, at = draw(st.sampled_from(("cut", "word", "value"))), draw(st.integers(0, len(text)))
        if how == "cut":
            text = text[:at] + text[at + draw(st.integers(1, 9)) :]
        elif how == "word":
            text = (
                text[:at]
                + draw(st.sampled_from((" ", "x", "(", "'", "\n", "1", "None", "\t")))
                + text[at:]
            )
        else:
            value = draw(junk.values)
            line = draw(st.sampled_from(re.findall(r"= (.*)\n", text) or [text]))
            text = text.replace(line, repr(value)[:400], 1)
    return text


@fuzzed(short=25, share=1)
@hypothesis.given(text=files())
def test_a_config_file_is_used_or_named_with_its_line(folder, text):
    (folder / "cfg.py").write_text(text, errors="surrogatepass")
    judge(
        "config files",
        text,
        lambda: run("config", ["--config=cfg.py"], folder),
        names=["cfg.py", "config.", "objective = "],
    )


@st.composite
def labelings(draw):
    """(samples, options of label)."""
    samples = draw(junk.mutated(SAMPLES, least=0))
    options = {
        "kind": draw(st.sampled_from(label.KINDS)),
        "pairing": draw(st.sampled_from(label.PAIRINGS)),
        "threshold": draw(st.one_of(st.sampled_from(("0", "1", "mean", "median")), words)),
        "round_number": draw(st.sampled_from((0, 1, 10**12))),
    }
    scored = draw(st.sampled_from((None, None, {"length": 1.0}, {"exact": {"column": "finish"}})))
    return samples, options, scored


@fuzzed(short=40, share=2)
@hypothesis.given(case=labelings())
def test_samples_are_labeled_as_they_say_or_named(folder, case):
    samples, options, scored = case
    path, written = folder / "cases.jsonl", folder / "made.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in samples))

    def act():
        found = label.read_samples(str(path))
        if scored:
            weighted = rewards.resolve(scored, load_model=load_model)
            found = label.score(found, weighted, show=False)
        known = label.with_rewards(found)
        records = label.make_feedback(known, options.pop("kind"), **options)
        label.check_useful(records[0]["type"].split("_")[0] if records else "binary", records, True)
        label.write(str(written), records)
        return known, records

    def check(made):
        known, records = made
        rows = [json.loads(line) for line in written.read_bytes().splitlines()]
        if rows != records:
            raise Wrong("what is written is not what was made")
        kinds = {"binary": "unpaired", "pairwise": "pairs", "scalar": "scored"}
        kind = kinds[rows[0]["type"].split("_")[0]]
        read = datasets.load(
            [str(written)], "unpaired" if kind == "scored" else kind, DataOptions(), chat=True
        )
        if not read.items and rows:
            raise Wrong("no record can be read")
        for row in rows:
            if row["type"] == "pairwise_feedback" and (row["reward_A"] > row["reward_B"]) != bool(
                row["label"]
            ):
                raise Wrong(f"label {row['label']} of {row['reward_A']} and {row['reward_B']}")

    judge(
        "samples to label",
        case,
        act,
        names=["cases.jsonl", "threshold", "prompt_id", "reward", "--"],
        check=check,
    )
