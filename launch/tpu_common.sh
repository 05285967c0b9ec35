# shellcheck shell=bash
# tpu_vm.sh and tpu_multislice.sh set `multislice` and source this file, which has all their commands. worker.sh runs on the
# workers.

# shellcheck source=launch/common.sh
source launch/common.sh

show_options() {
  show_help "$0"
  cat <<'TEXT'

The machine, for every command:
  --name NAME                 name of the TPU and of its queued resource (required)
  --zone ZONE                 e.g. europe-west4-b (required)
  --project PROJECT           default: gcloud's own
  --internal-ip | --tunnel-through-iap    how ssh reaches workers without an external address

Creation of the machine, for create and watch:
  --accelerator-type TYPE     e.g. v5litepod-256, v6e-256, v5p-512, v4-128
  --topology NAME:SHAPE       instead of the type, as stdit_jax.plan writes it: v5e:16x16, v6e:16x16, v5p:4x8x8, v4:4x4x8
  --runtime-version VERSION   default: Google's version for JAX on this type
  --spot | --reserved         default: on demand
  --queued                    use a queued resource (several slices always do). Give this flag to every command
  --slices N                  only tpu_multislice.sh
  --network N, --subnetwork N, --internal-ips, --service-account A
  --create-flag FLAG          another flag of gcloud's create, e.g. --create-flag=--labels=team=video; may be repeated

The training, for run and watch:
  -- ARGUMENTS                arguments of stdit_jax.train; -- may be left out before --config. The output must be a
                              folder that all workers share. Their own disks are deleted with the machine.
  --env NAME=VALUE            environment variable of the training program; may be repeated

Others:
  --worker N|all              worker whose log is shown, for logs (0)
  --poll SECONDS              time between two checks, for watch (60)
  --delete-when-finished      delete the machine after the training, also after a failed one, for watch
  --dry-run                   print the commands instead of running them
TEXT
}

option() {
  case $1 in
    --name) needs_value "$@" && name=$2 && takes=2 ;;
    --zone) needs_value "$@" && zone=$2 && takes=2 ;;
    --project) needs_value "$@" && project=$2 && takes=2 ;;
    --internal-ip | --tunnel-through-iap) reach=$1 ;;
    --accelerator-type) needs_value "$@" && accelerator=$2 && takes=2 ;;
    --topology) needs_value "$@" && topology=$2 && takes=2 ;;
    --runtime-version) needs_value "$@" && runtime=$2 && takes=2 ;;
    --spot | --reserved)
      [ "${tier:-$1}" = "$1" ] || fail "--spot and --reserved exclude each other"
      tier=$1
      ;;
    --queued) queued=yes ;;
    --slices)
      [ -n "$multislice" ] || fail "several slices: use launch/tpu_multislice.sh"
      needs_value "$@" && slices=$2 && takes=2
      ;;
    --network | --subnetwork | --service-account) needs_value "$@" && create_flags+=("$1=$2") && takes=2 ;;
    --internal-ips) create_flags+=("$1") ;;
    --create-flag) needs_value "$@" && create_flags+=("$2") && takes=2 ;;
    --env) add_environment "$@" ;;
    --worker) needs_value "$@" && worker=$2 && takes=2 ;;
    --poll) needs_value "$@" && poll=$2 && takes=2 ;;
    --delete-when-finished) delete_at_end=yes ;;
    *) fail "unknown argument $1; see --help" ;;
  esac
}

