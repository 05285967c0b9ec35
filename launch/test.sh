#!/usr/bin/env bash
# Makes a virtual environment with the test requirements, then runs the linters, the type checker and all tests.
#   bash launch/test.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
make_environment requirements-test.txt
ruff check .
ruff format --check .
lint-imports
pyright
# Two processes, because half of the time one thread compiles. Each runs whole files, the longest first (tests/conftest.py).
JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
