#!/usr/bin/env bash
# Trains in several processes on this machine, restarted if one of them is lost.
#
#   PROCESSES=2 launch/local.sh --config=configs/char_level.py --workdir=DIR --config.data.path=DATA
#
# Use it to try out how a run behaves on several hosts. On one machine, one process is faster.
#
#   PROCESSES=2     number of processes
#   PORT            port of the coordinator; default: a random one for each start
#   JAXGPT=jaxgpt   the command, such as "python -m jaxgpt"
#   DRY_RUN=1       prints the commands
#   MAX_RESTARTS, RETRY_WAIT   see retry.sh
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ -z ${ONE_START:-} && -z ${DRY_RUN:-} ]]; then
  exec env ONE_START=1 "$here/retry.sh" "$here/local.sh" "$@"
fi

processes=${PROCESSES:-2} port=${PORT:-$((20000 + RANDOM % 20000))}
read -ra jaxgpt <<<"${JAXGPT:-jaxgpt}"
children=()
trap 'kill -TERM "${children[@]}" 2>/dev/null' TERM
trap 'kill -HUP "${children[@]}" 2>/dev/null' HUP
trap : INT  # Ctrl-C: the terminal sends it to the processes as well
for ((i = 0; i < processes; i++)); do
  command=("${jaxgpt[@]}" train "--coordinator=127.0.0.1:$port" "--num-processes=$processes"
           "--process-id=$i" "$@")
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "${command[@]}"
    echo
  else
    (trap : INT; exec "${command[@]}") &  # see retry.sh
    children+=($!)
  fi
done

code=0
for child in "${children[@]}"; do
  wait "$child"
  one=$?
  while kill -0 "$child" 2>/dev/null; do  # a signal ended `wait`, not the process
    wait "$child"
    one=$?
  done
  if [[ $one -eq 2 || $code -eq 0 ]]; then
    code=$one
  fi
done
exit "$code"
