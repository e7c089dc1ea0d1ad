#!/usr/bin/env bash
# Trains on Cloud TPU VMs: requests a slice from the queue, installs jaxgpt on all of its hosts,
# trains, and requests a new slice if this one is preempted.
#
#   NAME=jaxgpt ZONE=us-east5-b TYPE=v6e-256 launch/tpu_vm.sh \
#     --config=configs/llama3_8b.py --workdir=gs://BUCKET/run --config.data.path=gs://BUCKET/data
#
#   NAME=jaxgpt ZONE TYPE      name, zone and type of the slice; PROJECT: default: gcloud's
#   VERSION=v2-alpha-tpuv6e    runtime; v4: tpu-ubuntu2204-base, v5e: v2-alpha-tpuv5-lite
#   SPOT=1                     spot capacity; 0: on demand
#   MAX_RESTARTS=100           most slices, and most restarts on each
#   POLL=30                    seconds between checks of the queue
#   KEEP=0                     1: keeps the slice after the run, whether it succeeded or failed
#   DRY_RUN=1                  prints the commands
#
# On each host, retry.sh restarts a run in which a process was lost. If the slice is preempted, all of
# its hosts are gone; this script, which runs on your machine, then requests another one. uv installs
# Python, because the hosts' own is too old. A slice costs money until it is deleted. Delete it
# yourself if you stop this script (Ctrl-C), or if it can't find out the state of the slice.
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
    grep -xEm1 '[A-Z_]+' <<<"$said"  # between gcloud's warnings and hints
  elif [[ $said == *NOT_FOUND* ]]; then
    echo NONE
  else  # no network or no permission: the state is not known
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

# Waits for the slice. Requests one if there is none, and deletes failed or suspended ones first.
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
    unknown=$([[ $now == UNKNOWN ]] && echo $((unknown + 1)) || echo 0)  # in a row
    if ((unknown == 10)); then
      echo "tpu_vm: gives up; $NAME may still be there, and then costs money" >&2
      return 1
    fi
    sleep "${POLL:-30}"
  done
}

# If only the ssh connection was lost, the run continues on the hosts. Stop it, so that it saves, before
# starting the next one.
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
[[ ${KEEP:-0} == 1 ]] || delete  # it costs money until it is deleted
exit "$code"
