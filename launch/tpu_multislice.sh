#!/usr/bin/env bash
# Trains on several TPU slices, which the data-center network connects. Run it on a laptop with gcloud:
#
#   pod=(--name film --zone europe-west4-b --topology v5e:4x4 --slices 2 --spot)
#   bash launch/tpu_multislice.sh watch "${pod[@]}" -- --config configs/film.py --config.output=gs://BUCKET/film \
#     --config.data.tables="('gs://BUCKET/prepared/table.csv',)" --config.data.reference_devices=32
#
# It has the commands of tpu_vm.sh: create, copy, install, run, logs, status, stop, delete, watch. One queued resource holds
# --slices N equal slices. When Google preempts one slice, watch creates all of them again.
#
# The slices find each other without settings. Cloud TPU writes MEGASCALE_COORDINATOR_ADDRESS, MEGASCALE_NUM_SLICES and
# MEGASCALE_SLICE_ID into the metadata of the machines. jax.distributed.initialize() and libtpu read them there.
# Worker 0 of slice 0 runs process 0 and has its log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
multislice=yes
# shellcheck source=launch/tpu_common.sh
source launch/tpu_common.sh
{ # one block, which bash reads at once: the file may change during a long watch
  main "$@"
  exit
}
