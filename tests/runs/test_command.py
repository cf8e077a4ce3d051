# SPDX-License-Identifier: Apache-2.0
"""What a program says on a terminal: a mistake's message alone, its status, a short help.

Each row is typed as a user would type it; the programs are forked from one process that has done
the imports.
"""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from align_jax.core import config as configs
from align_jax.evals import EVALS

ROOT = pathlib.Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests/faults"))

import processes  # noqa: E402

TINY = f"--config={ROOT}/configs/tiny.py:dpo"
PROGRAMS = "train inspect plan export sample label evaluate report objectives config bench".split()
CONFIG_FILES = {
    "raises": 'raise RuntimeError("mine")\n',
    "lacks": "x = 1\n",
    "other": "def get_config():\n    return {'seed': 1}\n",
    "asks": "def get_config(size):\n    return size\n",
    "platforms": "import os\nraise ValueError(f\"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}\")\n",
    "syntax": "def get_config():\n    x = (\n",
    "imports": "\nimport no_such_module\n",
    "interrupts": "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n",
    "typo": "from align_jax.core import config\n\ndef get_config():\n    made = config.defaults()\n"
    "    made.optimizer.learning_rte = 1\n    return made\n",
}

YAML = "optimizer:\n  lr: 1\n"

# what is typed, in a folder as `folder` makes it -> what is said
MISTAKES = {
    # the command line
    "nosuch": "no program 'nosuch'; known: bench, chat, config,",
    "chat --model=m --output=o": "python -m align_jax chat: --output belongs to --prompts, not to",
    "trian": "no program 'trian'; did you mean 'train'?",
    "train --workdir=x": "python -m align_jax train: missing --config; ",
    ".train": "missing --config, --workdir; --help shows all flags",
    ".train TINY": "missing --workdir; ",
    ".train --workdir=x": "missing --config; ",
    ".train TINY --workdir=": "--workdir is empty",
    ".train --halp": "no flag --halp; did you mean '--help'?",
    ".train TINY --wrkdir=x": "no flag --wrkdir; did you mean '--workdir'?",
    ".train TINY --learning_rate=1": "did you mean '--config.optimizer.learning_rate'?",
    ".train TINY --workdir=x more": "unknown arguments more: flags begin with --",
    ".export --workdir=odd --output=o": "odd/config.json: the config has mistakes:\n"
    "  config.batch_size = 'many': expected an integer\n  config.model = 3: expected its keys",
    ".sample --xyzzy=1": "no flag --xyzzy; --help shows all flags",
    ".bench --prest=tiny_dpo": "did you mean '--preset'?",
    # the short form
    ".train my_prts:hinge --data=p.jsonl": "and no module 'my_prts': start where it lies, or name",
    ".train tny:dpo": "did you mean 'tiny'?",
    ".inspect xyzzy": "; recipes: dpo_70b, dpo_7b, ",
    ".train dpo --data=p.jsonl": "path is empty and so is model.config: name a checkpoint",
    ".train dpo --model": "--model: expected a value",
    ".train dpo --model --data x": "--model: expected a value",
    ".train --config=run/config.json --workdir=x": "expected a recipe's name, or a config",
    ".train --model=m --workdir=x": "--config.model.path changes a key of a config: give --config",
    ".train dpo sft": "unknown arguments sft: flags begin with --",
    # the config file
    ".train --config=typos.py --workdir=x": "--config=typos.py: no such config file; did you mean "
    "'typo.py'?",
    ".config --config=nowhere/a.py": "--config=nowhere/a.py: no such config file",
    ".train --config=raises.py --workdir=x": "raises.py:1: RuntimeError: mine",
    ".plan --config=lacks.py --topology=v5e:2x2": "lacks.py has no function get_config; see ",
    "train lacks.py:x --model=m --data=p.jsonl": "get_config; as an objective it is lacks:x",
    ".train --config=other.py --workdir=x": "other.py: get_config returned a dict; expected",
    ".config xyzzy": "no key or group 'xyzzy'; known: batch_size, checkpoint, data, debug, ",
    ".config --config=asks.py": "get_config(size) does not fit --config=asks.py: missing a req",
    ".config --config=lacks.py --" + "x" * 300: f"no flag --{'x' * 58}...; --help",
    ".export --model=m --output=" + "x" * 300: f"--output={'x' * 60}...: a name of more than 255",
    ".train --config=wrong.yaml --workdir=x": "wrong.yaml:2: the config has no key 'optimizer.lr'",
    ".train --config=syntax.py --workdir=x": "syntax.py:2: '(' was never closed",
    ".config --config=imports.py": "imports.py:2: ModuleNotFoundError: No module named 'no_such",
    ".train --config=typo.py --workdir=x": "typo.py:5: the config has no key 'learning_rte'; "
    "did you mean 'config.optimizer.learning_rate'?",
    ".train TINY:dp0 --workdir=x": "no module 'dpo'; start where it lies",
    # what TRL calls them
    ".train TINY --workdir=x --config.save_steps=1": "mean '--config.checkpoint.every_steps'?",
    ".train dpo --model_name_or_path=m": "did you mean '--model'?",
    ".train TINY --workdir=x --callbacks=x": "no flag --callbacks; --help shows all flags",
    # its keys
    ".train TINY --workdir=x --config.optimizer.learning_rte=1": "did you mean "
    "'--config.optimizer.learning_rate'?",
    ".train TINY --workdir=x --config.optimiser.b1=1": "did you mean '--config.optimizer'?",
    ".train TINY --workdir=x --config.learning_rate=1": "did you mean "
    "'--config.optimizer.learning_rate'?",
    ".train TINY --workdir=x --config.beta=1": "did you mean '--config.objective.beta'?",
    ".train TINY --workdir=x --config.objective.bta=1": "did you mean '--config.objective.beta'?",
    ".train TINY --workdir=x --config.rewards.length=1": "give it whole, as "
    "--config.rewards=\"{'length': ...}\"",
    ".train TINY --workdir=x --config.seed.x=1": "config.seed is a value, not a group of keys",
    ".train TINY --workdir=x --config.batch_size=3.5": "size=3.5: expected an integer",
    ".train TINY --workdir=x --config.optimizer.b1=no": "b1=no: expected a number",
    ".train TINY --workdir=x --config.model.lora.rank=None": "rank=None: expected an integer",
    ".train TINY --workdir=x --config.optimizer=adam": "did you mean --config.optimizer.name?",
    ".train TINY --workdir=x --config.optimizer.b1=2": "config.optimizer.b1 = 2.0: expected ",
    ".train --config.seed=1 TINY --workdir=x": "--config.seed changes a key of a config: give",
    ".config --config.seed=1": "--config.seed changes a key of a config: give --config=FILE, too",
    # what is read
    ".train TINY --workdir=x --config.data.train=empty.jsonl --config.optimizer.warmup_steps=99 "
    "--config.optimizer.warmup_fraction=0": "warmup_steps = 99 is longer than the run's 30 steps",
    ".train TINY --workdir=x --config.data.train=no.jsonl": "no such file: 'no.jsonl'",
    ".train TINY --workdir=x --config.data.train=empty.jsonl": "empty.jsonl: ",
    ".train TINY --workdir=x --config.max_length=8": "cut every response; the longest example has",
    ".train TINY --workdir=x --config.model.path=./no": "no model folder at './no'",
    ".sample --model=./no --prompts=p.jsonl --output=o.jsonl": "no model folder at './no'",
    ".sample --workdir=no --prompts=p.jsonl --output=o.jsonl": "no is not a run's folder: it has",
    ".evaluate --workdir=run --eval=preference=builtin:preferences": "run has no checkpoint: ",
    ".export --workdir=run --output=out --step=first": "--step=first: expected latest, best or a",
    ".label --samples=alien.jsonl --output=o.jsonl": """='{"alien": "assistant"}' says what it is
(--config.* are flags of the programs that take --config, such as train; here change""",
    ".label --samples=s --output=o --feedback=scalar --threshold=1": "--threshold belongs to --",
    ".label --samples=s --output=o --feedback=binary --pairing=max": "--pairing belongs to --f",
    ".label --samples=alien.jsonl --output=alien.jsonl": "is the file that --samples names",
    ".sample --model=m --prompts=p.jsonl --output=./p.jsonl": "is the file that --prompts names",
    ".label --samples=s --output=o.csv": "--output=o.csv: JSON is written, which no",
    ".label --samples=no.jsonl --output=/proc/o": "--output=/proc/o: cannot be written",
    ".label --samples=no.jsonl --output=o.jsonl": "no such file: 'no.jsonl'",
    ".report run --output=out": "run is no workdir: it has no metrics.jsonl",
    ".report --output=out": "name the workdir of a run",
    ".report run run --output=out": "a workdir is named twice: run run",
    ".report run --output=out --watch=-1": "-1 is not a non-negative integer",
    ".objectives dp0": "objective = 'dp0' is unknown; did you mean 'dpo'?",
    ".inspect": "missing --config; ",
    ".inspect TINY --config.data.train=no.jsonl": "no such file: 'no.jsonl'",
    ".inspect TINY --config.model.path=./no": "no model folder at './no'",
    ".inspect TINY --step=0": "0 is not a positive integer",
    # what is written
    ".train TINY --workdir=empty.jsonl": "--workdir=empty.jsonl: expected a folder, but there is",
    ".export --workdir=run --output=/proc/no/out": "--output=/proc/no/out: cannot be written",
    ".sample --model=m --prompts=p --output=/proc/o": "--output=/proc/o: cannot be written",
    ".objectives --json=run": "--json=run: expected a file, but there is a folder",
    # values
    ".sample --model=m": "give --prompts and --output, or --chat",
    ".sample --model=m --prompts=p --output=o --temperature=-1": "-1.0 is not a non-negative n",
    ".sample --model=m --prompts=p --output=o --temperature=inf": "expected a finite number",
    ".sample --model=m --prompts=p --output=o --temperature=nan": "expected a finite number",
    ".sample --model=m --prompts=p.jsonl --output=o --top_p=0": "0 < top_p <= 1",
    ".sample --model=m --prompts=p --output=o --top_p=1.1": "the range [0, 1]",
    ".sample --model=m --prompts=p --output=o --samples_per_prompt=0": "0 is not a positive",
    ".sample --model=m --prompts=p --output=o --dtype=fp32": "float32|bfloat16|float16",
    ".sample --model=m --prompts=p --output=o --temperature=0 --samples_per_prompt=2": "are alike",
    ".sample --model=m --chat --output=o": "--output belongs to --prompts, not to --chat",
    ".sample --workdir=run --prompts=p --output=o --dtype=float32": "--dtype belongs to --model",
    ".evaluate --model=m --eval=prefrence=p": "did you mean 'preference'?",
    ".evaluate --model=m --eval=generation=p": "--eval=generation needs --rewards",
    ".evaluate --model=m --eval=generation=p.jsonl --rewards=[]": "[]: expected reward -> weight",
    ".evaluate --model=m --eval=generation=p --rewards=x --top_p=-1": "the range [0, 1]",
    ".evaluate --model=m --eval=preference=p --temperature=0": "--temperature belongs to --eval=",
    ".export --model=m --output=o --private": "--private belongs to --push_to_hub",
    ".export --model=m --output=o --push_to_hub=mine": "--push_to_hub=mine: expected owner/name",
    ".export --model=m --output=o --dtype=half": "float32|bfloat16|float16",
    ".bench --rounds=0": "0 is not a positive integer",
    ".bench --batch_size=-8": "-8 is not a non-negative integer",
    ".bench --variants=lora2": "--variants = 'lora2' is unknown; did you mean 'lora'?",
    ".plan TINY --topology=v5e:2x2 --search=-1": "-1 is not a non-negative integer",
    ".plan TINY --topology=v9:2x2": "topology 'v9:2x2': expected CHIP:AxB",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("typed")
    (made / "wrong.yaml").write_text(YAML)
    for name, text in CONFIG_FILES.items():
        (made / f"{name}.py").write_text(text)
    (made / "empty.jsonl").touch()
    (made / "p.jsonl").write_text('{"prompt": "p"}\n')
    alien = {"prompt": [{"role": "alien", "content": "q"}], "output": "a"}
    (made / "alien.jsonl").write_text(json.dumps({**alien, "prompt_id": 0, "sample_id": 0}))
    (made / "lacking").mkdir()
    (made / "run").mkdir()
    config = configs.defaults()
    config.update(total_steps=1)
    config.data.train, config.model.config = (
        "builtin:preferences",
        {"hidden_size": 8, "num_attention_heads": 1},
    )
    record = {"config": configs.to_dict(configs.read(config))}
    (made / "run/config.json").write_text(json.dumps(record))
    record["config"] |= {"batch_size": "many", "model": 3}
    (made / "odd").mkdir()
    (made / "odd/config.json").write_text(json.dumps(record))
    return made


def typed(line, folder):
    """Return the status of ``python -m align_jax LINE`` and what it wrote."""
    program, *arguments = shlex.split(line.replace("TINY", TINY))
    name = f"align_jax{program}" if program.startswith(".") else "align_jax"
    arguments = arguments if program.startswith(".") else [program, *arguments]
    started = processes.fork(name, arguments, log=folder / "log", folder=folder)
    [output] = processes.wait(started, folder / "log", expect=None)
    return started[0].wait(), output


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_message_and_status_2(line, folder):
    status, output = typed(line, folder)
    assert MISTAKES[line] in output, output
    assert status == 2 and output.startswith("python -m align_jax"), output
    assert "Traceback" not in output and len(output.splitlines()) <= 3, output
    assert not (folder / "x").exists()


def test_an_interrupt_is_one_line_even_while_a_config_is_made(folder):
    status, output = typed(".train --config=interrupts.py --workdir=x", folder)
    assert (status, output) == (130, "python -m align_jax.train: interrupted\n")


AT_AN_IMPORT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
class Finder:
    def find_spec(name, *_):
        if name == "align_jax.core.choose":  # among the first things that are imported
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
"""


@pytest.mark.parametrize("command", ["-m align_jax.train", "-m align_jax", "align-jax train"])
def test_an_interrupt_is_one_line_from_the_packages_first_line_on(command, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(AT_AN_IMPORT)
    (tmp_path / "align-jax").write_text("from align_jax.__main__ import main\nmain()\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    line = [sys.executable, *command.split(), "--help"]
    found = subprocess.run(line, cwd=tmp_path, env=environment, stderr=-1, text=True, timeout=60)
    name = command if command.startswith("align") else f"python {command}"
    assert (found.returncode, found.stderr) == (130, f"{name}: interrupted\n")


WITHOUT = """
import os, runpy, sys
missing, *lines = sys.argv[1:]
for name in missing.split(","):
    sys.modules[name] = None  # whoever imports it fails
import align_jax.runs.command
if "jax" not in missing:
    import align_jax.losses
for line in lines:
    if not os.fork():
        program, *sys.argv[1:] = line.split()
        runpy.run_module(f"align_jax.{program}", run_name="__main__", alter_sys=True)
    sys.stdout.write(f"== {os.waitstatus_to_exitcode(os.wait()[1])}\\n")
    sys.stdout.flush()
"""
# what is typed -> in the answer
AT_ONCE = {f"{name} --help": f"python -m align_jax.{name}" for name in PROGRAMS} | {
    "export --help": "is written over: its weights (model*, adapter_model*, pytorch_model*, conso",
    f"train {TINY}": "missing --workdir",
    f"plan {TINY} --topolgy=v5e:2x2": "did you mean '--topology'?",
    f"train {TINY} --workdir=x --config.optimizer.learning_rte=1": "optimizer.learning_rate'?",
    "sample --model=m": "give --prompts and --output, or --chat",
    "train dp0 --data=p.jsonl": "--config=dp0: no such recipe, objective or config file; did you "
    "mean 'dpo'?",
    "evaluate --model=m": f"; known: {', '.join(EVALS)}",
    "evaluate --model=m --eval=rewards=r": "'rewards' is unknown; did you mean 'reward'?",
    "evaluate --model=m --eval=perplexity=r --beta=1": "--beta belongs to --eval=preference",
    "export --model=m --output=o --step=3": "--step belongs to --workdir",
    "label --samples=s": "missing --output",
    # what is not there, and values that no recipe takes
    "train dpo --model=/m --data=p.jsonl": "no model folder at '/m'",
    "train dpo --model=run --data=pp.jsonl": "'pp.jsonl'; did you mean 'p.jsonl'?",
    f"inspect {TINY} --config.data.eval=run": "'run' is a directory: name its files",
    f"inspect {TINY} --config.tokenizer=./m": "tokenizer './m': expected 'byte', a directory",
    f"train {TINY} --workdir=x --config.seed=bad": "--config.seed=bad: expected an integer",
    f"plan {TINY} --topology=v5e:2x2 --config.batch_size=0": "batch_size = 0: expected at least 1",
    f"plan {TINY} --topology=v5e:2x2 --config.optimizer.name=adam": "did you mean 'adamw'?",
    f"train {TINY} --workdir=x --config.data.format=pars": "did you mean 'pairs'?",
    f"train {TINY} --workdir=x --config.objective.name=dp0": "did you mean 'dpo'?",
    "sample --chat --model=p.jsonl": "'p.jsonl' is a file (",
    "sample --model=m --prompts=pp.jsonl --output=o": "did you mean 'p.jsonl'?",
    "evaluate --model=m --eval=preference=pp.jsonl": "did you mean 'p.jsonl'?",
    "evaluate --workdir=w --eval=preference=p.jsonl": "w is not a run's folder",
    "export --workdir=w --output=o": "w is not a run's folder",
    "label --samples=pp.jsonl --output=o": "did you mean 'p.jsonl'?",
    # a machine's own chips are not taken, even if the config imports JAX
    "plan --config=platforms.py --topology=v5e:2x2": "JAX_PLATFORMS=cpu",
}
# what the models, the tokenizers and the data are imported for
BEFORE_THE_REST = {
    f"train {TINY} --workdir=x --config.mesh.data=7": "devices are not divisible by 7",
    "train dpo --model=lacking --data=p.jsonl": "no model in 'lacking': there is no lacking/config",
    f"plan {TINY} --topology=v9:2x2": "topology 'v9:2x2': expected CHIP:AxB",
}


@pytest.mark.parametrize(
    ("missing", "lines"), [("jax", AT_ONCE), ("transformers,grain", BEFORE_THE_REST)]
)
def test_help_and_mistakes_of_the_command_line_wait_for_no_import(missing, lines, folder):
    command = [sys.executable, "-c", WITHOUT, missing, *lines]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if missing == "jax":  # else devices are started: those that the suite is given
        environment.pop("JAX_PLATFORMS", None)
    found = subprocess.run(
        command, cwd=folder, env=environment, stdout=-1, stderr=-2, text=True, timeout=120
    )
    *outputs, _ = re.split(r"(?<=== \d)\n", found.stdout)
    for line, output in zip(lines, outputs, strict=True):
        wanted, asked = lines[line], line.endswith("--help")
        assert wanted in output and "Traceback" not in output, output
        assert output.endswith(f"== {0 if asked else 2}") and len(output.splitlines()) < 50
        keys = line.split()[0] in ("train", "inspect", "plan", "config")
        assert ("optimizer.*, " in output) == (asked and keys)


def test_a_terminal_has_a_line_before_the_config_is_made(folder):
    command = """if True:
        import runpy, sys
        sys.modules["jax"] = None
        sys.stderr.isatty = lambda: True
        runpy.run_module("align_jax.train", run_name="__main__", alter_sys=True)
    """
    line = [sys.executable, "-c", command, *shlex.split(TINY), "--workdir=x"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(line, cwd=folder, env=environment, stderr=-1, text=True, timeout=60)
    assert found.returncode and found.stderr.startswith("python -m align_jax.train ...\n")


def test_a_mistake_goes_to_standard_error_and_debug_shows_the_traceback(folder):
    line = f"{TINY} --workdir=x --config.optimizer.b1=2"
    command = [sys.executable, "-m", "align_jax.train", *line.split()]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (found.returncode, found.stdout) == (2, "") and "b1 = 2.0" in found.stderr
    status, output = typed(f".train {line} --debug", folder)
    assert status == 1 and "Traceback" in output
