# SPDX-License-Identifier: Apache-2.0
"""The manifests and the notebook are sound, and what they run exists with the options they give
it."""

import ast
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import types

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
MAIN = LAUNCH.parent / "align_jax"
sys.path.append(str(LAUNCH.parent / "tests/faults"))

import processes  # noqa: E402

SCRIPTS = [f"{path.parent.name}/{path.name}" for path in LAUNCH.parent.glob("*/*.sh")]


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.sh")))
def test_scripts_are_bash_and_stop_at_the_first_failure(script):
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)
    assert "set -euo pipefail" in (LAUNCH / script).read_text()


def test_the_jobset_starts_all_hosts_of_a_slice_and_tells_preempted_from_finished():
    job = yaml.safe_load((LAUNCH / "gke/train.yaml").read_text())
    spec = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = spec["template"]["spec"]
    container = pod["containers"][0]
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = int(container["resources"]["limits"]["google.com/tpu"])
    assert spec["parallelism"] == spec["completions"] == int(rows) * int(columns) // chips
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert {"name": "ALIGN_JAX_STOPPED_STATUS", "value": "75"} in container["env"]
    # no shell: SIGTERM has to reach Python
    assert container["command"][:3] == ["python", "-m", "align_jax.train"]
    assert spec["backoffLimit"] == 0 and job["spec"]["failurePolicy"]["maxRestarts"] > 0
    config = next(word for word in container["command"] if word.startswith("--config=")).split("=")[
        1
    ]
    assert (LAUNCH.parent / config.split(":")[0]).exists()


def test_the_quick_tests_exist():
    text = (LAUNCH / "test.sh").read_text()
    table = re.search(r"table=(\S+)", text)[1]
    listed = re.search(r"tests=\(\n(.*?)\)", text, re.S)[1].replace("$table", table).split()
    assert len(listed) > 5
    for name in listed:
        path, _, function = name.partition("::")
        assert (LAUNCH.parent / path).exists(), name
        assert not function or f"def {function}(" in (LAUNCH.parent / path).read_text(), name


def test_the_workflow_runs_the_whole_suite_on_every_python_that_is_promised():
    workflow = yaml.safe_load((LAUNCH.parent / ".github/workflows/test.yml").read_text())
    job = workflow["jobs"]["test"]
    assert "launch/test.sh" in [step.get("run") for step in job["steps"]]
    promised = re.findall(r"Python :: (3\.\d+)", (LAUNCH.parent / "setup.cfg").read_text())
    assert job["strategy"]["matrix"]["python"] == promised


def _code(without="", name="colab"):
    notebook = json.loads((LAUNCH / f"{name}.ipynb").read_text())
    assert notebook["nbformat"] == 4 and notebook["nbformat_minor"] == 5
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        assert cell["cell_type"] in ("code", "markdown") and isinstance(cell["metadata"], dict)
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    return [
        "".join(one["source"]) for one in code if without not in one["metadata"].get("tags", ())
    ]


def test_the_notebook_is_valid_and_its_programs_have_the_options_that_it_gives():
    for source in _code():
        ast.parse(re.sub(r"^(\s*)[!%].*$", r"\1pass", source, flags=re.M))
        for module, options in re.findall(r"-m align_jax\.(\w+)(.*)$", source, re.M):
            text = (MAIN / f"{module}.py").read_text()
            for option in re.findall(r"--(\w+)[=.]", options):
                assert re.search(rf"""["'](--)?{option}["']""", text), (
                    f"align_jax.{module} has no --{option}"
                )


@pytest.mark.parametrize(("name", "steps"), [("kto", 5), ("grpo", 3)])
def test_a_notebook_runs_from_its_first_cell_to_its_last(
    name, steps, tiny_chat, tmp_path, monkeypatch
):
    main = types.ModuleType("__main__")  # where a notebook's functions lie
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setenv("MODEL", tiny_chat)
    monkeypatch.chdir(tmp_path)
    for source in _code(name=name):
        if "pip install" in source:
            assert "import sys" in source and "{sys.executable}" in source
        else:
            exec(compile(source, name, "exec"), vars(main))
    assert main.result.metrics[-1]["step"] == steps  # an epoch of what is not held out
    assert main.result._repr_html_().startswith("<iframe")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_a_script_does_nothing_else(script, tmp_path):
    copy = tmp_path / script
    copy.parent.mkdir()
    shutil.copy(LAUNCH.parent / script, copy)
    found = subprocess.run(
        ["bash", str(copy), "--help"], capture_output=True, text=True, timeout=20
    )
    assert found.returncode == 0 and found.stderr == "" and f"  {script}" in found.stdout
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [copy]


@pytest.fixture
def demo(tmp_path):
    """launch/demo.sh beside programs that do nothing."""
    (tmp_path / "launch").mkdir()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    python = tmp_path / ".venv/bin/python"
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    script = shutil.copy(LAUNCH / "demo.sh", tmp_path / "launch/demo.sh")

    def run(*arguments):
        line = ["bash", str(script), *arguments]
        return subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, timeout=20)

    return run


def test_the_demo_leaves_a_folder_alone_that_it_did_not_make(demo, tmp_path):
    (tmp_path / "mine/sft").mkdir(parents=True)
    found = demo("mine")
    assert found.returncode == 2 and "was not made by this script" in found.stderr
    assert (tmp_path / "mine/sft").is_dir() and not (tmp_path / "mine/.made_by_demo").exists()
    (tmp_path / "file").write_text("mine")
    assert demo("file").returncode == demo("a", "b").returncode == demo("--x").returncode == 2
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("arguments, folder", [((), "runs/demo"), (("new",), "new")])
def test_the_demo_removes_what_it_made_and_no_more(demo, tmp_path, arguments, folder):
    assert demo(*arguments).returncode == 0
    for name in ("sft/checkpoints", "dpo_hf", "mine"):
        (tmp_path / folder / name).mkdir(parents=True)
    assert demo(*arguments).returncode == 0
    left = sorted(path.name for path in (tmp_path / folder).iterdir())
    assert left == [".made_by_demo", "mine"]


SMALL = (
    "--config.total_steps=2 --config.model.config.hidden_size=32 --config.eval.max_examples=32 "
    "--config.model.config.num_hidden_layers=1 --config.model.config.intermediate_size=64"
)


def test_the_notebooks_cells_run(tmp_path, monkeypatch):
    """The shell's lines as programs of this tree, /content in a folder of the test."""
    shown = []
    display = types.SimpleNamespace(HTML=str, display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)

    def shell(line):
        words = shlex.split(line.format(sys=sys))
        if words[1] != "-m":
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
            return
        started = processes.fork(words[2], words[3:], log=tmp_path / "log")
        processes.wait(started, tmp_path / "log")

    names = {"sys": sys, "shell": shell}
    for source in _code(without="install"):
        source = source.replace("/content", str(tmp_path)).replace(
            "--config.total_steps=100", SMALL
        )
        exec(re.sub(r"^!(.*)$", lambda line: f"shell({line[1]!r})", source, flags=re.M), names)
    assert len(shown) == 1 and "&lt;td&gt;run&lt;/td&gt;&lt;td&gt;dpo&lt;/td&gt;" in shown[0]
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 4
    assert (tmp_path / "hf/model.safetensors").exists()
