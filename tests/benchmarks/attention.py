"""Compares the implementations of attention on this machine's device: `python -m tests.benchmarks.attention`.

  python -m tests.benchmarks.attention --implementation cudnn einsum    # on a GPU

The shapes are those of STDiT3-XL/2 (16 heads of 72) in bfloat16: space, time and text of a bucket. For each shape and
implementation the table has the median milliseconds of a forward pass, and of forward and backward together. It also has the
largest relative error of the values and the three gradients, compared with the formula in float32. Implementations take turns.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from stdit_jax.parallel.attention import IMPLEMENTATIONS, attend
from tests.helpers import relative_error

# name: batch, groups, queries, keys
SHAPES = {
  "144p space": (16, 15, 144, 144), "240p space": (8, 15, 405, 405), "480p space": (2, 15, 1632, 1632),
  "720p space": (1, 15, 3655, 3655), "144p time": (16, 144, 15, 15), "480p time": (2, 1632, 15, 15),
  "480p time, 30": (1, 1632, 30, 30), "480p time, 120": (1, 1632, 120, 120), "480p text": (2, 1, 24480, 300),
  "144p text": (16, 1, 2160, 300),
}  # fmt: skip
HEADS, HEAD_DIM = 16, 72


@functools.partial(jax.jit, static_argnums=4)
def forward(query, key, value, lengths, implementation):
  return attend(query, key, value, implementation, lengths=lengths)


@functools.partial(jax.jit, static_argnums=5)
def both(query, key, value, lengths, cotangent, implementation):
  y, pull = jax.vjp(lambda *args: attend(*args, implementation, lengths=lengths), query, key, value)
  return y, *pull(cotangent)


def milliseconds(function, *args):
  started = time.perf_counter()
  jax.block_until_ready(function(*args))
  return 1e3 * (time.perf_counter() - started)


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--implementation", nargs="+", choices=IMPLEMENTATIONS, default=["einsum", "xla"])
  parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
  parser.add_argument("--repeats", type=int, default=10)
  args = parser.parse_args(argv)
  print(
    f"{jax.devices()[0].device_kind}\n| shape | implementation | forward ms | with backward ms | error |\n|---|---|---|---|---|"
  )
  for name in args.shape:
    batch, groups, queries, keys = SHAPES[name]
    rng = np.random.default_rng(0)
    query, key, value, cotangent = (
      jnp.asarray(rng.standard_normal((batch, groups, n, HEADS, HEAD_DIM), np.float32), jnp.bfloat16)
      for n in (queries, keys, keys, queries)
    )
    # Some keys are padding, as in a batch of several aspect ratios.
    valid = rng.integers(-(-4 * keys // 5), keys + 1, (batch, 1))
    lengths = jnp.asarray(np.broadcast_to(valid, (batch, groups)))
    with jax.default_matmul_precision("highest"):
      exact = both(*(x.astype(jnp.float32) for x in (query, key, value)), lengths, cotangent.astype(jnp.float32), "einsum")
      exact = [np.asarray(x) for x in exact]
    errors, times = {}, {which: ([], []) for which in args.implementation}
    for which in args.implementation:
      jax.block_until_ready(forward(query, key, value, lengths, which))
      errors[which] = max(map(relative_error, both(query, key, value, lengths, cotangent, which), exact))
    for _ in range(args.repeats):
      for which, (ahead, whole) in times.items():
        ahead.append(milliseconds(forward, query, key, value, lengths, which))
        whole.append(milliseconds(both, query, key, value, lengths, cotangent, which))
    for which, (ahead, whole) in times.items():
      values = f"{statistics.median(ahead):.3f} | {statistics.median(whole):.3f} | {errors[which]:.4f}"
      print(f"| {name} | {which} | {values} |", flush=True)


if __name__ == "__main__":
  main()
