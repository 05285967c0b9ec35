"""Shared by all tests: how XLA compiles, the order of the files, and data and weights that are made once per session."""

import gc
import os
import pathlib

import pytest

from tests import QUICK_FLAGS

# With libtpu installed (tests/planning) and no TPU, JAX would look for one, and libtpu's profiler would end the process.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tiny models spend their time on compilation. Tests against reference values ask for the usual optimisation (`SHIPPED` of
# tests/helpers.py). GPUs refuse these flags.
if os.environ["JAX_PLATFORMS"] == "cpu" and QUICK_FLAGS not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_FLAGS}".strip()
# By default XLA stores up to 100 stack frames with each operation. Stacks under pytest and Flax are that deep.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "1")

LONGEST = (
  "processes", "resume", "new_family", "plan", "encode_programs", "devices", "autoencoding", "pipeline", "invariants", "runs",
  "stages", "faults", "encode", "codec", "temporal", "step", "bad_input", "validation", "step_cache", "samples", "nonfinite",
)  # fmt: skip


def pytest_collection_modifyitems(items):
  """Starts the files that take minutes first. Otherwise one worker would end with such a file while the other one is idle."""

  def place(item):
    name = item.path.stem.removeprefix("test_")
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)

  items.sort(key=place)  # stable: keeps the order within a file


def pytest_collection_finish():
  """Excludes all that is imported by now from garbage collection, which would search it again and again while JAX traces."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(10_000, 10, 10)


@pytest.fixture(scope="session")
def assets(tmp_path_factory):
  """Folder of `tests.tiny_run.make_assets`.

  Tests with this fixture share one cache of compiled programs, also with their subprocesses and with other pytest workers.
  """
  import jax

  from tests import tiny_run

  folder = tmp_path_factory.mktemp("assets")
  own = tmp_path_factory.getbasetemp()
  shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
  old = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", str(shared / "xla"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  tiny_run.make_assets(folder)
  yield pathlib.Path(folder)
  jax.config.update("jax_compilation_cache_dir", old)


@pytest.fixture(scope="session")
def store():
  """A `tests.object_store.ObjectStore`. This process and its subprocesses take it for Google Cloud Storage."""
  from tests.object_store import ObjectStore

  store = ObjectStore()
  with pytest.MonkeyPatch.context() as patch:
    for name, value in store.environment().items():
      patch.setenv(name, value)
    yield store
  store.close()
