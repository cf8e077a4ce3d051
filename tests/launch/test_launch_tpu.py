# SPDX-License-Identifier: Apache-2.0
"""launch/tpu.sh against a gcloud that keeps its "hosts" as folders of this machine and runs what is
sent to them."""

import os
import pathlib
import re
import shlex
import stat
import subprocess
import time

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "launch/tpu.sh"
TRAIN = ["--config=configs/dpo_7b.py:a b", '--workdir=gs://bucket/it\'s "here"', "--config.x=$HOME"]

GCLOUD = r"""#!/usr/bin/env bash
root={root}
printf '%q ' "$@" >> $root/calls; echo >> $root/calls
case "$3 $4" in
  "queued-resources create") echo ACTIVE > $root/state ;;
  "queued-resources delete") rm -f $root/state; rm -rf $root/hosts ;;
  "queued-resources describe") [ -e $root/state ] || exit 1; cat $root/state ;;
  "tpu-vm scp")
    for host in 0 1; do
      home=$root/hosts/${{6%%:*}}.$host; mkdir -p $home; cp "$5" $home/
    done ;;
  "tpu-vm ssh")
    for last; do case "$last" in --command=*) sent="${{last#--command=}}" ;; esac; done
    for host in 0 1; do
      home=$root/hosts/$5.$host; mkdir -p $home/venv/bin $home/.local/bin $home/align_jax
      ln -sf {python} $home/venv/bin/python; ln -sf {uv} $home/.local/bin/uv
      HOME=$home bash -c "$sent"
    done ;;
esac
"""
PYTHON = r"""#!/usr/bin/env bash
# stands for "python -m align_jax.train": keeps its arguments, ends with the status prepared for
# this start
printf '%s\n' "$@" > $HOME/arguments
echo "$ALIGN_JAX_COMMIT $ALIGN_JAX_STOPPED_STATUS" > $HOME/environment
exit $(cat {root}/next_status 2>/dev/null || echo 0)
"""


def _program(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


@pytest.fixture
def cloud(tmp_path):
    uv = _program(tmp_path / "uv", '#!/bin/sh\necho "$@" >> ' + f"{tmp_path}/uv_calls\n")
    python = _program(tmp_path / "python", PYTHON.format(root=tmp_path))
    (tmp_path / "bin").mkdir()
    _program(tmp_path / "bin/gcloud", GCLOUD.format(root=tmp_path, python=python, uv=uv))
    return tmp_path


def _tpu(cloud, command, *arguments, train=(), check=True):
    line = ["bash", str(SCRIPT), command, *arguments, *(["--", *train] if train else [])]
    result = subprocess.run(
        line,
        env=os.environ | {"PATH": f"{cloud}/bin:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


HERE = ("--name=run", "--zone=z", "--poll=0")


def test_arguments_arrive_on_every_host_as_they_were_given(cloud):
    _tpu(cloud, "create", *HERE)
    _tpu(cloud, "push", *HERE)
    _tpu(cloud, "run", *HERE, train=TRAIN)
    end = time.monotonic() + 20
    while len(list(cloud.glob("hosts/*/align_jax.status"))) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    for host in (cloud / "hosts/run.0", cloud / "hosts/run.1"):
        assert (host / "arguments").read_text().splitlines() == ["-m", "align_jax.train", *TRAIN]
        assert re.fullmatch(r"[0-9a-f]{40}\+? 75\n", (host / "environment").read_text())
        assert (host / "align_jax/align_jax/core/schema.py").exists() and not (
            host / "align_jax/.venv"
        ).exists()
    assert _tpu(cloud, "status", *HERE).stdout == "run: ACTIVE\n0\n0\n"


def test_a_preempted_slice_is_asked_for_again_and_the_run_started_again(cloud):
    (cloud / "state").write_text("SUSPENDED\n")
    result = _tpu(cloud, "watch", *HERE, "--spot", "--poll=0.2", train=TRAIN)
    assert (
        "SUSPENDED: asking for it again" in result.stdout and "the run has ended" in result.stdout
    )
    acts = [shlex.split(line)[2:4] for line in (cloud / "calls").read_text().splitlines()]
    acts = [" ".join(act) for act in acts if act[1] not in ("describe", "ssh")]
    assert acts == ["queued-resources delete", "queued-resources create", "tpu-vm scp"]
    assert "--spot" in (cloud / "calls").read_text()


def test_a_run_that_fails_is_started_again_so_often_and_no_more(cloud):
    (cloud / "next_status").write_text("1")
    result = _tpu(cloud, "watch", *HERE, "--restarts=2", "--poll=0.3", train=TRAIN, check=False)
    assert result.returncode == 2 and "failed more than 2 times" in result.stderr
    assert (cloud / "calls").read_text().count("tpu-vm scp") == 3


@pytest.mark.parametrize("slices, nodes", [(1, ["run"]), (3, ["run-0", "run-1", "run-2"])])
def test_dry_run_prints_every_command_and_runs_none(cloud, slices, nodes):
    result = _tpu(
        cloud,
        "up",
        *HERE,
        f"--slices={slices}",
        "--type=v6e-16",
        "--project=p",
        "--dry-run",
        train=TRAIN,
    )
    assert not (cloud / "calls").exists()
    created = next(line for line in result.stdout.splitlines() if "queued-resources create" in line)
    wanted = "--node-id=run" if slices == 1 else "--node-count=3 --node-prefix=run"
    assert (
        wanted in created
        and "--runtime-version=v2-alpha-tpuv6e" in created
        and "--project=p" in created
    )
    for node in nodes:
        assert f"{node}:align_jax.tgz" in result.stdout
        assert f"tpu-vm ssh {node} " in result.stdout
    assert "queued-resources delete run" in result.stdout  # what watch would do after a preemption


@pytest.mark.parametrize(
    "command, arguments, train, message",
    [
        ("fly", HERE, (), "unknown command fly"),
        ("create", ("--name=run",), (), "create needs --name and --zone"),
        ("create", (*HERE, "--tpye=v4-8"), (), "unknown option --tpye=v4-8"),
        ("create", (*HERE, "--type=v9-8"), (), "no runtime version is known for --type=v9-8"),
        ("run", HERE, (), "run needs the arguments"),
        ("run", HERE, ("--config=c", "--workdir=/tmp/x"), "--workdir must be gs://"),
    ],
)
def test_mistakes_are_named_before_anything_is_rented(cloud, command, arguments, train, message):
    result = _tpu(cloud, command, *arguments, train=train, check=False)
    assert result.returncode == 2 and message in result.stderr and not (cloud / "calls").exists()
