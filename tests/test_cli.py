"""What the entry points share."""

import subprocess
import sys

import pytest

from tests.tiny_run import ROOT, environment

COUNT_PAGES = """
import ctypes, resource, sys
import numpy as np
from stdit_jax.cli import keep_freed_memory
if not hasattr(ctypes.CDLL(None), "mallopt"):
  raise SystemExit(3)
if sys.argv[1] == "keep":
  keep_freed_memory()
np.ones(64 << 20, np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
  np.ones(64 << 20, np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_kept():
  """Four blocks of 64 MB, one after the other, cost fresh pages each time; not once the memory is kept."""
  pages = {}
  for mode in ("give back", "keep"):
    command = [sys.executable, "-c", COUNT_PAGES, mode]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    if result.returncode == 3:
      pytest.skip("this C library has no mallopt")
    assert result.returncode == 0, result.stderr
    pages[mode] = int(result.stdout)
  assert pages["keep"] < 0.01 * pages["give back"]
