"""Compares the speed of `stdit_jax.encode` with that of the encoder alone.

  python -m tests.benchmarks.encode [--autoencoder sd-kl-f8] [--clips 24] [--workers 1]

The encoder alone gets the same clips, already decoded. On a CPU, decoding and encoding share the cores. The column `data` has
the CPU time of the workers.
"""

import argparse
import pathlib
import resource
import tempfile
import time

import jax
import numpy as np

from data import latents, loader
from stdit_jax import encode
from stdit_jax.autoencoders import registry
from stdit_jax.cli import keep_freed_memory, use_compilation_cache
from stdit_jax.interop import save_variables
from stdit_jax.training.compilation import AheadOfTime
from tests import tiny_run
from tests.data import files


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--autoencoder", default="sd-kl-f8")
  parser.add_argument("--clips", type=int, default=24)
  parser.add_argument("--frames", type=int, default=4)
  parser.add_argument("--workers", type=int, default=1)
  args = parser.parse_args()
  use_compilation_cache()
  keep_freed_memory()
  with tempfile.TemporaryDirectory() as folder:
    measure(args, pathlib.Path(folder))


def measure(args, folder):
  module = registry.find(args.autoencoder)
  config = module.get_config(args.autoencoder)
  zeros = jax.tree.map(lambda s: np.full(s.shape, 0.01, s.dtype), module.init_shapes(config))
  save_variables(folder / "autoencoder.safetensors", module.layouts[0], zeros, config=config)
  row = {"text": "columns", "num_frames": 48, "height": 144, "width": 256, "fps": 24}
  files.write_video(folder / "0.mp4", frames=48, height=144, width=256)
  for i in range(1, args.clips):
    (folder / f"{i}.mp4").symlink_to(folder / "0.mp4")
  files.write_csv(folder / "table.csv", [{"path": f"{i}.mp4", **row} for i in range(args.clips)])
  changes = {
    "data__tables": (str(folder / "table.csv"),), "data__buckets": (("144p", args.frames, 1.0, 1),),
    "data__workers": args.workers, "autoencoder__name": args.autoencoder,
    "autoencoder__weights": str(folder / "autoencoder.safetensors"),
    "model__fields": {"hidden_size": 48, "depth": 1, "model_max_length": 16, "in_channels": config.latent_channels},
  }  # fmt: skip
  file = tiny_run.write_config(folder / "config.py", folder, folder / "run", **changes)
  settings = encode.parse(["--config", str(file), "--output", str(folder / "out"), "--epochs", "1", "--no-text"])
  (work,) = encode.make_work(settings, encode.choose(settings), AheadOfTime(0, print))
  keys = np.asarray(work.part.keys)
  source = work.source
  clips = [clip["pixels"] for _, clip in loader.read_clips(source.data, source.plans.table, keys, 8)]
  turn = work._turn(args.frames)
  work.encoder(clips[:turn])  # compiles
  began = time.monotonic()
  for begin in range(0, len(clips), turn):
    work.encoder(clips[begin : begin + turn])
  alone = time.monotonic() - began
  began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
  encode.write(work, range(work.part.num_shards), keys, shows=False)
  written, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
  workers = sum(getattr(after, k) - getattr(before, k) for k in ("ru_utime", "ru_stime"))
  assert latents.finish(work.part, work.features)
  frames = len(keys) * args.frames
  print(f"{'frames':>8} {'alone/s':>9} {'encode/s':>9} {'slower':>7} {'data':>8}")
  print(f"{frames:>8} {frames / alone:>9.2f} {frames / written:>9.2f} {written / alone - 1:>7.1%} {workers:>6.1f} s")


if __name__ == "__main__":
  main()
