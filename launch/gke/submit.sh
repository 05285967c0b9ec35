#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster that has the JobSet controller (0.6 or newer). Run it on a laptop with kubectl:
#
#   bash launch/gke/submit.sh build --image REGION-docker.pkg.dev/PROJECT/REPOSITORY/stdit_jax:1
#   bash launch/gke/submit.sh apply --name film --image REGION-docker.pkg.dev/PROJECT/REPOSITORY/stdit_jax:1 \
#     --topology v5e:4x4 --slices 2 --spot -- --config configs/film.py --config.output=gs://BUCKET/film \
#     --config.data.tables="('gs://BUCKET/prepared/table.csv',)" --config.data.reference_devices=32
#
#   build     makes an image of this folder with docker, and pushes it
#   render    prints the manifest (launch/gke/jobset.yaml with the values below)
#   apply     submits the manifest; the training restarts from the newest checkpoint until it finishes or reports a user's error
#   status    prints the state of the JobSet and its pods
#   logs      follows the log of process 0, or with --worker all of every pod
#   delete    ends the run; the pods get SIGTERM and save
#
#   --name NAME               name of the JobSet
#   --image IMAGE             image that build makes, for build, render and apply
#   --topology NAME:SHAPE     shape of a slice, as stdit_jax.plan writes it: v5e:16x16, v6e:16x16, v5p:4x8x8, v4:4x4x8
#   --slices N                number of slices (1)
#   --chips-per-host N        chips of the node pool's machine type: 4 (default), 1 for ...-1t, 8 for ...-8t
#   --spot | --reservation R  which nodes to take; default: on demand
#   --service-account A       Kubernetes service account that may write to the bucket
#   --max-restarts N          number of restarts, preemptions included (1000)
#   --grace-seconds N         time between SIGTERM and SIGKILL (300; spot nodes have less)
#   --env NAME=VALUE          environment variable of the training program; may be repeated
#   --namespace NS, --context C    for kubectl
#   --worker 0|all            pods whose logs are shown, for logs
#   --dry-run                 print the commands instead of running them
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=launch/common.sh
source launch/common.sh

name='' image='' topology='' slices=1 chips='' spot='' reservation='' account='' restarts=1000 grace=300 worker=0
kubectl=(kubectl) environment=(STDIT_JAX_DISTRIBUTED=1)

option() {
  case $1 in
    --name) needs_value "$@" && name=$2 && takes=2 ;;
    --image) needs_value "$@" && image=$2 && takes=2 ;;
    --topology) needs_value "$@" && topology=$2 && takes=2 ;;
    --slices) needs_value "$@" && slices=$2 && takes=2 ;;
    --chips-per-host) needs_value "$@" && chips=$2 && takes=2 ;;
    --spot) spot=yes ;;
    --reservation) needs_value "$@" && reservation=$2 && takes=2 ;;
    --service-account) needs_value "$@" && account=$2 && takes=2 ;;
    --max-restarts) needs_value "$@" && restarts=$2 && takes=2 ;;
    --grace-seconds) needs_value "$@" && grace=$2 && takes=2 ;;
    --env) add_environment "$@" ;;
    --namespace | --context) needs_value "$@" && kubectl+=("$1=$2") && takes=2 ;;
    --worker) needs_value "$@" && worker=$2 && takes=2 ;;
    *) fail "unknown argument $1; see --help" ;;
  esac
}

