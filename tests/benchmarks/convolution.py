"""Compares convolutions in time and space, whole and frame by frame: `python -m tests.benchmarks.convolution`.

The shapes are those of the video autoencoders at small widths, in float32. For each shape the table has the median
milliseconds of both ways, forward and with the two gradients, and the ratio of the whole convolution to the other one. The two
take turns.
"""

import argparse
import functools
import statistics

import jax

from stdit_jax.autoencoders import layers
from tests.benchmarks.attention import milliseconds

# name: clip [N, T, H, W], channels in and out, stride and padding in time
SHAPES = {
  "first level": ((4, 17, 12, 12), 24, 24, 1, (2, 0)), "half the frames": ((4, 20, 12, 12), 24, 24, 2, (1, 0)),
  "last level": ((4, 5, 12, 12), 48, 48, 1, (2, 0)), "double the frames": ((4, 5, 12, 12), 48, 96, 1, (2, 0)),
  "to latents": ((4, 17, 12, 12), 24, 4, 1, (2, 0)), "causal3d": ((1, 9, 48, 48), 64, 64, 1, (2, 0)),
}  # fmt: skip
WAYS = {"whole": layers._whole, "frame by frame": layers._frame_by_frame}


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def forward(conv, x, kernel, strides, padding):
  return conv(x, kernel, strides, padding)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def both(conv, x, kernel, strides, padding):
  y, back = jax.vjp(lambda x, kernel: conv(x, kernel, strides, padding), x, kernel)
  return back(y)


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--repeats", type=int, default=10)
  args = parser.parse_args(argv)
  names = " | ".join(f"{way}, {what}" for what in ("forward", "with gradients") for way in (*WAYS, "ratio"))
  print(f"{jax.devices()[0].device_kind}\n| shape | {names} |\n{'|---' * 7}|")
  for name, (clip, features_in, features_out, stride, padding) in SHAPES.items():
    x = jax.random.normal(jax.random.key(0), (*clip, features_in))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, features_in, features_out))
    cells = []
    for function in (forward, both):
      times = {way: [] for way in WAYS}
      for turn in range(args.repeats + 1):
        for way, conv in WAYS.items():
          took = milliseconds(function, conv, x, kernel, (stride, 1, 1), (padding, (1, 1), (1, 1)))
          times[way] += [took] if turn else []
      whole, by_frames = (statistics.median(times[way]) for way in WAYS)
      cells += [f"{whole:.1f}", f"{by_frames:.1f}", f"{whole / by_frames:.1f}"]
    print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
  main()
