#!/usr/bin/env bash
# Trains on several TPU slices that are joined by the data-center network, from a laptop with gcloud:
#
#   pod=(--name film --zone europe-west4-b --topology v5e:4x4 --slices 2 --spot)
#   bash launch/tpu_multislice.sh watch "${pod[@]}" -- --config configs/film.py --config.output=gs://BUCKET/film \
#     --config.data.tables="('gs://BUCKET/prepared/table.csv',)" --config.data.reference_devices=32
#
# The commands are those of tpu_vm.sh: create, copy, install, run, logs, status, stop, delete, watch. The slices are one queued
# resource (--slices N of them, alike) and come and go together: when one is preempted, watch makes all of them again.
#
# Nothing is to be set for the slices to find each other: Cloud TPU writes MEGASCALE_COORDINATOR_ADDRESS, MEGASCALE_NUM_SLICES
# and MEGASCALE_SLICE_ID into the metadata of the machines, where jax.distributed.initialize() and libtpu read them.
# Slice and worker 0 hold process 0 and its log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
multislice=yes
# shellcheck source=launch/tpu_common.sh
source launch/tpu_common.sh
{ # in one piece: bash reads a script as it goes, and this one may have been edited by the time a watch ends
  main "$@"
  exit
}