parse() {
  name='' zone='' project='' reach='' accelerator='' topology='' runtime='' tier='' slices='' worker=0 poll=60 delete_at_end=''
  queued=$multislice create_flags=() environment=(STDIT_JAX_DISTRIBUTED=1)
  parse_options "$@"
  check_name "$name"
  [ -n "$zone" ] || fail "--zone is required; see --help"
  [[ $worker =~ ^([0-9]+|all)$ ]] || fail "--worker $worker is neither a number nor all"
  [[ $poll =~ ^[0-9]+$ ]] || fail "--poll $poll is no number of seconds"

  place=("--zone=$zone" --quiet)
  [ -z "$project" ] || place+=("--project=$project")
  vm=(gcloud compute tpus tpu-vm) queue=(gcloud compute tpus queued-resources)
  ssh=("${vm[@]}")
  # On single TPU VMs only the alpha command can tunnel.
  [ "$reach" != --tunnel-through-iap ] || ssh=(gcloud alpha compute tpus tpu-vm)
  [ -z "$multislice" ] || ssh=("${queue[@]}")
}

# Sets `shape`, the flags for the type of the machine, and the default of `runtime`.
check_shape() {
  local generation
  [ -z "$accelerator" ] || [ -z "$topology" ] || fail "--accelerator-type and --topology exclude each other"
  if [ -n "$accelerator" ]; then
    generation=${accelerator%%-*}
    shape=("--accelerator-type=$accelerator")
  elif [ -n "$topology" ]; then
    [[ $topology =~ ^(v4|v5e|v5p|v6e):[0-9]+(x[0-9]+)+$ ]] ||
      fail "--topology $topology is not like v5e:16x16, v6e:16x16, v5p:4x8x8 or v4:4x4x8"
    generation=${topology%%:*}
    # On v5e and v6e the number of chips gives the shape. On v4 and v5p it does not.
    case $generation in
      v4 | v5p) shape=("--type=$generation" "--topology=${topology#*:}") ;;
      *) shape=("--accelerator-type=${generation/v5e/v5litepod}-$(chips_of "${topology#*:}")") ;;
    esac
  else
    fail "give --accelerator-type or --topology; see --help"
  fi
  # https://cloud.google.com/tpu/docs/runtimes
  if [ -z "$runtime" ]; then
    case $generation in
      v4) runtime=tpu-ubuntu2204-base ;;
      v5e | v5litepod) runtime=v2-alpha-tpuv5-lite ;;
      v5p) runtime=v2-alpha-tpuv5 ;;
      v6e) runtime=v2-alpha-tpuv6e ;;
      *) fail "give --runtime-version: this script knows no version for $generation" ;;
    esac
  fi
  if [ -n "$multislice" ]; then
    [[ $slices =~ ^[1-9][0-9]*$ ]] && [ "$slices" -gt 1 ] || fail "give --slices, 2 or more; one slice: launch/tpu_vm.sh"
  fi
}

note() {
  echo "$(date -u +%FT%TZ) $*"
}

# Sets `state` to Google's word for the state of the machine, or to ABSENT if the machine does not exist. Fails if Google does
# not answer. In a dry run the machine does not exist.
look() {
  local errors query=("${vm[@]}" describe "$name" "${place[@]}" "--format=value(state)")
  [ -z "$queued" ] || query=("${queue[@]}" describe "$name" "${place[@]}" "--format=value(state.state)")
  if [ -n "$dry_run" ]; then
    run "${query[@]}"
    state=ABSENT
    return
  fi
  errors=$(mktemp)
  if ! state=$(run "${query[@]}" 2> "$errors"); then
    # A missing permission or network must not look like a missing machine.
    grep -qi 'not.found' "$errors" || { cat "$errors" >&2; rm "$errors"; return 1; }
    state=ABSENT
  fi
  rm "$errors"
  if [ -n "$queued" ] && [ "$state" = ACTIVE ]; then look_at_nodes; fi
}

# A queued resource can still be ACTIVE after one of its nodes was preempted.
look_at_nodes() {
  local suffix='' node
  [ -z "$multislice" ] || suffix='-[0-9]+'
  for node in $(run "${vm[@]}" list "${place[@]}" "--filter=name~\"(^|/)$name$suffix\$\"" "--format=value(state)"); do
    [[ $node != PREEMPTED && $node != TERMINATED ]] || state=$node
  done
}

