#!/usr/bin/env bash
# Runs a command, again and again while its exit code asks for a new start. Ends with the last exit code:
#
#   bash launch/supervise.sh python -m stdit_jax.train --config configs/film.py
#
# Exit code 75 (EX_TEMPFAIL) asks for a new start: the program saved after a preemption, lost another process, or met a fault
# that may pass. Codes from 128 up also ask for a new start: a signal ended the program. Code 137 often means that no memory was
# left. Code 134 means that JAX's runtime aborted, because another process ended. All processes then start again and wait for
# each other. All other codes end the supervision: 0 is success, 2 an error of the user. A training also ends with 2 after ten
# starts in a row from the same step.
# The supervisor passes SIGTERM and SIGINT on as SIGTERM, so that the program can save. It then returns 143.
#
# STDIT_JAX_RESTART_WAIT: seconds between two starts (10). After a start of less than ten minutes the next wait is twice as long,
# up to five minutes. After 10 starts in a row that last less than a minute, the supervisor gives up.
set -euo pipefail

if [ $# -eq 0 ] || [ "$1" = --help ]; then
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
  exit $(($# == 0 ? 2 : 0))
fi

child='' stopping=''
stop() {
  stopping=yes
  [ -z "$child" ] || kill -TERM "$child" 2> /dev/null || true
}
trap stop TERM INT

quick=0 pause=0
while :; do
  began=$SECONDS code=0
  "$@" &
  child=$!
  [ -z "$stopping" ] || stop
  wait "$child" || code=$?
  # A trapped signal ends `wait` early: wait until the command has ended.
  while kill -0 "$child" 2> /dev/null; do
    code=0
    wait "$child" || code=$?
  done
  child=''
  [ -z "$stopping" ] || exit 143
  if [ "$code" -ne 75 ] && [ "$code" -lt 128 ]; then exit "$code"; fi
  quick=$((SECONDS - began < 60 ? quick + 1 : 0))
  if [ "$quick" -ge 10 ]; then
    echo "error: $quick starts in a row lasted less than a minute, the last ended with exit code $code: giving up" >&2
    exit "$code"
  fi
  least=${STDIT_JAX_RESTART_WAIT:-10}
  pause=$((pause && SECONDS - began < 600 ? (2 * pause < 300 ? 2 * pause : 300) : least))
  echo "ended with exit code $code: starting again" >&2
  for ((waited = 0; waited < pause; waited++)); do
    sleep 1
    [ -z "$stopping" ] || exit 143
  done
done
