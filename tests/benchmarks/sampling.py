"""Measures sampling with the model of moving shapes: second order, step caches, and the cost of the loop.

  python -m tests.benchmarks.sampling --run runs/shapes

It prints three results, with the same prompts, noise and guidance:

loop      seconds per step as `sample` runs it, with one call of a program and a line of progress per step, and in one program
          that holds the whole loop
caches    seconds per step (median of interleaved repetitions), and PSNR and SSIM of the videos to those without a cache
order     root mean square distance of the latents to those of 1,000 Euler steps, by sampler and evaluations

The times depend on this machine and its load. Compare only their ratios.
"""

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from data import shapes
from data.command_line import flag
from stdit_jax import loading
from stdit_jax.autoencoders.metrics import psnr, ssim
from stdit_jax.cli import keep_freed_memory, parse_settings, use_compilation_cache
from stdit_jax.generation import shapes_exam
from stdit_jax.generation.pipeline import Request

CACHES = ("pyramid:2,2,2", "pyramid", "pyramid:3,6,9", "residual:0.05", "residual:0.1", "residual:0.2", "residual:0.3")
EVALUATIONS = (8, 10, 12, 14, 16, 20, 30)


@dataclasses.dataclass(frozen=True)
class Settings(loading.PipelineSettings):
  """The flags of one call."""

  count: int = flag("videos in the batch (default: %(default)s)", 8)
  repeats: int = flag("repetitions of each measurement (default: %(default)s)", 5)


def load(settings, **changes):
  """The pipeline of the command line with some other settings."""
  settings = dataclasses.replace(settings, **changes)
  return loading.load_pipeline(settings, *loading.read_model(settings))


def print_order(settings, requests, scale):
  ways = ("euler", 1.0), ("adams-bashforth", 1.0), ("adams-bashforth", 3.0)
  pipelines = [load(settings, sampler=name, timestep_shift=shift) for name, shift in ways]
  exact = pipelines[0].sample_latents(requests, 1000, scale, lambda steps, stage: tqdm(steps, stage, leave=False))
  print(f"\n{'evaluations':>12} {'euler':>10} {'adams-bashforth':>16} {'shift 3':>10}   r.m.s. distance to 1,000 Euler steps")
  for steps in EVALUATIONS:
    made = (pipeline.sample_latents(requests, steps, scale) for pipeline in pipelines)
    first, second, shifted = (np.sqrt(np.mean(np.square(latents - exact))) for latents in made)
    print(f"{steps:>12} {first:>10.4f} {second:>16.4f} {shifted:>10.4f}", flush=True)


def seconds_of(pipeline, requests, steps, scale):
  started = time.perf_counter()
  latents = pipeline.sample_latents(requests, steps, scale)
  return (time.perf_counter() - started) / steps, latents


def print_caches(settings, requests, steps, scale):
  pipelines = {"none": load(settings)} | {name: load(settings, step_cache=name) for name in CACHES}
  videos = {name: p.decode(p.sample_latents(requests, steps, scale), 8) for name, p in pipelines.items()}  # compiles
  times = {name: [] for name in pipelines}
  for _ in range(settings.repeats):
    for name, p in pipelines.items():
      times[name].append(seconds_of(p, requests, steps, scale)[0])
  print(f"\n{'cache':>16} {'step':>10} {'of it':>7} {'PSNR':>9} {'SSIM':>7}   {steps} steps; to the videos without a cache")
  for name in pipelines:
    step, base = statistics.median(times[name]), statistics.median(times["none"])
    line = f"{name:>16} {step * 1e3:>7.1f} ms {step / base:>7.0%}"
    if name != "none":
      pairs = list(zip(videos[name], videos["none"]))
      line += f" {np.mean([psnr(a, b) for a, b in pairs]):>6.1f} dB {np.mean([ssim(a, b) for a, b in pairs]):>7.3f}"
    print(line, flush=True)


def print_loop(settings, requests, steps, scale):
  pipeline, calls = load(settings), []
  step = pipeline._step

  def record(variables, state, *args, **static):
    recorded = state if calls else jax.tree.map(jnp.copy, state)  # only the first state is used later; it is donated
    calls.append(((variables, recorded, *args), static))
    return step(variables, state, *args, **static)

  pipeline._step = record
  pipeline.sample_latents(requests, steps, scale)
  pipeline._step = step
  (variables, state, conditions, _, *rest), static = calls[0]
  times = jnp.asarray(np.stack([args[3] for args, _ in calls]))

  def whole(variables, state, conditions):
    def body(state, t):
      return pipeline._sampler_step(variables, state, conditions, (t[0], t[1]), *rest, **static), None

    return jax.lax.scan(body, state, times)[0].x

  whole = jax.jit(whole).lower(variables, state, conditions).compile()
  ours, one = [], []
  for _ in range(settings.repeats):
    started = time.perf_counter()
    pipeline.sample_latents(requests, steps, scale, lambda steps, stage: tqdm(steps, stage, leave=False))
    ours.append((time.perf_counter() - started) / steps)
    started = time.perf_counter()
    whole(variables, state, conditions).block_until_ready()
    one.append((time.perf_counter() - started) / steps)
  a, b = statistics.median(ours), statistics.median(one)
  print(f"\nloop of {steps} steps: {a * 1e3:.1f} ms a step by `sample`, {b * 1e3:.1f} ms in one program: {a / b - 1:+.1%}")


def main():
  settings = parse_settings(Settings, "tests.benchmarks.sampling", __doc__)
  use_compilation_cache()
  keep_freed_memory()
  config, _ = loading.read_model(settings)
  steps, scale = config.sample.steps, config.sample.guidance_scale
  pairs = shapes_exam.scenes_of("train", settings.count, 8)
  requests = [Request(caption, 48, 80, 8, float(shapes.FPS), seed) for seed, (_, caption) in enumerate(pairs)]
  print(f"{settings.run or settings.weights}: {len(requests)} x 8 x 48 x 80, {steps} steps, guidance {scale:g}")
  print_loop(settings, requests, steps, scale)
  print_caches(settings, requests, steps, scale)
  print_order(settings, requests, scale)


if __name__ == "__main__":
  main()
