#!/usr/bin/env bash
# A run on Cloud TPU VMs: asks for a slice in the queue, installs jaxgpt on all of its hosts,
# trains, and begins again with a new slice when this one is preempted.
#
#   NAME=jaxgpt ZONE=us-east5-b TYPE=v6e-256 launch/tpu_vm.sh \
#     --config=configs/llama3_8b.py --workdir=gs://BUCKET/run --config.data.path=gs://BUCKET/data
#
#   NAME=jaxgpt ZONE TYPE      of the slice; PROJECT: gcloud's, unless set
#   VERSION=v2-alpha-tpuv6e    runtime; v4: tpu-ubuntu2204-base, v5e: v2-alpha-tpuv5-lite
#   SPOT=1                     spot capacity; 0: on demand
#   MAX_RESTARTS=100           at most so many slices, and restarts on each
#   POLL=30                    seconds between looks at the queue
#   KEEP=0                     1: leaves the slice when the run is done, its input bad, or given up
#   DRY_RUN=1                  prints the commands
#
# On each host, retry.sh restarts a run in which a process was lost. A preempted slice goes as a
# whole: this script, which runs on your machine, then asks for another one. The machines' own
# Python is older than jaxgpt needs: uv fetches one. A slice costs money until it is deleted, which is left to
# you where this script is stopped (Ctrl-C) or can't learn what became of it.
set -uo pipefail

: "${NAME:=jaxgpt}" "${ZONE:=us-east5-b}" "${TYPE:=v6e-16}" "${VERSION:=v2-alpha-tpuv6e}"
max=${MAX_RESTARTS:-100}
where=("--zone=$ZONE")
[[ -n ${PROJECT:-} ]] && where+=("--project=$PROJECT")

run() {
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

on_all_hosts() {
  run gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all "--command=$1"
}

state() {
  [[ -n ${DRY_RUN:-} ]] && { echo ACTIVE; return; }
  local said
  if said=$(gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" \
    '--format=value(state.state)' 2>&1); then
    grep -xEm1 '[A-Z_]+' <<<"$said"  # gcloud's warnings and hints stand around it
  elif [[ $said == *NOT_FOUND* ]]; then
    echo NONE
  else  # no network, no permission: nothing is known of the slice
    echo "tpu_vm: $said" >&2
    echo UNKNOWN
  fi
}

delete() {
  run gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
}

create() {
  local spot=()
  [[ ${SPOT:-1} == 1 ]] && spot=(--spot)
  run gcloud compute tpus queued-resources create "$NAME" "--node-id=$NAME" "${where[@]}" \
    "--accelerator-type=$TYPE" "--runtime-version=$VERSION" "${spot[@]}"
}

# Waits for the slice; asks for one where there is none, or only what is left of one.
get_slice() {
  local unknown=0 failed=0 now
  [[ -n ${DRY_RUN:-} ]] && create
  while :; do
    now=$(state)
    case $now in
      ACTIVE) return ;;
      NONE) create || return 1 ;;
      FAILED)
        delete
        if ((++failed == 10)); then
          echo "tpu_vm: $failed requests for $NAME failed" >&2
          return 1
        fi
        ;;
      SUSPENDED) delete ;;
    esac
    unknown=$([[ $now == UNKNOWN ]] && echo $((unknown + 1)) || echo 0)  # one after the other
    if ((unknown == 10)); then
      echo "tpu_vm: gives up; $NAME may still be there, and then costs money" >&2
      return 1
    fi
    sleep "${POLL:-30}"
  done
}

# Where ssh alone was lost, the run goes on on the hosts: it is stopped, and saves, before the next one.
stop_old="pkill -f '[l]aunch/retry.sh'; for i in {1..120}; do pgrep -f '[b]in/jaxgpt train' >/dev/null || break; sleep 1; done"

install() {
  local here
  here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  run tar -czf "/tmp/$NAME.tar.gz" -C "$here" jaxgpt launch configs pyproject.toml README.md
  run gcloud compute tpus tpu-vm scp "/tmp/$NAME.tar.gz" "$NAME:" "${where[@]}" --worker=all &&
    on_all_hosts "$stop_old; mkdir -p run && tar -xzf $NAME.tar.gz -C run && cd run &&
      python3 -m pip install --quiet --user uv &&
      python3 -m uv venv --quiet --allow-existing --python=3.12 .venv &&
      python3 -m uv pip install --quiet --python=.venv '.[tpu,data,gcs]'"
}

if [[ $# -eq 0 ]]; then
  echo "usage: NAME=... ZONE=... TYPE=... $0 --config=FILE --workdir=gs://..." >&2
  exit 2
fi
printf -v train '%q ' "$@"
for ((slices = 0; slices <= max; slices++)); do
  get_slice || exit 1
  code=1
  if install; then
    on_all_hosts "cd run && MAX_RESTARTS=$max launch/retry.sh .venv/bin/jaxgpt train $train"
    code=$?
  fi
  [[ $code -eq 0 || $code -eq 2 ]] && break
  echo "tpu_vm: exit code $code, the slice is $(state)" >&2
  sleep "${POLL:-30}"
done
[[ ${KEEP:-0} == 1 ]] || delete  # it costs money as long as it is there
exit "$code"
