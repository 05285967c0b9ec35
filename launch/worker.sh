#!/usr/bin/env bash
# Runs on a worker of a TPU pod. tpu_vm.sh and tpu_multislice.sh call it over ssh on all workers. By hand, on a worker:
# bash stdit_jax/code/launch/worker.sh COMMAND
#
#   install 'jax[tpu]'    makes a Python environment with the tested versions
#   start --config ...    starts the training in the background, by supervise.sh
#   status                prints absent, running, finished, failed CODE, interrupted or stopped
#   stop                  lets the training save and end, or kills it after STDIT_JAX_STOP_WAIT (300 s)
#   logs                  follows the log
#
# All files are in ~/stdit_jax (STDIT_JAX_HOME): code/, venv/, train.log.
set -euo pipefail

home=${STDIT_JAX_HOME:-$HOME/stdit_jax}
code_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/common.sh
source "$code_folder/launch/common.sh"

running() {
  ! flock -n -s "$home/lock" true
}

# The images of TPU VMs have Python 3.10 without ensurepip. On them, uv installs another interpreter.
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
  [ -x "$home/venv/bin/python" ] || fail "$(hostname): the Python environment is missing; run install first"
  if running; then
    [ "$(cat "$home/command")" = "$(quote "$@")" ] || fail "$(hostname): training already, with other arguments; stop it first"
    echo "$(hostname): training already"
    return
  fi
  rm -f "$home/pids"
  quote "$@" > "$home/command"
  echo interrupted > "$home/state" # the right state if the machine stops before the next write
  setsid nohup bash "$code_folder/launch/worker.sh" background "$@" >> "$home/train.log" 2>&1 < /dev/null &
  local pid=$!
  while kill -0 "$pid" 2> /dev/null && [ ! -s "$home/pids" ]; do sleep 0.1; done # status and stop now see the training
  echo "$(hostname): started, log in $home/train.log"
}

# Runs in its own session, so that it survives the end of the ssh connection. All processes of the training inherit the lock. No
# second training can start on the same chips before the last of these processes has ended.
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
    143) ;; # `stop` writes the state itself; after a shutdown of the machine the state stays interrupted
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
      echo "$(hostname): the training still ran after $waited s: killed" >&2
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
