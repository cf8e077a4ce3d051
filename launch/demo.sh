#!/usr/bin/env bash
# From nothing to an aligned model on a CPU: install, a supervised stage, DPO from it, an export, answers before and after.
#   launch/demo.sh [FOLDER for the runs; default runs/demo]
# A FOLDER that is there and was not made by it is left alone; of its own, it removes what it made.
# $DEMO_STEPS: length of the supervised stage, default 300; DPO takes a third.  $PYTHON: makes .venv, default python3.
set -euo pipefail
case "${1:-}" in
  -h|--help) sed -n '2,/^set /{s/^# \{0,1\}//p}' "$0"; exit 0 ;;
  -*) echo "launch/demo.sh: no option $1; --help says what there is" >&2; exit 2 ;;
esac
[ $# -le 1 ] || { echo "launch/demo.sh: expected one FOLDER, got $*" >&2; exit 2; }
[ $# -eq 1 ] || cd "$(dirname "$0")/.."
runs="${1:-runs/demo}"
mark="$runs/.made_by_demo"
if [ -e "$runs" ] && [ ! -e "$mark" ] && { [ ! -d "$runs" ] || [ -n "$(ls -A "$runs")" ]; }; then
  echo "launch/demo.sh: $runs is there and was not made by this script; name a FOLDER that is new or empty" >&2
  exit 2
fi
mkdir -p "$runs"
touch "$mark"
if [ $# -eq 1 ]; then
  runs="$(cd "$runs" && pwd)"
  cd "$(dirname "$0")/.."
fi
steps="${DEMO_STEPS:-300}" # of the supervised stage; DPO takes a third of them
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
python=.venv/bin/python
if ! $python -m pip show --quiet align_jax 2>/dev/null; then
  $python -m pip install --quiet --upgrade pip
  $python -m pip install --quiet --editable .
fi
export JAX_PLATFORMS=cpu
rm -rf "$runs"/{sft,dpo}{,_hf,.json,.jsonl} "$runs/report"

echo "== 1. Supervised fine-tuning on answers of all kinds, the rude ones too"
$python -m align_jax.train --config=tiny:sft --workdir="$runs/sft" --config.total_steps="$steps"
$python -m align_jax.export --workdir="$runs/sft" --output="$runs/sft_hf"

echo "== 2. DPO from there on preference pairs"
$python -m align_jax.train --config=tiny:dpo --workdir="$runs/dpo" --config.total_steps="$((steps / 3))" \
  --config.model.path="$runs/sft_hf" --config.objective.beta=2.0 --config.optimizer.learning_rate=4e-5 \
  --config.eval.every_steps=20
$python -m align_jax.export --workdir="$runs/dpo" --output="$runs/dpo_hf"

echo "== 3. Before and after, on pairs and prompts that neither stage has seen"
for stage in sft dpo; do
  $python -m align_jax.evaluate --model="$runs/${stage}_hf" --eval=preference=builtin:preferences:eval \
    --json="$runs/$stage.json" > /dev/null
  $python -m align_jax.sample --model="$runs/${stage}_hf" --prompts=builtin:preferences:eval --limit=4 \
    --temperature=0.7 --max_new_tokens=80 --output="$runs/$stage.jsonl"
done
$python -m align_jax.report "$runs/sft" "$runs/dpo" --output="$runs/report" > /dev/null
$python - "$runs" <<'PYTHON'
import json, statistics, sys, textwrap

runs = sys.argv[1]
table = {}
for stage in ("sft", "dpo"):
    (found,) = json.load(open(f"{runs}/{stage}.json"))["results"].values()
    for metric in ("logps/chosen", "logps/rejected", "logps/accuracies"):
        table.setdefault(f"held-out {metric}", []).append(f"{found[metric]:.3f}")
    rows = [json.loads(line) for line in open(f"{runs}/{stage}/metrics.jsonl")]
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]  # none of a few steps
    table.setdefault("tokens/s, median", []).append(f"{statistics.median(speeds):,.0f}" if speeds else "-")
print(f"{'':<28}{'after sft':<28}after dpo")
for name, cells in table.items():
    print(f"{name:<28}" + "".join(f"{cell:<28}" for cell in cells).rstrip())
said = [[json.loads(line) for line in open(f"{runs}/{stage}.jsonl")] for stage in ("sft", "dpo")]
for before, after in zip(*said):
    texts = (before["prompt"][-1]["content"], before["output"], after["output"])
    columns = [textwrap.wrap(text, 26) or [""] for text in texts]
    print()
    for line in range(max(map(len, columns))):
        print("".join(f"{c[line] if line < len(c) else '':<28}" for c in columns).rstrip())
PYTHON
echo "== curves and settings: $runs/report/report.html"
echo "== the aligned model is in $runs/dpo_hf: transformers loads it"
