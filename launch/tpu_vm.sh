#!/usr/bin/env bash
# Trains on a TPU slice of Google Cloud. Run it on a laptop with gcloud:
#
#   pod=(--name film --zone europe-west4-b --topology v5e:4x4 --queued --spot)
#   bash launch/tpu_vm.sh watch "${pod[@]}" -- --config configs/film.py --config.output=gs://BUCKET/film \
#     --config.data.tables="('gs://BUCKET/prepared/table.csv',)" --config.data.reference_devices=16
#
# watch does everything: it creates the machine, copies the code, installs and trains. After a preemption it repeats these
# steps, and the training resumes from the newest checkpoint. watch ends with the training. You may stop it and start it again
# at any time. The single steps:
#
#   create    creates the TPU VM: at once, or with --queued as soon as one is free
#   copy      copies this folder (the files that git tracks, or would track) to ~/stdit_jax/code on all workers
#   install   installs a Python environment with the versions of constraints.txt on all workers
#   run       starts the training on all workers, in the background, and again after exit code 75 or a signal
#   logs      follows the log of a worker
#   status    prints the state of the machine and of the training
#   stop      lets the training save, then ends it
#   delete    deletes the machine
#
# create, install, run, stop and delete do nothing if their work is already done.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
multislice=''
# shellcheck source=launch/tpu_common.sh
source launch/tpu_common.sh
{ # one block, which bash reads at once: the file may change during a long watch
  main "$@"
  exit
}
