#!/usr/bin/env bash
# Trains on a TPU slice of Google Cloud, from a laptop with gcloud:
#
#   pod=(--name film --zone europe-west4-b --topology v5e:4x4 --queued --spot)
#   bash launch/tpu_vm.sh watch "${pod[@]}" -- --config configs/film.py --config.output=gs://BUCKET/film \
#     --config.data.tables="('gs://BUCKET/prepared/table.csv',)" --config.data.reference_devices=16
#
# watch does everything: it creates the machine, copies the code, installs, trains, and after a preemption does so again, so
# that training goes on from the newest checkpoint; it ends with the training. It may be ended and started again at any time.
# The steps:
#
#   create    the TPU VM, at once, or with --queued by a queued resource that waits until there is one
#   copy      this folder (what git tracks, or would) to ~/stdit_jax/code on all workers
#   install   a Python environment with the versions of constraints.txt on all workers
#   run       starts training on all workers, in the background; a worker starts it again when it exits with code 75
#   logs      follows the log of a worker
#   status    of the machine and the training
#   stop      lets the training save, and ends it
#   delete    the machine
#
# A command that finds its work done does nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
multislice=''
# shellcheck source=launch/tpu_common.sh
source launch/tpu_common.sh
{ # in one piece: bash reads a script as it goes, and this one may have been edited by the time a watch ends
  main "$@"
  exit
}
