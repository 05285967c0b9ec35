# shellcheck shell=bash
# The scripts in this folder source this file. `make_environment requirements.txt [PACKAGE ...]` makes or reuses .venv with the
# tested versions. A PACKAGE is for instance 'jax[tpu]'.
# STDIT_JAX_VENV chooses another folder, PYTHON another interpreter (3.11 to 3.13).

make_environment() {
  local requirements=$1 folder=${STDIT_JAX_VENV:-.venv} python=${PYTHON:-python3} stamp
  shift
  "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || {
    echo "error: $("$python" --version) is not supported; set PYTHON to a Python 3.11, 3.12 or 3.13" >&2
    return 2
  }
  stamp="$folder/.installed-$requirements-$({ cat "$requirements" requirements.txt constraints.txt; echo "$@"; } |
    sha256sum | cut -c1-16)"
  if [ ! -e "$stamp" ]; then
    echo "setting up $folder from $requirements${*:+ and $*} ..."
    [ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
    "$folder/bin/python" -m pip install -q --disable-pip-version-check -r "$requirements" "$@" -c constraints.txt
    touch "$stamp"
  fi
  # shellcheck disable=SC1091
  source "$folder/bin/activate"
}
