"""What the entry points share."""

import subprocess
import sys

import jax
import pytest

from stdit_jax.cli import one_line_errors
from tests.tiny_run import ROOT, environment

COUNT_PAGES = """
import ctypes, resource, statistics, sys
import jax
from stdit_jax.cli import keep_freed_memory
if not hasattr(ctypes.CDLL(None), "mallopt"):
  raise SystemExit(3)
if sys.argv[1] == "keep":
  keep_freed_memory()
matrix, x = jax.numpy.ones((4096, 4096)), jax.numpy.ones(4096)
program = jax.jit(lambda matrix, x: jax.lax.fori_loop(0, 3, lambda _, y: ((matrix + y) @ y) / (4096 + y @ (matrix - y)), x))
pages = []
for _ in range(12):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  program(matrix, x).block_until_ready()
  pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(statistics.median(pages))
"""


def test_freed_memory_is_kept():
  """The work space of a program, 64 MB and more, costs fresh pages in every execution; not once the memory is kept."""
  pages = {}
  for mode in ("give back", "keep"):
    command = [sys.executable, "-c", COUNT_PAGES, mode]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    if result.returncode == 3:
      pytest.skip("this C library has no mallopt")
    assert result.returncode == 0, result.stderr
    pages[mode] = float(result.stdout)
  assert pages["keep"] < 0.01 * pages["give back"]


def test_too_little_memory_is_one_line(capsys):
  """Other errors of JAX are none of the user's."""
  with pytest.raises(SystemExit) as exit, one_line_errors():
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nallocations: ...")
  assert exit.value.code == 2
  assert capsys.readouterr().err == (
    "error: a device has too little memory: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes. Take fewer "
    "frames or pixels, or more devices\n"
  )
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), one_line_errors():
    raise jax.errors.JaxRuntimeError("INTERNAL: something else")
