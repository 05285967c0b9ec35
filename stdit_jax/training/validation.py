"""The loss on fixed samples at fixed timesteps, comparable over steps, stages and runs.

It follows Open-Sora 1.2's `eval_loss`. Each bucket gets rows that fit it, whatever its probabilities. The timesteps are
evenly spaced in (0, 1000), without the timestep transform. Row and timestep decide the noise. Rows that only fill a batch have
weight 0. So the loss does not depend on batch, mesh or processes, except for rounding.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stdit_jax.errors import InputError
from stdit_jax.parallel.shardings import Layout, Tree, tree_shardings
from stdit_jax.training.compilation import AheadOfTime
from stdit_jax.training.objectives import Objective
from stdit_jax.training.stage_data import StageData, choose_splits
from stdit_jax.training.stages import Stage


def fixed_data(stage: Stage, mesh: Mesh, objective: Objective) -> Stage:
  """`stage` with the tables of its validation, and with batches that are no larger than the micro batches of `stage`.

  Batches are rounded up until the mesh divides them, since it may differ from the mesh of the training.
  """
  config = stage.config
  named, buckets = config.split_tokens.split(","), []
  for b in config.data.parsed_buckets():
    if b.batch_size and b.keep_prob:
      can_split = config.split_tokens in ("auto", "always") or f"{b.resolution}:{b.num_frames}" in named
      can_split = can_split and objective.splits(b.num_frames, mesh.shape["sequence"])
      parts = Layout(mesh, split_tokens=can_split).batch_parts
      buckets.append(dataclasses.replace(b, batch_size=math.ceil(b.batch_size / parts) * parts))
  splits = choose_splits(stage, buckets, mesh, objective)
  samples, rows = config.validation.samples_per_bucket, []
  for b in buckets:
    split = splits[b.resolution, b.num_frames]
    parts = split.layout.batch_parts
    each = min(b.batch_size // parts // split.micro_batches, math.ceil(samples / parts))
    rows.append((b.resolution, b.num_frames, 1.0, parts * each))
  own = dataclasses.replace(config.data, stage=None)  # all stages are measured on the same rows with the same noise
  data = dataclasses.replace(
    own, tables=config.validation.tables, buckets=tuple(rows), rows_per_bucket=samples, reference_devices=1,
    drop_last=False,
    workers=0,  # threads: the few clips are read in less time than processes take to start
    latents="",  # a cache holds the clips of the training
  )  # fmt: skip
  return dataclasses.replace(stage, name=f"{stage.name}: validation", config=dataclasses.replace(config, data=data))


class Validation:
  """The validation of one stage. It has the arguments and errors of `StageData`."""

  def __init__(self, stage: Stage, output: str, mesh: Mesh, objective: Objective):
    self.stage, self.mesh, self.objective = fixed_data(stage, mesh, objective), mesh, objective
    self.data = StageData(self.stage, output, mesh, objective)
    self.config, self._programs = self.stage.config.validation, {}

  def compile_ahead(self, compiler: AheadOfTime, params: Tree, frozen: Tree) -> None:
    """Starts to compile the programs of all buckets that have rows, for parameters of these shapes."""
    for line, bucket in zip(self.data.report.buckets, self.data.config.parsed_buckets()):
      key = bucket.resolution, bucket.num_frames
      if not (line["steps"] and bucket.batch_size) or key in self._programs:
        continue
      layout, name = self.data.splits[key].layout, f"{bucket.resolution} x {bucket.num_frames}"
      batch = self.objective.batch(key, bucket.batch_size, layout.token_parts)
      places = jax.tree.map(lambda spec: layout.sharding(*spec.axes), batch)  # noqa: B023 - called at once
      program = jax.jit(
        compiler.counter.counted(f"validation {name}", functools.partial(self._losses, layout)),
        in_shardings=(*(tree_shardings(tree, self.mesh, self.objective.rules) for tree in (params, frozen)), places),
        out_shardings=NamedSharding(self.mesh, P()),
      )
      shapes = jax.tree.map(lambda spec: spec.struct, batch)
      self._programs[key] = compiler.add(f"{self.stage.name} {name}", program.lower(params, frozen, shapes))

  def _losses(self, layout, params, frozen, batch):
    return self.objective.fixed_loss(params, frozen, batch, self.config.timesteps, layout), batch["weight"]

  def __call__(self, params: Tree, frozen: Tree, make_batch: Callable[..., Tree]) -> dict[str, float]:
    """The losses of these weights. All processes call it together, after `compile_ahead`.

    Args:
      make_batch: `(LoadedStep, layout) -> arrays` of this stage's training.

    Returns:
      {"validation/loss", "validation/RESOLUTION x FRAMES", "validation/t 0-25%", ...: mean over samples and timesteps}.

    Raises:
      InputError: too many rows cannot be decoded.
    """
    results = []
    for step in self._steps():
      batch = make_batch(step, self.data.splits[step.bucket].layout)
      jax.block_until_ready([result for _, result in results[-1:]])  # else batches would pile up on the device
      results.append((step.bucket, self._programs[step.bucket].result()(params, frozen, batch)))
    return self._means(results)

  def _means(self, results):
    """`results`: [(bucket, (losses [timesteps, B], weight [B]))]."""
    quarters = self.objective.fixed_names(self.config.timesteps)
    sums = collections.defaultdict(lambda: np.zeros(2))
    for bucket, (losses, weight) in results:
      weight = np.asarray(weight, np.float64)
      for quarter, row in zip(quarters, np.asarray(losses, np.float64)):
        for key in ("loss", f"{bucket[0]} x {bucket[1]}", quarter):
          sums[key] += np.sum(np.where(weight > 0, row, 0) * weight), weight.sum()
    if not sums["loss"][1]:
      raise InputError(f"config: stage {self.stage.name!r}: none of the rows of {self.config.tables} can be decoded")
    keys = sorted((key for key in sums if key and sums[key][1]), key=lambda key: key in quarters)
    return {f"validation/{key}": float(sums[key][0] / sums[key][1]) for key in keys}

  def _steps(self):
    """Yields `LoadedStep`s. The `sample_id` of a sample is its row. If a bucket repeats a row, the repetitions get weight 0."""
    with self.data.loader(0, epochs=1) as loader:
      plan, first = loader.plans.plan(0), {}
      for number in range(plan.num_steps):
        for slot, row in zip(range(*plan.slots(number)), plan.rows(number)):
          # The slot where a bucket has this row for the first time.
          first.setdefault((plan.bucket_index(number), int(row)), slot)
      rows = {slot: row for (_, row), slot in first.items()}
      try:
        for step in itertools.islice(loader, plan.num_steps):
          samples = [
            dataclasses.replace(s, sample_id=(0, rows.get(s.sample_id[1], 0)), weight=s.weight * (s.sample_id[1] in rows))
            for s in step.samples
          ]
          yield dataclasses.replace(step, samples=samples)
      except (ValueError, RuntimeError) as error:
        raise InputError(f"validation: {error}") from error
