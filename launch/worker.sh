#!/usr/bin/env bash
# One worker of a TPU pod. tpu_vm.sh and tpu_multislice.sh call it over ssh on all workers alike; by hand, on a worker:
#
#   bash stdit_jax/code/launch/worker.sh install 'jax[tpu]'    Python environment with the tested versions and this package
#   bash stdit_jax/code/launch/worker.sh start --config ...    starts training in the background, under supervise.sh
#   bash stdit_jax/code/launch/worker.sh status                absent, running, finished, failed CODE, interrupted or stopped
#   bash stdit_jax/code/launch/worker.sh stop                  lets it save and end; after STDIT_JAX_STOP_WAIT (300 s) kills it
#   bash stdit_jax/code/launch/worker.sh logs                  follows the log
#
# Everything is in ~/stdit_jax (STDIT_JAX_HOME): code/, venv/, train.log.
set -euo pipefail

home=${STDIT_JAX_HOME:-$HOME/stdit_jax}
code_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$code_folder/launch/common.sh"

running() {
  ! flock -n -s "$home/lock" true
}

# The images of TPU VMs come with Python 3.10 and without ensurepip; uv brings an interpreter of its own there.
find_python() {
  if python3 -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2> /dev/null; then
    echo python3
  else
    export UV_PYTHON_PREFERENCE=only-managed
    [ -x "$home/uv/bin/uv" ] || python3 -m pip install -q --target "$home/uv" uv >&2
    "$home/uv/bin/uv" python install -q 3.12 >&2
    "$home/uv/bin/uv" python find 3.12
  fi
}

install() {
  cd "$code_folder"
  # shellcheck source=launch/environment.sh
  source launch/environment.sh
  if [ -z "${PYTHON:-}" ]; then PYTHON=$(find_python); fi
  STDIT_JAX_VENV="$home/venv" make_environment requirements.txt "$@"
  echo "$(hostname): installed"
}

start() {
  [ -x "$home/venv/bin/python" ] || fail "$(hostname): nothing is installed; run install first"
  if running; then
    [ "$(cat "$home/command")" = "$(quote "$@")" ] || fail "$(hostname): training already, with other arguments; stop it first"
    echo "$(hostname): training already"
    return
  fi
  rm -f "$home/pids"
  quote "$@" > "$home/command"
  echo interrupted > "$home/state" # what is true if the machine goes down before anything else is written
  setsid nohup bash "$code_folder/launch/worker.sh" background "$@" >> "$home/train.log" 2>&1 < /dev/null &
  local pid=$!
  while kill -0 "$pid" 2> /dev/null && [ ! -s "$home/pids" ]; do sleep 0.1; done # a status or stop right after this is right
  echo "$(hostname): started, log in $home/train.log"
}

# In a session of its own, so that it outlives the ssh that started it. The training process inherits the lock: it stays held
# as long as anything of the run lives, and nothing starts beside it on the same chips.
background() {
  exec 9> "$home/lock"
  flock -w 10 9 || exit 0 # `running` holds it for a moment
  cd "$code_folder"
  local code=0
  bash launch/supervise.sh "$home/venv/bin/python" -m stdit_jax.train "$@" &
  echo "$$ $!" > "$home/pids"
  wait $! || code=$?
  case $code in
    0) echo finished > "$home/state" ;;
    143) ;; # stopped by `stop`, which says so, or by a shutdown, which is an interruption
    *) echo "failed $code" > "$home/state" ;;
  esac
}

stop() {
  if running; then
    local group supervisor waited=0
    read -r group supervisor < "$home/pids"
    kill -TERM "$supervisor" 2> /dev/null || true
    while running && [ "$waited" -lt "${STDIT_JAX_STOP_WAIT:-300}" ]; do
      sleep 1
      waited=$((waited + 1))
    done
    if running; then
      echo "$(hostname): still there after $waited s: killed" >&2
      kill -KILL -- "-$group" 2> /dev/null || true
      sleep 1
    fi
  fi
  [ ! -e "$home/state" ] || [ "$(cat "$home/state")" != interrupted ] || echo stopped > "$home/state"
  status
}

status() {
  local state=absent
  if [ -e "$home/state" ]; then state=$(cat "$home/state"); fi
  if [ -e "$home/lock" ] && running; then state=running; fi
  echo "stdit_jax-worker: $(hostname) $state"
}

logs() {
  tail -n "${STDIT_JAX_LOG_LINES:-200}" -F "$home/train.log" | sed -u "s/^/$(hostname): /"
}

[ $# -gt 0 ] || fail "give a command: install, start, status, stop or logs; see --help"
command=$1
shift
case $command in
  -h | --help) show_help "${BASH_SOURCE[0]}" ;;
  install | start | background | stop | status | logs)
    mkdir -p "$home"
    "$command" "$@"
    ;;
  *) fail "unknown command $command; known: install, start, status, stop, logs" ;;
esac
