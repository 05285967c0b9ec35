"""Measures the training speed of this machine: `python -m tests.benchmarks.training --config C --stage S --bucket R:F:BATCH`.

It runs the gradient and update programs of `train` on random values in clips of 9:16, without data and encoders. Each row of
the table is a bucket with an implementation of attention. Implementations take turns, so that load on the machine affects all.

  gradient s, update s   median seconds of the two programs
  tokens/s               of both programs together
  TFLOP/s, of peak       of the model in the gradient program, as `train` counts them, and their share of the published peak
  GiB counted            memory of the gradient program with its arguments, as the compiler counts it
  held                   GiB, the most that the process has held so far, if the device reports it

  python -m tests.benchmarks.training --config configs/open_sora_1_2.py:stage1 --stage stage1 --bucket 480p:51:2 \\
    --attention cudnn einsum --config.mesh.fsdp=1
"""

import argparse
import gc
import statistics
import time

import jax
import numpy as np

from data import aspect_ratios
from data.buckets import Bucket
from stdit_jax.cli import one_line_errors, parse_with_changes, read_config
from stdit_jax.models.family import token_grid
from stdit_jax.parallel.mesh import make_mesh
from stdit_jax.parallel.shardings import tree_shardings
from stdit_jax.parallel.topology import peak_tflops
from stdit_jax.plan import parse_bucket
from stdit_jax.planning.programs import GIB
from stdit_jax.training.counter import CompileCounter
from stdit_jax.training.objectives import make_objective
from stdit_jax.training.stage_data import choose_splits
from stdit_jax.training.stages import make_stages
from stdit_jax.training.state import new_state
from stdit_jax.training.step import Programs


def random_batch(parts, bucket, specs, layout):
  """A batch of clips of 9:16. All text tokens are valid."""
  resolution, frames, rows = bucket
  autoencoder = parts.autoencoder.config
  height, width = aspect_ratios.size(resolution, "9:16")
  latent_size = (autoencoder.latent_frames(frames), *autoencoder.latent_size(height, width))
  known = {
    "latent_size": latent_size, "grid": token_grid(parts.model.config, latent_size),
    "height": height, "width": width, "num_frames": frames, "fps": 24, "weight": 1, "text_mask": True, "text_ids": 3,
  }  # fmt: skip
  rng = np.random.default_rng(0)

  def array(path, spec):
    name = path[-1].key
    if name == "sample_id":
      return np.stack([np.arange(rows), np.zeros(rows)], 1).astype(np.uint32)
    if name in known:
      return np.broadcast_to(np.asarray(known[name], spec.dtype), spec.shape)
    return rng.standard_normal(spec.shape, np.float32).astype(spec.dtype)

  values = jax.tree_util.tree_map_with_path(array, specs)
  return jax.tree.map(lambda spec, value: jax.device_put(value, layout.sharding(*spec.axes)), specs, values)


def seconds_of(function, *args):
  """(seconds until the device is done, what the function returned)."""
  started = time.perf_counter()
  result = jax.block_until_ready(function(*args))
  return time.perf_counter() - started, result


def measure(stage, mesh, bucket, repeats, compiled):
  """One row of the table, as {column: value}. `compiled`: programs of earlier rounds."""
  config, objective = stage.config, make_objective(stage.config)
  resolution, frames, rows = bucket
  split = choose_splits(stage, [Bucket(resolution, frames, 1.0, rows)], mesh, objective)[resolution, frames]
  programs = Programs(objective, stage, mesh, CompileCounter())
  program = programs.gradient((resolution, frames), rows, split)
  key = bucket, config.model.fields["attention"]
  if key not in compiled:
    lowered = program.lower(), programs.update.lower()
    compiled[key] = [one.compile() for one in lowered]
  gradient, update = compiled[key]

  def start(random_key):
    params, frozen = objective.init(random_key)
    return new_state(params, programs.optimizer), frozen

  states = jax.eval_shape(start, jax.random.key(0))
  state, frozen = jax.jit(start, out_shardings=tree_shardings(states, mesh, objective.rules))(jax.random.key(0))
  accumulator = programs.new_accumulator(state["params"])
  batch = random_batch(objective.components, bucket, program.batch, split.layout)
  times = []
  for step in range(repeats + 1):  # the first one warms up
    forward, (accumulator, metrics) = seconds_of(gradient, state["params"], frozen, batch, accumulator)
    back, (state, accumulator, _) = seconds_of(update, state, accumulator, np.int32(step))
    times.append((forward, back))
  assert np.isfinite(metrics["loss"])
  tokens, model_flops = program.work
  stats = jax.local_devices()[0].memory_stats() or {}
  memory = gradient.memory_analysis()
  return {
    "times": times[1:], "tokens": tokens, "flops": model_flops,
    "counted": memory.peak_memory_in_bytes / GIB, "held": stats.get("peak_bytes_in_use", 0) / GIB,
    "loss": float(metrics["loss"]),
  }  # fmt: skip


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", required=True)
  parser.add_argument("--stage", required=True)
  parser.add_argument("--bucket", required=True, nargs="+", metavar="RESOLUTION:FRAMES:BATCH")
  parser.add_argument("--attention", nargs="+", default=["auto"])
  parser.add_argument("--repeats", type=int, default=5, help="optimizer steps in a round (default: %(default)s)")
  parser.add_argument("--rounds", type=int, default=2, help="turns of each implementation (default: %(default)s)")
  args = parse_with_changes(parser, argv)
  stages = {}
  with one_line_errors():
    for attention in args.attention:
      config = read_config(args.config, args.changes)
      with config.unlocked():
        config.model.fields.attention = attention
      made = {s.name: s for s in make_stages(config)}
      if args.stage not in made or config.task != "denoiser":
        raise ValueError(f"--stage {args.stage} is none of {', '.join(made)}, or trains no denoiser")
      stages[attention] = made[args.stage]
    mesh = make_mesh(config.mesh, jax.devices(), config.slices)
    buckets = [parse_bucket(text, ()) for text in args.bucket]
  device = jax.devices()[0]
  peak = peak_tflops(device.device_kind)
  print(f"{config.model.name}, {config.model.fields.get('dtype', 'float32')}, {jax.device_count()} x {device.device_kind}")
  columns = (
    "bucket", "batch", "attention", "gradient s", "update s", "tokens/s", "TFLOP/s", "of peak", "GiB counted", "held", "loss",
  )  # fmt: skip
  print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
  for bucket in buckets:
    compiled, rounds = {}, {attention: [] for attention in stages}
    for _ in range(args.rounds):
      for attention, stage in stages.items():
        try:
          rounds[attention].append(measure(stage, mesh, bucket, args.repeats, compiled))
        except jax.errors.JaxRuntimeError as error:
          if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        gc.collect()
    for attention, rows in rounds.items():
      name = f"{bucket[0]} x {bucket[1]}", bucket[2], attention
      if not rows:
        print("| " + " | ".join(map(str, name)) + " | out of memory |", flush=True)
        continue
      forward, back = (statistics.median(t[i] for row in rows for t in row["times"]) for i in (0, 1))
      row = rows[-1]
      speed = row["flops"] / jax.device_count() / forward / 1e12
      values = (
        *name, f"{forward:.4f}", f"{back:.4f}", f"{row['tokens'] / (forward + back):,.0f}", f"{speed:.1f}",
        f"{speed / peak:.1%}" if peak else "", f"{row['counted']:.1f}", f"{row['held']:.1f}", f"{row['loss']:.4f}",
      )  # fmt: skip
      print("| " + " | ".join(map(str, values)) + " |", flush=True)


if __name__ == "__main__":
  main()
