# SPDX-License-Identifier: Apache-2.0
"""The manifests and the notebook are sound, and what they run exists with the options they give
it."""

import ast
import json
import pathlib
import re
import subprocess

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
MAIN = LAUNCH.parent / "align_jax"


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


def _code():
    notebook = json.loads((LAUNCH / "colab.ipynb").read_text())
    assert notebook["nbformat"] == 4 and notebook["nbformat_minor"] == 5
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        assert cell["cell_type"] in ("code", "markdown") and isinstance(cell["metadata"], dict)
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_is_valid_and_its_programs_have_the_options_that_it_gives():
    for source in _code():
        ast.parse(re.sub(r"^(\s*)[!%].*$", r"\1pass", source, flags=re.M))
        for module, options in re.findall(r"-m align_jax\.(\w+)(.*)$", source, re.M):
            text = (MAIN / f"{module}.py").read_text()
            for option in re.findall(r"--(\w+)[=.]", options):
                assert re.search(rf"""["'](--)?{option}["']""", text), (
                    f"align_jax.{module} has no --{option}"
                )
