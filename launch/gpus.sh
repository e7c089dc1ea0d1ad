#!/usr/bin/env bash
# Trains on one machine with GPUs: one process on all of them, restarted if it is killed.
#
#   launch/gpus.sh --config=configs/gpt2_124m.py --workdir=DIR --config.data.path=DATA
#
#   GPUS=0,1        GPUs to use; default: all
#   JAXGPT=jaxgpt   the command
#   DRY_RUN=1       prints what it would do
#   MAX_RESTARTS, RETRY_WAIT   see retry.sh
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
read -ra jaxgpt <<<"${JAXGPT:-jaxgpt}"
if [[ -n ${GPUS:-} ]]; then
  export CUDA_VISIBLE_DEVICES=$GPUS
fi
export JAX_PLATFORMS=cuda  # an error without a working GPU, instead of a slow run on the CPU
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
if [[ -n ${DRY_RUN:-} ]]; then
  echo "CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-(all)} JAX_PLATFORMS=$JAX_PLATFORMS" \
    "XLA_PYTHON_CLIENT_MEM_FRACTION=$XLA_PYTHON_CLIENT_MEM_FRACTION"
elif ! nvidia-smi -L; then
  echo "gpus.sh: nvidia-smi finds no GPU; install the driver, or run jaxgpt train on the CPU" >&2
  exit 2
fi
exec "$here/retry.sh" "${jaxgpt[@]}" train "$@"
