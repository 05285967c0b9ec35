"""Counts the programs that encode clips of videos on each host, and the processor seconds that they take to compile.

  python -m tests.benchmarks.encode_programs --config configs/open_sora_1_2.py:stage1 --topology v5e:16x16 [--measure 2]

Needs libtpu, and no TPU. "one per size" are the programs of `training/clip_encoder.py`, which the devices of a host share.
"pieces" are the programs with which `Codec.encode` cuts a clip into pieces, for each device of the host. Training encoded clips
with them before there was one program per size. The compile time is the mean over --measure sizes of frames and as many of
clips, times their number.
"""

import argparse
import dataclasses
import statistics

import jax
import numpy as np

from stdit_jax.autoencoders.codec import Codec
from stdit_jax.autoencoders.registry import autoencoder_model, make_codec
from stdit_jax.cli import one_line_errors, read_config
from stdit_jax.components import codec_of_shapes
from stdit_jax.config import Config
from stdit_jax.parallel.topology import topology_devices
from stdit_jax.planning.encoding import compile_seconds, encode_sizes, lower_encoder, typical
from stdit_jax.training.stages import make_stages


def pieces_of(codec: Codec, size) -> set:
  """{(function, shapes)}: the programs of `codec.encode` for clips of a size."""
  found = set()

  def note(function, model, variables, *arrays, **static):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
    found.add((function, str(shapes), tuple(static.items())))
    made = jax.eval_shape(lambda v, *a: function(model, v, *a, **static), variables, *shapes)
    return jax.tree.map(lambda s: np.broadcast_to(np.zeros((), s.dtype), s.shape), made)

  noting = dataclasses.replace(codec, run=note)
  list(noting.encode_parts(np.broadcast_to(np.zeros((), np.uint8), (*size, 3))))
  return found


def seconds_of_pieces(config, size, device) -> float:
  """Processor seconds to compile the pieces of a size for one device."""
  shapes = codec_of_shapes(config).variables
  place = jax.sharding.SingleDeviceSharding(device)
  variables = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes)
  codec = make_codec(autoencoder_model(config), variables, config.micro_batch)
  latents = codec.config.latent_size(*size[1:])
  return sum(map(compile_seconds, codec.lower("encode", latents, size[0])))


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", required=True, help="FILE.py or FILE.py:STAGE")
  parser.add_argument("--topology", default="v5e:16x16")
  parser.add_argument("--measure", type=int, default=2, help="sizes of frames, and of clips, to compile (default: %(default)s)")
  settings = parser.parse_args()
  with one_line_errors():
    run(settings)


def run(settings):
  path, _, name = settings.config.partition(":")
  stages = make_stages(Config.of(read_config(path, [])))
  stage = next((s for s in stages if s.name == name), stages[0])
  devices, config = topology_devices(settings.topology, 1), stage.config.autoencoder
  local = sum(device.process_index == devices[0].process_index for device in devices)
  codec = make_codec(autoencoder_model(config), {}, config.micro_batch)
  codec = dataclasses.replace(codec, variables=codec_of_shapes(config).variables)
  few = dataclasses.replace(stage.config.data, aspect_ratios=9)
  nine = dataclasses.replace(stage, config=dataclasses.replace(stage.config, data=few))
  means, of_pieces = [], []
  for sizes in encode_sizes(stage):
    chosen = typical(sizes, settings.measure)
    own, pieces = [], []
    for size in chosen:
      own.append(compile_seconds(lower_encoder(config, size, devices[0])))
      pieces.append(seconds_of_pieces(config, size, devices[0]))
      print(f"{' x '.join(map(str, size))}: {own[-1]:.0f} s, pieces {pieces[-1]:.0f} s for each device", flush=True)
    means.append(statistics.mean(own) if own else 0.0)
    of_pieces.append(statistics.mean(pieces) if pieces else 0.0)
  print(f"\n{stage.name}, {settings.topology}: {local} chips per host; processor hours of the compiler per host, first start")
  print(f"{'':>14} {'frames':>7} {'clips':>6} {'one per size':>13} {'hours':>6} {'pieces':>7} {'hours':>6}")
  for text, chosen in (("all ratios", stage), ("9 per name", nine)):
    kinds = encode_sizes(chosen)
    pieces = set().union(*(pieces_of(codec, size) for sizes in kinds for size in sizes))
    hours = sum(len(sizes) * mean for sizes, mean in zip(kinds, means)) / 3600
    before = local * sum(len(sizes) * mean for sizes, mean in zip(kinds, of_pieces)) / 3600
    counts = (
      f"{len(kinds[0]):>7} {len(kinds[1]):>6} {sum(map(len, kinds)):>13} {hours:>6.1f} {local * len(pieces):>7} {before:>6.1f}"
    )
    print(f"{text:>14} {counts}")


if __name__ == "__main__":
  main()