create_machine() {
  local command=("${vm[@]}" create "$name" "${place[@]}" "${shape[@]}" "--version=$runtime") nodes=("--node-id=$name")
  [ -z "$multislice" ] || nodes=("--node-count=$slices" "--node-prefix=$name")
  [ -z "$queued" ] ||
    command=("${queue[@]}" create "$name" "${place[@]}" "${shape[@]}" "--runtime-version=$runtime" "${nodes[@]}")
  [ -z "$tier" ] || command+=("$tier")
  run "${command[@]}" ${create_flags[@]+"${create_flags[@]}"}
}

delete_machine() {
  if [ -n "$queued" ]; then
    run "${queue[@]}" delete "$name" "${place[@]}" --force
  else
    run "${vm[@]}" delete "$name" "${place[@]}"
  fi
}

# on_workers NODE WORKER COMMAND... runs a command over ssh. A node is a slice; a single slice is node 0.
on_workers() {
  local command=("${ssh[@]}" ssh "$name" "${place[@]}")
  [ -z "$multislice" ] || command+=("--node=$1")
  [ -z "$reach" ] || command+=("$reach")
  run "${command[@]}" "--worker=$2" "--command=${*:3}"
}

code=stdit_jax/code # in the home folder of a worker, where ssh starts
archive=''
pack() {
  if [ -n "$dry_run" ]; then
    archive=/tmp/stdit_jax.tar.gz
    echo "git ls-files -z --cached --others --exclude-standard | tar -czf $archive --null -T -"
  else
    archive=$(mktemp -d)/stdit_jax.tar.gz
    trap 'rm -rf "$(dirname "$archive")"' EXIT
    pack_code "$archive"
  fi
}

# Replaces the content of the folder and keeps the folder: it is the working folder of a running training.
copy() {
  local command=("${ssh[@]}" scp "$archive" "$name:" "${place[@]}")
  [ -z "$multislice" ] || command+=(--node=all)
  [ -z "$reach" ] || command+=("$reach")
  run "${command[@]}" --worker=all &&
    on_workers all all "mkdir -p $code && find $code -mindepth 1 -delete && tar -xzf stdit_jax.tar.gz -C $code"
}

install() {
  on_workers all all "bash $code/launch/worker.sh install 'jax[tpu]'"
}

start() {
  local arguments
  arguments=$(quote "${train[@]}" --config.platform=tpu)
  on_workers all all "env $(quote "${environment[@]}") bash $code/launch/worker.sh start $arguments"
}

worker_states() {
  on_workers all all "[ ! -e $code ] || exec bash $code/launch/worker.sh status; echo stdit_jax-worker: this one absent"
}

stop() {
  on_workers all all "bash $code/launch/worker.sh stop"
}

follow() {
  on_workers "$([ "$worker" = all ] && echo all || echo 0)" "$worker" "bash $code/launch/worker.sh logs"
}

# Copies, installs and starts the training on an existing machine. A copy does not disturb a running training, which has read
# its code already.
prepare() {
  note "preparing the workers"
  if copy && install && start; then
    trouble=0
  else
    trouble=$((trouble + 1))
    [ "$trouble" -lt 5 ] || fail "the workers could not be prepared, $trouble times in a row"
    note "the workers could not be prepared; trying again"
  fi
}

