#!/usr/bin/env bash
# Repeats a command while it fails for a temporary reason. Training continues from its checkpoint.
#
#   launch/retry.sh jaxgpt train --config=FILE --workdir=DIR
#
# jaxgpt's exit codes: 0 done; 2 bad input, which would fail again; 75 trouble that may pass (a lost
# process, a full disk, a network); 128+N ended by signal N, after SIGINT, SIGTERM and SIGHUP with
# everything saved; 1 a bug or failing hardware. Every code except 0 and 2 is tried again, unless
# this script itself is stopped (Ctrl-C, SIGTERM, a closed terminal). Then it waits until the command
# has saved and ended. A second Ctrl-C ends the command at once.
#
#   MAX_RESTARTS=100   most restarts
#   RETRY_WAIT=10      seconds before a restart; doubled, up to 300, after each start that ended
#                      within a minute
#   DRY_RUN=1          prints the command
set -uo pipefail

max=${MAX_RESTARTS:-100} first_wait=${RETRY_WAIT:-10}
if [[ $# -eq 0 ]]; then
  echo "usage: $0 COMMAND..." >&2
  exit 2
fi
if [[ -n ${DRY_RUN:-} ]]; then
  echo "would run, and again up to $max times while the exit code is not 0 or 2:"
  printf '%q ' "$@"
  echo
  exit 0
fi

stopping='' child=''
trap 'stopping=1' INT  # Ctrl-C: the terminal sends it to the command as well
trap 'stopping=1; [[ -n $child ]] && kill -TERM "$child" 2>/dev/null' TERM
trap 'stopping=1; [[ -n $child ]] && kill -HUP "$child" 2>/dev/null' HUP

wait_for=$first_wait
for ((restarts = 0; ; restarts++)); do
  started=$SECONDS
  # A shell makes background commands ignore SIGINT. A trap, which ends with `exec`, undoes that.
  (trap : INT; exec "$@") &
  child=$!
  while :; do
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || break  # else a signal ended `wait`, not the command
  done
  if [[ -n $stopping && $code -gt 128 ]]; then
    wait "$child" 2>/dev/null
    again=$?
    [[ $again -ge 0 && $again -ne 127 ]] && code=$again  # bash may say -1, which is no code
  fi
  child=''
  if [[ $code -eq 0 || $code -eq 2 || -n $stopping ]]; then
    exit "$code"
  fi
  if ((restarts >= max)); then
    echo "retry: exit code $code after $max restarts; giving up" >&2
    exit "$code"
  fi
  ((SECONDS - started >= 60)) && wait_for=$first_wait
  echo "retry: exit code $code; restart $((restarts + 1)) of at most $max in $wait_for s" >&2
  sleep "$wait_for" &
  wait $!
  if [[ -n $stopping ]]; then
    kill $! 2>/dev/null
    exit "$code"
  fi
  wait_for=$((wait_for * 2 > 300 ? 300 : wait_for * 2))
done
