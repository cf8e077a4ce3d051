#!/usr/bin/env bash
# Install the test extra into .venv and run the style check and the whole suite: launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --upgrade pip
# PyTorch first and by its exact version: a range would bring gigabytes of CUDA packages
.venv/bin/python -m pip install --quiet "torch==2.13.0"
.venv/bin/python -m pip install --quiet --editable ".[test,tensorboard]"
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 HF_HUB_OFFLINE=1
.venv/bin/python -m ruff check
.venv/bin/python -m ruff format --check
# One process a core; each begins with a stretch of neighbors, which share what they compile.
.venv/bin/python -m pytest -rsfE --durations=15 --numprocesses=auto --maxprocesses=4 --dist=worksteal "$@"
