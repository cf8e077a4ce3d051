#!/usr/bin/env bash
# PPO alone and PPO-ptx, from a real tiny model: the reward, and the perplexity of held-out stories.
#   experiments/ptx.sh MODEL_DIR STORIES.txt LEXICON.txt [FOLDER; default runs/ptx]
set -euo pipefail
usage() { sed -n '2,/^set /{s/^# \{0,1\}//p}' "$0"; }
case "${1:-}" in -h|--help) usage; exit 0 ;; esac
if [ $# -lt 3 ] || [ $# -gt 4 ]; then usage >&2; exit 2; fi
for path in "$1" "$2" "$3"; do
  [ -e "$path" ] || { echo "experiments/ptx.sh: there is no $path" >&2; exit 2; }
done
model="$1" stories="$2" lexicon="$3" runs="${4:-runs/ptx}"
python="$(dirname "$0")/../.venv/bin/python"
here="$(dirname "$0")"

$python "$here/stories.py" "$stories" "$runs/data"
for name in prompts stories; do head -240 "$runs/data/$name.jsonl" > "$runs/data/$name.train.jsonl"; done
tail -n +241 "$runs/data/stories.jsonl" > "$runs/data/held_out.jsonl"
perplexity() { $python -m align_jax.evaluate "$@" --eval=perplexity="$runs/data/held_out.jsonl" --max_length=160; }

perplexity --model="$model"
for coef in 0.0 1.0; do
  text=()
  [ "$coef" = 0.0 ] || text=(--config.data.text="$runs/data/stories.train.jsonl")
  $python -m align_jax.train --config="$here/../configs/tiny.py:ppo" --workdir="$runs/ppo_$coef" \
    --config.model.path="$model" --config.data.train="$runs/data/prompts.train.jsonl" --config.data.eval_fraction=0.0 \
    --config.objective.ptx_coef="$coef" "${text[@]}" --config.objective.kl_coef=0.0 --config.objective.epochs=2 \
    --config.objective.minibatches=2 --config.batch_size=32 --config.max_length=160 --config.total_steps=120 \
    --config.rollout.responses_per_prompt=2 --config.rollout.max_new_tokens=24 --config.optimizer.learning_rate=5e-4 \
    --config.log.every_steps=4 --config.rewards="{'lexicon': {'path': '$lexicon'}}"
  perplexity --workdir="$runs/ppo_$coef"
done
