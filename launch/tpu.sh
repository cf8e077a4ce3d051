#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Rent a TPU slice (or several), train on all of its hosts, go on after a preemption, give it back.
#
#   launch/tpu.sh COMMAND --name=NAME --zone=ZONE [options] [-- arguments of align_jax.train]
#
#   create   ask for the slice as a queued resource and wait until it is there
#   push     copy this source tree to every host and install it there
#   run      start "python -m align_jax.train ARGUMENTS" on every host, in the background
#   logs     follow a host's log (--worker=0)
#   status   the slice's state, and on every host: running, or the exit status
#   stop     SIGTERM on every host: all save the same step and stop
#   watch    until the run has ended well: create what is missing, start what has stopped, begin anew after a preemption
#   delete   give the slice back
#   up       create, push, run, watch
#
#   --project=P  --type=v5litepod-64  --runtime=VERSION (default: by type)  --slices=N  --spot  --reserved
#   --worker=I   --slice=I (for logs)  --restarts=20 (for watch: of a run that fails)  --poll=60 (seconds)
#   --dry-run    print every command instead of running it
#
# WORKDIR in the arguments must be gs://...: the hosts share nothing else.
set -euo pipefail

name="" zone="" project="" type="v5litepod-64" runtime="" slices=1 spot="" reserved="" worker=0 slice=0 restarts=20
poll=60 dry=""
usage() { sed -n '3,24s/^# \{0,1\}//p' "$0"; exit "${1:-2}"; }
fail() { echo "launch/tpu.sh: $*" >&2; exit 2; }
[ $# -gt 0 ] || usage
command="$1"; shift
while [ $# -gt 0 ]; do
  case "$1" in
    --name=*|--zone=*|--project=*|--type=*|--runtime=*|--slices=*|--worker=*|--slice=*|--restarts=*|--poll=*)
      key="${1%%=*}"; printf -v "${key#--}" '%s' "${1#*=}" ;;
    --spot) spot="--spot" ;;
    --reserved) reserved="--reserved" ;;
    --dry-run) dry=1 ;;
    -h|--help) usage 0 ;;
    --) shift; break ;;
    *) fail "unknown option $1 (arguments of align_jax.train come after --)" ;;
  esac
  shift
done
train=("$@")
case "$command" in
  create|push|run|logs|status|stop|watch|delete|up) ;;
  -h|--help) usage 0 ;;
  *) fail "unknown command $command; known: create push run logs status stop watch delete up" ;;
esac
[ -n "$name" ] && [ -n "$zone" ] || fail "$command needs --name and --zone"
if [[ "$command" =~ ^(run|watch|up)$ ]]; then
  [ ${#train[@]} -gt 0 ] || fail "$command needs the arguments of align_jax.train after --"
  [[ " ${train[*]}" == *" --workdir=gs://"* ]] || fail "--workdir must be gs://...: the hosts share nothing else"
fi
if [ -z "$runtime" ]; then
  case "$type" in
    v4-*) runtime="tpu-ubuntu2204-base" ;;
    v5litepod-*) runtime="v2-alpha-tpuv5-lite" ;;
    v5p-*) runtime="v2-alpha-tpuv5" ;;
    v6e-*) runtime="v2-alpha-tpuv6e" ;;
    *) fail "no runtime version is known for --type=$type: give --runtime (known: v4-*, v5litepod-*, v5p-*, v6e-*;" \
            "TPU7x is rented through GKE: launch/gke)" ;;
  esac
fi
place=(--zone="$zone" ${project:+--project="$project"})
cd "$(dirname "$0")/.."

do_it() { if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }
nodes() { if [ "$slices" -eq 1 ]; then echo "$name"; else for i in $(seq 0 $((slices - 1))); do echo "$name-$i"; done; fi; }
everywhere() { local node; for node in $(nodes); do
  do_it gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker=all --command="$1"; done; }
state() { gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format='value(state.state)' \
  2>/dev/null || echo ABSENT; }

