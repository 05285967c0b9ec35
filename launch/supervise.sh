#!/usr/bin/env bash
# Runs a command again for as long as it asks for it, and ends with its last exit code:
#
#   bash launch/supervise.sh python -m stdit_jax.train --config configs/film.py
#
# Exit code 75 (EX_TEMPFAIL) means "saved after a preemption, or a peer is gone: start me again". A program that a signal
# ended (128 and above) is started again too: out of memory, or JAX's runtime, which aborts (134) when it loses a peer; the
# peers start again and would wait for it. 0 is finished and 2 the user's mistake; these and all others end the supervision.
# SIGTERM and SIGINT are passed on as SIGTERM, so that the program can save; then it is not started again and 143 returned.
#
# STDIT_JAX_RESTART_WAIT: seconds between two starts (10). It gives up when 10 starts in a row lasted less than a minute.
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

quick=0
while :; do
  began=$SECONDS code=0
  "$@" &
  child=$!
  [ -z "$stopping" ] || stop
  wait "$child" || code=$?
  # A trapped signal ends `wait` early; the command is over when it is gone.
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
  echo "ended with exit code $code: starting again" >&2
  for ((waited = 0; waited < ${STDIT_JAX_RESTART_WAIT:-10}; waited++)); do
    sleep 1
    [ -z "$stopping" ] || exit 143
  done
done
