"""Measures peak memory and speed of loading a T5-XXL encoder from synthetic bfloat16 safetensors.

  python tests/benchmarks/load_t5_xxl.py [--layers 24] [--folder /tmp] [--keep]

It writes a file of 9.5 GB (24 layers) and loads the file in a new process. The peak resident memory beyond the result must
stay below the largest stacked parameter plus 1 GB. Exit code 1 if it does not.
"""

import argparse
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from stdit_jax.interop import foreign_spec, load_variables, write_checkpoint
from stdit_jax.models import t5

GB = 1e9


def config_of(layers):
  return t5.get_config("xxl", num_layers=layers, param_dtype="bfloat16")


def write(folder, layers):
  """Writes the file. Every tensor repeats one block of random numbers."""
  spec = foreign_spec("t5", t5.init_shapes(config_of(layers)))
  block = (np.random.default_rng(0).standard_normal(1 << 20, np.float32) * 0.02).astype(jnp.bfloat16)
  tensors = ((name, np.resize(block, shape)) for name, shape in spec.items())
  spec = {name: (shape, block.dtype) for name, shape in spec.items()}
  start = time.monotonic()
  (path,) = write_checkpoint(folder / "t5.safetensors", spec, tensors)
  seconds, size = time.monotonic() - start, path.stat().st_size
  print(f"wrote {size / GB:.2f} GB in {seconds:.1f} s ({size / GB / seconds:.2f} GB/s)", flush=True)
  return path


def peak():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load(path, layers):
  """Loads the file and prints the measurements. Returns whether the memory stays below the limit."""
  shapes = t5.init_shapes(config_of(layers))
  jnp.zeros(()).block_until_ready()
  before = int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()  # resident now
  start = time.monotonic()
  variables = load_variables(path, "t5", shapes)
  seconds = time.monotonic() - start
  leaves = jax.tree.leaves(variables)
  result, largest = sum(leaf.nbytes for leaf in leaves), max(leaf.nbytes for leaf in leaves)
  beyond, limit = peak() - before - result, largest + GB
  print(
    f"loaded {result / GB:.2f} GB in {seconds:.1f} s ({result / GB / seconds:.2f} GB/s); peak {peak() / GB:.2f} GB, "
    f"before {before / GB:.2f} GB: {beyond / GB:.2f} GB beyond the result, limit {limit / GB:.2f} GB"
  )
  return beyond <= limit


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--layers", type=int, default=24, help="fewer for machines with less memory")
  parser.add_argument("--folder", default=tempfile.gettempdir(), help="folder for the file, which is deleted at the end")
  parser.add_argument("--keep", action="store_true", help="keep the file")
  parser.add_argument("--load", help=argparse.SUPPRESS)  # the child process
  args = parser.parse_args()
  if args.load:
    return 0 if load(args.load, args.layers) else 1
  folder = pathlib.Path(tempfile.mkdtemp(dir=args.folder, prefix="t5-xxl-"))
  try:
    path = write(folder, args.layers)
    return subprocess.run([sys.executable, __file__, "--load", str(path), "--layers", str(args.layers)]).returncode
  finally:
    if not args.keep:
      shutil.rmtree(folder)


if __name__ == "__main__":
  sys.exit(main())