create() {
  local which=(--node-id="$name")
  [ "$slices" -eq 1 ] || which=(--node-count="$slices" --node-prefix="$name")
  do_it gcloud compute tpus queued-resources create "$name" "${place[@]}" "${which[@]}" --accelerator-type="$type" \
    --runtime-version="$runtime" $spot $reserved
  [ -z "$dry" ] || return 0
  local now
  while now="$(state)"; [ "$now" != ACTIVE ]; do
    echo "$name: $now"
    [[ "$now" != FAILED && "$now" != SUSPENDED ]] || fail "the request ended as $now: see gcloud compute tpus" \
      "queued-resources describe $name ${place[*]}"
    sleep "$poll"
  done
}

push() {
  local archive
  archive="$(mktemp -d)/align_jax.tgz"
  git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- -czf "$archive"
  for node in $(nodes); do
    do_it gcloud compute tpus tpu-vm scp "$archive" "$node:align_jax.tgz" "${place[@]}" --worker=all
  done
  rm -r "$(dirname "$archive")"
  # uv brings its own Python: the hosts' system Python may be older than 3.11
  everywhere 'set -e; mkdir -p ~/align_jax; tar -xzf ~/align_jax.tgz -C ~/align_jax;
[ -x ~/.local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh;
[ -x ~/venv/bin/python ] || ~/.local/bin/uv venv --python 3.12 ~/venv;
~/.local/bin/uv pip install --quiet --python ~/venv/bin/python --editable "$HOME/align_jax[tpu]" gcsfs'
}

run() {
  local inner arguments commit
  commit="$(git describe --always --abbrev=40 --exclude='*' --dirty=+ 2>/dev/null || true)"
  arguments="$(printf ' %q' "${train[@]}")"
  # 75: stopped by a signal, to be started again; 0 is kept for a run that has ended
  inner="cd ~/align_jax; export ALIGN_JAX_COMMIT=$commit ALIGN_JAX_STOPPED_STATUS=75;
~/venv/bin/python -m align_jax.train$arguments & echo \$! > ~/align_jax.pid; wait \$!; echo \$? > ~/align_jax.status"
  everywhere "rm -f ~/align_jax.status ~/align_jax.pid; nohup bash -c $(printf %q "$inner") \
> ~/align_jax.log 2>&1 < /dev/null &"
}

# One word for each host: running, none (not started), or the exit status.
asked='if [ -e ~/align_jax.status ]; then cat ~/align_jax.status;
elif [ -e ~/align_jax.pid ] && kill -0 "$(cat ~/align_jax.pid)" 2>/dev/null; then echo running; else echo none; fi'

watch() {
  if [ -n "$dry" ]; then
    echo "# every $poll s: the state of $name, and what each host says; after a preemption:"
    delete; create; push; run
    return
  fi
  local now words left="$restarts"
  while true; do
    now="$(state)"
    case "$now" in
      ACTIVE)
        words="$(everywhere "$asked" 2>/dev/null | tr '\n' ' ')" || words="unreachable "
        echo "$(date +%T) $name: $words"
        if [[ "$words" =~ ^(0\ )+$ ]]; then echo "the run has ended"; return 0; fi
        if [[ ! "$words" =~ running|unreachable ]]; then
          if [[ "$words" =~ [1-9] && ! "$words" =~ ^(75\ )+$ ]]; then
            [ "$left" -gt 0 ] || fail "the run failed more than $restarts times: launch/tpu.sh logs --name=$name"
            left=$((left - 1))
          fi
          push; run
        fi ;;
      SUSPENDED|FAILED) echo "$name: $now: asking for it again"; delete; create; push; run ;;
      ABSENT) create; push; run ;;
      *) echo "$(date +%T) $name: $now" ;;
    esac
    sleep "$poll"
  done
}

delete() { do_it gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet; }

case "$command" in
  create|push|run|watch|delete) "$command" ;;
  up) create; push; run; watch ;;
  logs)
    node="$name"; [ "$slices" -eq 1 ] || node="$name-$slice"
    do_it gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker="$worker" \
      --command='tail -n 100 -F ~/align_jax.log' ;;
  status) [ -n "$dry" ] || echo "$name: $(state)"; everywhere "$asked" ;;
  stop) everywhere 'kill -TERM "$(cat ~/align_jax.pid)"' ;;
esac