# Checks the workers of an existing machine once. Ends the script after the training. `untended` is set until the first check.
tend() {
  local lines first=$untended
  if ! lines=$(worker_states); then
    note "the workers can't be reached now"
    return
  fi
  lines=$(sed -n 's/.*stdit_jax-worker: //p' <<< "$lines")
  untended=''
  if [ -n "$first" ] && grep -Eq ' (failed [0-9]+|stopped|finished)$' <<< "$lines" && ! grep -q ' running$' <<< "$lines"; then
    prepare # the states are those of an earlier run
  elif grep -q ' failed ' <<< "$lines"; then
    grep ' failed ' <<< "$lines" >&2
    note "training failed; ending it on all workers. To see why: $(quote bash "$0" logs "--name=$name" "--zone=$zone")"
    stop || true
    if [ -n "$delete_at_end" ]; then
      note "the last lines of the logs, since the machine is deleted now"
      on_workers all all "timeout 10 bash $code/launch/worker.sh logs" || true # it would show new lines for ever
      delete_machine
    fi
    exit 1
  elif grep -q ' stopped$' <<< "$lines"; then
    note "training was stopped by hand"
    exit 0
  elif grep -q ' absent$' <<< "$lines"; then
    prepare
  elif grep -q ' interrupted$' <<< "$lines"; then
    note "starting the training again where a worker was interrupted"
    start || true
  elif [ -n "$lines" ] && ! grep -qv ' finished$' <<< "$lines"; then
    note "training has finished"
    if [ -n "$delete_at_end" ]; then delete_machine; fi
    exit 0
  fi
}

watch() {
  local last='' was_active='' refused=0
  trouble=0 untended=yes
  pack # once: a training that resumes next week runs the code of its start, even if this folder has changed
  while :; do
    if look; then
      [ "$state" = "$last" ] || note "$name is $state"
      last=$state
      case $state in
        ABSENT)
          note "creating $name"
          if ! create_machine; then refused=$((refused + 1)); fi
          ;;
        ACTIVE | READY)
          was_active=yes
          tend
          ;;
        PREEMPTED | TERMINATED | SUSPENDED | FAILED)
          [ "$state" != FAILED ] || refused=$((refused + 1))
          note "deleting $name, to create it again"
          delete_machine || true
          ;;
      esac
      # A refusal after the machine existed means that Google has no machines. Before, the request is likely to be wrong.
      [ -n "$was_active" ] || [ "$refused" -lt 2 ] || fail "$name could not be created, twice; see the messages of gcloud"
    fi
    sleep "$poll"
  done
}

dry_watch() {
  pack
  look
  create_machine
  echo "# ... checks every $poll s until the machine exists; then, for each worker without the code:"
  copy
  install
  start
  echo "# ... every $poll s: does the machine exist, does the training run?"
  look
  worker_states
  echo "# ... if the machine is PREEMPTED, TERMINATED, SUSPENDED or FAILED: delete it and repeat all steps"
  delete_machine
}

main() {
  local verb=${1:-} argument
  for argument; do
    case $argument in
      --) break ;;
      -h | --help) show_options && exit 0 ;;
    esac
  done
  [ $# -gt 0 ] || fail "give a command; see --help"
  shift
  case $verb in
    create | copy | install | run | logs | status | stop | delete | watch) parse "$@" ;;
    *) fail "unknown command $verb; known: create, copy, install, run, logs, status, stop, delete, watch" ;;
  esac
  case $verb in
    create)
      check_shape
      look
      case $state in
        ABSENT) create_machine ;;
        PREEMPTED | TERMINATED | SUSPENDED | FAILED) fail "$name exists but is $state; delete it first, or use watch" ;;
        *) echo "$name exists already: $state" ;;
      esac
      ;;
    run) check_train && start ;;
    logs) follow ;;
    status)
      look
      [ -n "$dry_run" ] || echo "$name: $state"
      case $state in
        ACTIVE | READY) worker_states ;;
        *) [ -z "$dry_run" ] || worker_states ;;
      esac
      ;;
    delete)
      look
      if [ -n "$dry_run" ] || [ "$state" != ABSENT ]; then delete_machine; else echo "$name does not exist"; fi
      ;;
    watch)
      check_shape
      check_train
      if [ -n "$dry_run" ]; then dry_watch; else watch; fi
      ;;
    copy)
      pack
      copy
      ;;
    *) "$verb" ;; # install or stop
  esac
}
