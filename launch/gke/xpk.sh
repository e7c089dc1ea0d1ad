#!/usr/bin/env bash
# Trains on GKE through xpk, which writes and queues the JobSet (pip install xpk).
#
#   CLUSTER=mine TPU_TYPE=v6e-16 SLICES=2 IMAGE=REGISTRY/jaxgpt:latest \
#     launch/gke/xpk.sh NAME --config=configs/llama3_8b.py --workdir=gs://BUCKET/run \
#     --config.data.path=gs://BUCKET/data
#
#   CLUSTER, IMAGE      required; PROJECT, ZONE: default: gcloud's
#   TPU_TYPE=v6e-16     SLICES=1
#   SPOT=1              spot capacity; 0: on demand
#   MAX_RESTARTS=100    most restarts
#   DRY_RUN=1           prints the command
#
# xpk restarts a workload on exit codes 42 and 127-255 (ended by a signal), and with the option below
# on 75 (a process was lost). With any other code, such as 2 for bad input, the workload fails.
set -euo pipefail

if [[ $# -lt 2 || -z ${CLUSTER:-} || -z ${IMAGE:-} ]]; then
  echo "usage: CLUSTER=... IMAGE=... $0 NAME --config=FILE --workdir=DIR ..." >&2
  exit 2
fi
name=$1
shift
printf -v train '%q ' jaxgpt train --join-timeout=900 "$@"
command=(xpk workload create "--cluster=$CLUSTER" "--workload=$name" "--docker-image=$IMAGE"
         "--tpu-type=${TPU_TYPE:-v6e-16}" "--num-slices=${SLICES:-1}"
         "--max-restarts=${MAX_RESTARTS:-100}" --restart-on-exit-codes=75
         --termination-grace-period-seconds=300 "--command=$train")
[[ ${SPOT:-1} == 1 ]] && command+=(--spot) || command+=(--on-demand)
[[ -n ${PROJECT:-} ]] && command+=("--project=$PROJECT")
[[ -n ${ZONE:-} ]] && command+=("--zone=$ZONE")
if [[ -n ${DRY_RUN:-} ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
exec "${command[@]}"
