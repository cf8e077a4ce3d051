#!/usr/bin/env bash
# From nothing to an aligned model on a CPU: install, a supervised stage, DPO from it, an export, samples before and after.
#   launch/demo.sh [FOLDER for the runs; default runs/demo]
set -euo pipefail
cd "$(dirname "$0")/.."
runs="${1:-runs/demo}"
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --upgrade pip
.venv/bin/python -m pip install --quiet --editable .
python=.venv/bin/python
export JAX_PLATFORMS=cpu
rm -rf "$runs"

echo "== 1. supervised fine-tuning on completions of both kinds"
$python -m align_jax.train --config=configs/tiny.py:sft --workdir="$runs/sft" --config.total_steps=300
$python -m align_jax.export --workdir="$runs/sft" --output="$runs/sft_hf"

echo "== 2. DPO from it on preference pairs"
$python -m align_jax.train --config=configs/tiny.py:dpo --workdir="$runs/dpo" --config.total_steps=100 \
  --config.model.path="$runs/sft_hf" --config.optimizer.learning_rate=2e-4
$python -m align_jax.export --workdir="$runs/dpo" --output="$runs/dpo_hf"

echo "== 3. what it says, before and after"
