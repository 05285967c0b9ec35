"""Computes the hours of a training from each bucket's shortest possible step (its bound) and its frequency."""

import functools
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data import aspect_ratios, plan, sources
from data import buckets as bucket_rules
from data.buckets import Bucket
from stdit_jax.autoencoders import registry
from stdit_jax.components import Components
from stdit_jax.parallel.topology import CHIPS, parse_topology
from stdit_jax.training.objectives import make_objective
from stdit_jax.training.stages import Stage

Key = tuple[str, int]  # (resolution, frames) of a bucket

ASSUMED_ROWS = 20_000


def assumed_rows(buckets: Sequence[Bucket]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(frames, height, width) of rows that stand in for a table.

  All rows are large enough for every resolution. One in ten is an image. The lengths of the clips are spread evenly, from the
  shortest bucket to twice the longest.
  """
  lengths, frames = sorted({b.num_frames for b in buckets if b.num_frames > 1}), np.ones(ASSUMED_ROWS, np.int64)
  if lengths:
    frames = np.random.default_rng(0).integers(lengths[0] + 1, 2 * lengths[-1], ASSUMED_ROWS)
    frames[: ASSUMED_ROWS // 10] = 1
  side = np.full(ASSUMED_ROWS, 8192)
  return frames, side, side


def bucket_shares(stage: Stage) -> tuple[dict[Key, float], str]:
  """({(resolution, frames): share of the micro steps}, what was counted).

  Counts the first epoch of the stage's tables, or `assumed_rows` if it names none. Raises ValueError for tables that can't be
  used.
  """
  config = make_objective(stage.config).data_config(stage.config.data)
  buckets = config.parsed_buckets()
  if config.tables:
    with tempfile.TemporaryDirectory() as folder:
      report = plan.PlanSequence(sources.open_table(config, folder), config, folder).report(0)
    steps = {(b.resolution, b.num_frames): entry["steps"] for b, entry in zip(buckets, report.buckets)}
    counted = f"{report.rows:,} rows of its tables"
  else:
    bucket, *_ = bucket_rules.assign(*assumed_rows(buckets), (config.seed, 0, 0), buckets, 1)
    rows = np.bincount(bucket[bucket >= 0], minlength=len(buckets))
    steps = {(b.resolution, b.num_frames): n / b.batch_size for b, n in zip(buckets, rows) if b.batch_size}
    counted = "assumed rows, without a table: large enough for every resolution, a tenth images, clips of all lengths alike"
  total = sum(steps.values())
  return {key: n / total for key, n in steps.items() if n}, counted


def host_rate(result: Mapping[str, Any], seconds: float) -> float:
  """Rows a second that each host must read, decode and encode, so that a micro step takes `seconds`.

  `result`: of `programs.Compiler`.
  """
  return result["batch"] / result["hosts"] / seconds


def update_seconds(resident: dict[str, int], topology: str) -> float:
  """Seconds of the update program at the chip's memory bandwidth.

  It reads and writes parameters, gradients, optimizer and average once. `resident`: their bytes per chip.
  """
  moved = 2 * sum(resident[name] for name in ("parameters", "gradients", "optimizer", "average"))
  return moved / (CHIPS[parse_topology(topology)].memory_gbs * 1e9)


def encoder_seconds(
  stage: Stage, parts: Components, shares: Mapping[Key, float], topology: str, chips: int
) -> dict[str, float]:
  """{"videos", "captions"}: mean seconds of the encoders for a micro step, at the published peak of the chips.

  An encoder takes 0 seconds if its results are cached or on disk. XLA counts the FLOPs of the autoencoder, for the aspect ratio
  that is closest to square. The FLOPs of T5 are computed by formula. If T5 runs in the step
  (`text_encoder.where="step"`), the bound of the bucket has the memory traffic of T5, but not its FLOPs.

  Args:
    parts: of the stage; shares: of `bucket_shares`.
  """
  config, peak = stage.config, chips * CHIPS[parse_topology(topology)].tflops * 1e12
  rows = {(b.resolution, b.num_frames): b.batch_size or 0 for b in config.data.parsed_buckets()}
  videos = captions = 0.0
  if not config.data.latents:
    videos = sum(share * rows[key] * _video_flops(parts.autoencoder, *key) for key, share in shares.items())
  if not parts.conditioner.is_cached(config.data.latents):
    captions = parts.conditioner.encoder_flops(sum(share * rows[key] for key, share in shares.items()))
  return {"videos": videos / peak, "captions": captions / peak}


@functools.cache
def _video_flops(model, resolution: str, frames: int) -> float:
  """FLOPs of an autoencoder that encodes one clip."""
  pixels = aspect_ratios.size(resolution, aspect_ratios.closest_ratio(1, 1, resolution))
  shapes = registry.family_of(model.config).init_shapes(model.config)
  made = registry.make_codec(model, shapes, micro_batch=1)  # larger micro batches would be padded
  return made.flops("encode", model.config.latent_size(*pixels), frames)


def stage_hours(stage: Stage, shares: dict[Key, float], seconds: dict[Key, float], update: float = 0.0) -> float:
  """Hours of a stage at the bounds of its buckets.

  Args:
    shares: of `bucket_shares`; seconds: {(resolution, frames): seconds of a micro step}; update: seconds of an update.
  """
  mean = sum(share * seconds[key] for key, share in shares.items())
  return stage.steps * (stage.config.optimizer.accumulate * mean + update) / 3600
