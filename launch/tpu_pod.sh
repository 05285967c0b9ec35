#!/usr/bin/env bash
# Runs the training command on every host of a TPU pod slice; run it on each host, e.g. with
#   gcloud compute tpus tpu-vm ssh NAME --worker=all --command "cd stdit_jax && bash launch/tpu_pod.sh --config configs/x.py"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
make_environment requirements.txt
pip install -q "jax[tpu]" -c constraints.txt
STDIT_JAX_DISTRIBUTED=1 exec python -m stdit_jax.train "$@" --config.platform=tpu
