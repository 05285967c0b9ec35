"""Shared by the tests that train and sample: data and weights made once per session, quick compilation."""

import functools
import gc
import os
import pathlib

import pytest

# With libtpu installed (tests/planning) and no TPU, JAX would look for one; its profiler then ends the process.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Every operation of a program notes up to 100 frames of where it comes from, and under pytest and Flax there are so many.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "1")

LONGEST = (
  "resume", "processes", "plan", "devices", "runs", "autoencoding", "encode", "bad_input", "pipeline", "compilation",
  "nonfinite", "stages",
)  # fmt: skip


def pytest_collection_modifyitems(items):
  """Files that take minutes begin first, or one worker would still be at one when the other has nothing left to do."""

  def place(item):
    name = item.path.stem.removeprefix("test_")
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)

  items.sort(key=place)  # the order within a file stays


def pytest_collection_finish():
  """What has been imported by now stays to the end: Python need not look through it for garbage again while JAX traces."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(10_000, 10, 10)


@pytest.fixture(scope="session")
def assets(tmp_path_factory):
  """Folder of `tests.tiny_run.make_assets`. Whoever uses it compiles through one cache, subprocesses and the other workers of
  this run of pytest too."""
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
  """A `tests.object_store.ObjectStore` that this process and those it starts take for Google Cloud Storage."""
  from tests.object_store import ObjectStore

  store = ObjectStore()
  with pytest.MonkeyPatch.context() as patch:
    for name, value in store.environment().items():
      patch.setenv(name, value)
    yield store
  store.close()


@pytest.fixture(scope="module")
def quick_compile():
  """Programs made by `jax.jit` from here on are compiled without optimisation: tiny models spend all their time there.
  Convolutions in time are one operation, as on other platforms, not several as on CPUs (tests/autoencoders/test_conv3d.py).
  """
  import jax

  # Imported when needed, and jitted within other programs, where options are refused: before `jit` is another.
  import jax.experimental.pallas.ops.tpu.splash_attention

  from stdit_jax.autoencoders import layers
  from tests.helpers import QUICK_COMPILE

  jit = jax.jit

  @functools.wraps(jit)
  def quick(*args, **options):
    return jit(*args, **{"compiler_options": QUICK_COMPILE, **options})

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "jit", quick)
    patch.setattr(layers, "_by_platform", lambda make, *args: make(layers._whole)(*args))
    yield
