#!/usr/bin/env bash
# Install the test extra into .venv; run ruff, mypy and the whole suite, or with --quick a few telling tests of it.
#   launch/test.sh [--quick] [pytest arguments]
# $PYTHON: makes .venv, default python3.
set -euo pipefail
case "${1:-}" in -h|--help) sed -n '2,/^set /{s/^# \{0,1\}//p}' "$0"; exit 0 ;; esac
cd "$(dirname "$0")/.."
tests=()
if [ "${1:-}" = --quick ]; then
  shift
  # The floors; every key; goldens of other programs; a model; what is written and read; a run, stopped and resumed.
  table=tests/losses/test_objectives_table.py
  tests=(
    tests/test_train.py::test_stopped_and_resumed_equals_uninterrupted_to_the_bit
    tests/parity/test_parity_trl.py tests/models/test_llama.py
    $table::test_policy_equal_to_reference_gives_the_known_value
    $table::test_gradient_raises_chosen_above_rejected
    tests/test_floors.py tests/core tests/data/test_formats.py tests/storage/test_workdir.py tests/planner
  )
fi
# The report's test opens its page in a browser.  Without one, and without a network for it, it is skipped.
if [ ${#tests[@]} = 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null &&
    ! { command -v chromium || command -v chromium-browser || command -v google-chrome; } > /dev/null; then
  timeout 240 sh -c "apt-get -o Acquire::http::Timeout=20 -o Acquire::Retries=0 update -qq &&
    DEBIAN_FRONTEND=noninteractive apt-get -o Acquire::http::Timeout=20 install -qq --no-install-recommends chromium" \
    > /dev/null 2>&1 < /dev/null &
fi
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --upgrade pip
# PyTorch first and by its exact version: a range would bring gigabytes of CUDA packages
.venv/bin/python -m pip install --quiet "torch==2.13.0"
.venv/bin/python -m pip install --quiet --editable ".[test,tensorboard]"
wait  # for the browser
unset PYTHONDONTWRITEBYTECODE  # many tests start programs, which read what the first has compiled
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 HF_HUB_OFFLINE=1
.venv/bin/python -m ruff check
.venv/bin/python -m ruff format --check
.venv/bin/python -m mypy
# One process a core; each begins with a stretch of neighbors, which share what they compile.
.venv/bin/python -m pytest -rsfE --durations=15 --numprocesses=auto --maxprocesses=4 --dist=worksteal \
  ${tests[@]+"${tests[@]}"} "$@"
