#!/usr/bin/env bash
# The second command: a virtual environment with the test requirements, then lint and the whole test suite.
#   bash launch/test.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
make_environment requirements-test.txt
ruff check .
ruff format --check .
# Two at a time, whole files each, the longest first (tests/conftest.py): half the suite is one thread that compiles.
JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
