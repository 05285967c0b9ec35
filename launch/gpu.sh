#!/usr/bin/env bash
# The same training on a machine with NVIDIA GPUs: bash launch/gpu.sh --config configs/x.py [--config.KEY=VALUE ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
make_environment requirements.txt
pip install -q "jax[cuda12]" -c constraints.txt
exec python -m stdit_jax.train "$@" --config.platform=gpu
