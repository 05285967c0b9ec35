#!/usr/bin/env bash
# Trains on NVIDIA GPUs, on one host or on several hosts that run the same command.
#
#   bash launch/gpu.sh --config configs/film.py [--config.KEY=VALUE ...]
#   bash launch/gpu.sh --coordinator 10.0.0.1:1234 --num-processes 2 --process-id 0 --config configs/film.py ...    first host
#   bash launch/gpu.sh --coordinator 10.0.0.1:1234 --num-processes 2 --process-id 1 --config configs/film.py ...    second host
#   srun bash launch/gpu.sh --cluster --config configs/film.py ...    Slurm, one task per GPU; run gpu.sh --install once before
#
#   --coordinator HOST:PORT   address of the first host and a free port there; the same on all hosts
#   --num-processes N         number of hosts
#   --process-id I            0 on the first host, 1 on the second, ...
#   --cluster                 instead of these three options: JAX itself finds the processes (Slurm, Open MPI)
#   --install                 makes the Python environment, and does not train
#   --dry-run                 prints the commands instead of running them
#
# One process drives all GPUs of its host, or with --cluster one GPU. All hosts must see the output folder (a shared disk or
# gs://). After exit code 75 the training starts again (launch/supervise.sh). After Ctrl-C it saves and ends.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

coordinator='' processes='' process='' cluster='' install=''
option() {
  case $1 in
    -h | --help) show_help "${BASH_SOURCE[0]}" && exit 0 ;;
    --coordinator) needs_value "$@" && coordinator=$2 && takes=2 ;;
    --num-processes) needs_value "$@" && processes=$2 && takes=2 ;;
    --process-id) needs_value "$@" && process=$2 && takes=2 ;;
    --cluster) cluster=yes ;;
    --install) install=yes ;;
    *) fail "unknown argument $1; see --help" ;;
  esac
}
parse_options "$@"

several=()
if [ -n "$coordinator$processes$process" ]; then
  [ -z "$cluster" ] || fail "--cluster excludes --coordinator, --num-processes and --process-id"
  for option in "--coordinator=$coordinator" "--num-processes=$processes" "--process-id=$process"; do
    [ -n "${option#*=}" ] || fail "${option%=} is missing: --coordinator, --num-processes and --process-id belong together"
  done
  [[ $coordinator =~ ^[^[:space:]]+:[0-9]+$ ]] || fail "--coordinator $coordinator is not like HOST:PORT"
  [[ $processes =~ ^[1-9][0-9]*$ ]] || fail "--num-processes $processes is no number of processes"
  [[ $process =~ ^(0|[1-9][0-9]*)$ ]] && [ "$process" -lt "$processes" ] ||
    fail "--process-id $process of $processes: processes are numbered from 0 to $((processes - 1))"
  several=("STDIT_JAX_COORDINATOR=$coordinator" "STDIT_JAX_NUM_PROCESSES=$processes" "STDIT_JAX_PROCESS_ID=$process")
elif [ -n "$cluster" ]; then
  several=(STDIT_JAX_DISTRIBUTED=1)
fi
[ -n "$install" ] || [ ${#train[@]} -gt 0 ] || fail "give a configuration: --config configs/film.py; see --help"

if [ -n "$dry_run" ]; then
  echo "source launch/environment.sh"
  echo "make_environment requirements.txt 'jax[cuda12]'"
else
  # shellcheck source=launch/environment.sh
  source launch/environment.sh
  make_environment requirements.txt 'jax[cuda12]'
fi
[ -z "$install" ] || exit 0
command=(bash launch/supervise.sh python -m stdit_jax.train "${train[@]}" --config.platform=gpu)
[ ${#several[@]} -eq 0 ] || command=(env "${several[@]}" "${command[@]}")
if [ -n "$dry_run" ]; then quote "${command[@]}"; else exec "${command[@]}"; fi
