#!/usr/bin/env bash
# The classical pipeline on a real tiny model: supervised model, reward model of generated pairs, PPO against it.
# The true reward (a sentiment lexicon) labels the pairs and is reported beside the learned one, with weight 0, so that
# over-optimization shows: the learned reward goes on rising where the true one no longer does.
#   experiments/classical.sh MODEL_DIR STORIES.txt LEXICON.txt [FOLDER; default runs/classical] [PPO rollouts; default 60]
set -euo pipefail
usage() { sed -n '2,/^set /{s/^# \{0,1\}//p}' "$0"; }
case "${1:-}" in -h|--help) usage; exit 0 ;; esac
if [ $# -lt 3 ] || [ $# -gt 5 ]; then usage >&2; exit 2; fi
for path in "$1" "$2" "$3"; do
  [ -e "$path" ] || { echo "experiments/classical.sh: there is no $path" >&2; exit 2; }
done
model="$1" stories="$2" lexicon="$3" runs="${4:-runs/classical}" rollouts="${5:-60}"
python="$(dirname "$0")/../.venv/bin/python"
here="$(dirname "$0")"
train() { $python -m align_jax.train --config="$here/../configs/tiny.py:$1" --workdir="$runs/$1" "${@:2}"; }
true_reward="'lexicon': {'path': '$lexicon'"

echo "== 1. prompts and completions"
$python "$here/stories.py" "$stories" "$runs/data"

echo "== 2. supervised fine-tuning"
train sft --config.model.path="$model" --config.data.train="$runs/data/stories.jsonl" --config.total_steps=60 \
  --config.optimizer.learning_rate=3e-4
$python -m align_jax.export --workdir="$runs/sft" --output="$runs/sft_hf"

echo "== 3. samples, labeled by the true reward"
$python -m align_jax.sample --model="$runs/sft_hf" --prompts="$runs/data/prompts.jsonl" --output="$runs/samples.jsonl" \
  --samples_per_prompt=4 --temperature=1.0 --max_new_tokens=32 --dtype=float32
$python -m align_jax.label --samples="$runs/samples.jsonl" --output="$runs/pairs.jsonl" --feedback=pairwise \
  --pairing=random --rewards="{\"lexicon\": {\"path\": \"$lexicon\"}}"

echo "== 4. the reward model"
train reward --config.model.path="$runs/sft_hf" --config.data.train="$runs/pairs.jsonl" --config.total_steps=100 \
  --config.optimizer.learning_rate=3e-4
$python -m align_jax.export --workdir="$runs/reward" --output="$runs/reward_hf"

echo "== 5. PPO against it"
train ppo --config.model.path="$runs/sft_hf" --config.data.train="$runs/data/prompts.jsonl" \
  --config.batch_size=64 --config.rollout.responses_per_prompt=1 --config.rollout.max_new_tokens=32 \
  --config.objective.epochs=2 --config.objective.minibatches=2 --config.objective.kl_coef=0.02 \
  --config.total_steps=$((4 * rollouts)) --config.optimizer.learning_rate=3e-4 --config.log.every_steps=4 \
  --config.rewards="{'model': {'path': '$runs/reward_hf', 'rows': 32}, $true_reward, 'weight': 0.0}}"

echo "== 6. the learned reward and the true one, over the rollouts"
$python - "$runs/ppo/metrics.jsonl" <<'PYTHON'
import json, sys
rows = [row for row in map(json.loads, open(sys.argv[1])) if "rewards/model" in row]  # evaluations have rows too
print("| rollouts | learned reward | true reward | KL, nats |\n|---|---|---|---|")
for number, row in enumerate(rows, 1):
    if number == 1 or number % 5 == 0:
        print(f"| {number} | {row['rewards/model']:.3f} | {row['rewards/lexicon']:.3f} | {row['objective/kl']:.2f} |")
PYTHON