render() {
  local number hosts all accelerator
  [ -n "$image" ] || fail "--image is required; see --help"
  check_train
  [ -z "$spot" ] || [ -z "$reservation" ] || fail "--spot and --reservation exclude each other"
  for number in "--slices $slices" "--max-restarts $restarts" "--grace-seconds $grace" ${chips:+"--chips-per-host $chips"}; do
    [[ ${number#* } =~ ^[1-9][0-9]*$ ]] || fail "$number is no positive number"
  done
  case $topology in
    v4:*) accelerator=tpu-v4-podslice ;;
    v5e:*) accelerator=tpu-v5-lite-podslice ;;
    v5p:*) accelerator=tpu-v5p-slice ;;
    v6e:*) accelerator=tpu-v6e-slice ;;
  esac
  [ -n "${accelerator:-}" ] && [[ $topology =~ :[1-9][0-9]*(x[1-9][0-9]*)+$ ]] ||
    fail "--topology '$topology' is not like v5e:16x16, v6e:16x16, v5p:4x8x8 or v4:4x4x8"
  all=$(chips_of "${topology#*:}")
  chips=${chips:-$((all < 4 ? all : 4))}
  hosts=$((all / chips))
  [ $((hosts * chips)) -eq "$all" ] || fail "--topology $topology has $all chips, not a multiple of $chips per host"
  # JSON is YAML: any argument arrives unchanged.
  NAME=$name IMAGE=$image ACCELERATOR=$accelerator TOPOLOGY=${topology#*:} SLICES=$slices HOSTS=$hosts CHIPS_PER_HOST=$chips \
    SPOT=$spot RESERVATION=$reservation SERVICE_ACCOUNT=$account MAX_RESTARTS=$restarts GRACE_SECONDS=$grace \
    python3 - "${#environment[@]}" "${environment[@]}" "${train[@]}" --config.platform=tpu << 'PY'
import json, os, re, sys

count, *words = sys.argv[1:]
words = [word.replace("$(", "$$(") for word in words]  # Kubernetes would replace $(NAME)
environment, arguments = words[: int(count)], words[int(count) :]
values = {key: value if value.isdecimal() else json.dumps(value) for key, value in os.environ.items()}
values["ENVIRONMENT"] = json.dumps([dict(zip(("name", "value"), pair.split("=", 1))) for pair in environment])
values["ARGUMENTS"] = json.dumps(arguments)
for line in open("launch/gke/jobset.yaml", encoding="utf-8"):
  condition = re.search(r" # if (\w+)$", line)
  if line.startswith("#") or condition and not os.environ[condition[1]]:
    continue
  line = line[: condition.start()] + "\n" if condition else line
  print(re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], line), end="")
PY
}

build() {
  local archive
  [ -n "$image" ] || fail "--image is required; see --help"
  if [ -n "$dry_run" ]; then
    echo "git ls-files -z --cached --others --exclude-standard | tar -czf /tmp/stdit_jax.tar.gz --null -T -"
    echo "$(quote docker build --platform=linux/amd64 "--tag=$image" --file=launch/gke/Dockerfile -) < /tmp/stdit_jax.tar.gz"
  else
    archive=$(mktemp)
    pack_code "$archive"
    docker build --platform=linux/amd64 "--tag=$image" --file=launch/gke/Dockerfile - < "$archive"
    rm "$archive"
  fi
  run docker push "$image"
}

apply() {
  local manifest
  manifest=$(render)
  if [ -n "$dry_run" ]; then
    printf "%s <<'EOF'\n%s\nEOF\n" "$(quote "${kubectl[@]}" apply --filename=-)" "$manifest"
  else
    "${kubectl[@]}" apply --filename=- <<< "$manifest"
  fi
}

logs() {
  local selector="jobset.sigs.k8s.io/jobset-name=$name"
  case $worker in
    all) ;;
    0) selector+=,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0 ;;
    *) fail "--worker $worker is neither 0 nor all" ;;
  esac
  run "${kubectl[@]}" logs --follow --prefix --tail=200 --max-log-requests=10000 "--selector=$selector"
}

status() {
  run "${kubectl[@]}" get jobset "$name"
  run "${kubectl[@]}" get pods "--selector=jobset.sigs.k8s.io/jobset-name=$name" --output=wide
}

[ $# -gt 0 ] || fail "give a command; see --help"
for argument; do
  case $argument in
    --) break ;;
    -h | --help) show_help "${BASH_SOURCE[0]}" && exit 0 ;;
  esac
done
verb=$1
shift
case $verb in
  build | render | apply | status | logs | delete) parse_options "$@" ;;
  *) fail "unknown command $verb; known: build, render, apply, status, logs, delete" ;;
esac
if [ "$verb" != build ]; then
  check_name "$name"
fi
case $verb in
  delete) run "${kubectl[@]}" delete jobset "$name" --ignore-not-found ;;
  *) "$verb" ;;
esac
