"""Computes the memory of a video decoder on a TPU chip, by the TPU's compiler. It needs no TPU and measures nothing.

  python -m tests.benchmarks.decoder_memory --topology v5e:2x4
  python -m tests.benchmarks.decoder_memory --name cogvideox-5b --size 480 720 --frames 49 --devices 1

The memory includes the decoder's weights and those of a denoiser (--beside). The program chooses the frames at a time (from
--micro-batch down) and the tiles as `sample` does.
"""

import argparse
import time

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from stdit_jax.autoencoders import codec, registry
from stdit_jax.models.layers import DTYPES
from stdit_jax.parallel.topology import CHIPS, parse_topology, topology_devices

GIB = 2**30


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--topology", default="v5e:2x4")
  parser.add_argument("--name", default="open-sora-1.2")
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument("--size", type=int, nargs=2, default=(720, 1280), metavar=("H", "W"))
  parser.add_argument("--frames", type=int, default=408)
  parser.add_argument("--micro-batch", type=int, default=4)
  parser.add_argument("--devices", type=int, nargs="+", default=(1, 8))
  parser.add_argument(
    "--beside", type=float, default=4.3, metavar="GIB", help="of the denoiser (default: STDiT3-XL/2 in float32)"
  )
  args = parser.parse_args()

  module = registry.find(args.name)
  model = module.build(module.get_config(args.name), DTYPES[args.dtype])
  shapes, chips = module.init_shapes(model.config), topology_devices(args.topology, 1)
  weights = sum(np.prod(s.shape) * s.dtype.itemsize for s in jax.tree.leaves(shapes)) / GIB
  limit = CHIPS[parse_topology(args.topology)].memory_gib
  size = model.config.latent_size(*args.size)
  print(f"{args.name}, {args.frames} x {args.size[0]} x {args.size[1]}, {args.dtype}, {args.topology}: {limit:.2f} GiB a chip")
  print(f"{'chips':>5} {'frames':>6} {'tiles':>11} {'GiB':>6} {'of':>6} {'compiled in':>12}")
  for count in args.devices:
    place = SingleDeviceSharding(chips[0])
    if count > 1:
      place = NamedSharding(Mesh(np.asarray(chips[:count]), ("pieces",)), PartitionSpec())
    placed = jax.tree.map(lambda s, place=place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes)
    made, began = registry.make_codec(model, placed, args.micro_batch), time.monotonic()
    made, needed = codec.fit_tiles(made, size, {"decode": {args.frames}}, (limit - args.beside - weights) * GIB)
    tiles = f"{made.tiles.height * 8} x {made.tiles.width * 8}" if made.tiles else "whole"
    needed = needed["decode"] / GIB + weights + args.beside
    print(
      f"{count:>5} {made.micro_batch:>6} {tiles:>11} {needed:6.2f} {limit:6.2f} {time.monotonic() - began:10.0f} s", flush=True
    )


if __name__ == "__main__":
  main()
