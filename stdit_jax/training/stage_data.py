"""The data of one stage: its plan, the check against a checkpoint, the loader of this process."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from jax.sharding import Mesh

from data import paths, plan, sources
from data.buckets import Bucket
from data.loader import Loader, make_loader
from stdit_jax.parallel.exchange import process_rows
from stdit_jax.parallel.shardings import Layout
from stdit_jax.training.objectives import Objective
from stdit_jax.training.stages import Stage, naming
from stdit_jax.training.step import Split


def choose_splits(stage: Stage, buckets: Iterable[Bucket], mesh: Mesh, objective: Objective) -> dict[tuple[str, int], Split]:
  """{(resolution, frames): Split} of the buckets of a stage that have a batch size.

  `split_tokens` of the configuration decides. "auto" splits the tokens of a bucket over the mesh's `sequence` axis if its batch
  does not divide by all devices, or if one sample has more tokens than `max_tokens_per_device`. A list such as
  "480p:204,720p:51" names the buckets to split.

  Raises:
    ValueError: a batch does not divide (the message names the next larger batch that does), or a named bucket can't be split.
  """
  config, splits = stage.config, {}
  limit, sequence = config.max_tokens_per_device, mesh.shape["sequence"]
  for bucket in buckets:
    if not (rows := bucket.batch_size):
      continue
    key = bucket.resolution, bucket.num_frames
    tokens = objective.work(objective.batch(key, 1))[0]
    whole, split = Layout(mesh), Layout(mesh, split_tokens=True)
    can_split = objective.splits(key[1], sequence)
    if config.split_tokens == "auto":
      wants_split = rows % whole.batch_parts or (limit and tokens > limit)
    else:
      wants_split = config.split_tokens == "always" or f"{key[0]}:{key[1]}" in config.split_tokens.split(",")
      if wants_split and sequence > 1 and not can_split and config.split_tokens != "always":
        raise ValueError(
          f"config: stage {stage.name!r}: split_tokens names bucket {bucket.name}, whose clips can't be split over {sequence} "
          "devices; remove this name, or choose another length or mesh.sequence"
        )
    layout = split if wants_split and sequence > 1 and can_split else whole
    if rows % layout.batch_parts:
      near = math.ceil(rows / layout.batch_parts) * layout.batch_parts
      raise ValueError(
        f"config: stage {stage.name!r}: the batch of {rows} of bucket {bucket.name} does not divide by the "
        f"{layout.batch_parts} parts into which the mesh splits a batch; take {near}, or another mesh"
      )
    per_device, each = rows // layout.batch_parts, tokens / layout.token_parts  # samples; tokens of one sample
    divisors = [k for k in range(1, per_device + 1) if per_device % k == 0]
    within_limit = (k for k in divisors if not limit or per_device // k * each <= limit)
    splits[key] = Split(layout, next(within_limit, per_device))  # the fewest micro batches
  return splits


class StageData:
  """The tables and plans of a stage.

  Attributes:
    config: its `DataConfig`.
    cache: the `data.latents.Cache` that replaces videos, or None.
    report: buckets of the rows in the first epoch. It prints as a table.
    identity: the values on which the plan depends. A checkpoint stores them.
    splits: {(resolution, frames): Split}.

  Raises:
    ValueError: no row fits a bucket, or a batch does not divide.
  """

  def __init__(self, stage: Stage, output: str, mesh: Mesh, objective: Objective):
    self.stage = stage.name
    with naming(stage.name):
      stage.config.data.validate()
      self.config = objective.data_config(stage.config.data)
      # The files are memory-mapped, so they need a local disk. Their names are digests of their contents, so runs share them.
      self.folder = paths.user_cache("data") if paths.is_remote(output) else paths.join(output, "data")
      table = sources.open_table(self.config, self.folder)
      self.cache = objective.open_cache(self.config, table) if self.config.latents else None
      self._plans = plan.PlanSequence(table, self.config, self.folder, self.cache)
      self.report, self.identity = self._plans.report(0), self._plans.description
    self._condition = objective.worker(self.cache)
    self.splits = choose_splits(stage, self.config.parsed_buckets(), mesh, objective)
    with naming(stage.name):
      objective.check_plan(self._plans.plan(0))

  def check_same(self, old: dict[str, Any], restart: bool) -> bool:
    """Whether the checkpoint was made with this plan. If not, raises ValueError with the changes, unless `restart` is set."""
    changes = plan.changed_keys(old, self.identity)
    if changes and not restart:
      raise ValueError(
        f"config: the data of stage {self.stage!r} is not that of the checkpoint ({'; '.join(changes)}); restore it, or "
        "start a new data order with --config.restart_data=True"
      )
    return not changes

  def sources(self, taken: int, skip: Iterable[int] = ()) -> list[int]:
    """For each training epoch up to the current one, the encoded epoch that it reads. [] without a cache.

    A checkpoint stores this list. Training epochs after the last encoded epoch read the encoded epochs again.
    """
    if self.cache is None:
      return []
    return [self._plans.source(epoch) for epoch in range(self._plans.locate(plan.place(taken, skip))[0] + 1)]

  def follow(self, sources: Iterable[int]) -> None:
    """Makes the loader read the encoded epochs that a checkpoint lists, even if `encode` has added epochs since then."""
    if self.cache is not None:
      self.cache.followed = dict(enumerate(sources))

  def buckets_ahead(self, taken: int, count: int, skip: Iterable[int] = ()) -> list[Bucket]:
    """Buckets of the next `count` micro steps after `taken`, in the order of first use, up to the end of the epoch."""
    epoch, step = self._plans.locate(plan.place(taken, skip))
    return self._plans.plan(epoch).buckets(step, count)

  def sizes_ahead(self, taken: int, skip: Iterable[int] = ()) -> list[tuple[int, int, int]]:
    """(frames, height, width) of the clips that are encoded in an epoch, in the order of first use after `taken` micro steps.

    [] if a cache has their latents.
    """
    if self.cache is not None:
      return []
    epoch, step = self._plans.locate(plan.place(taken, skip))
    return self._plans.plan(epoch).sizes(step)

  def text_ahead(self, buckets: Iterable[Bucket]) -> list[tuple[int, Layout]]:
    """(rows, layout) of the batches of these buckets whose captions are encoded; [] if a cache has their features."""
    if self.cache is not None and self.cache.text:
      return []
    return [(b.batch_size, self.splits[b.resolution, b.num_frames].layout) for b in buckets if b.batch_size]

  def loader(self, taken: int, skip: Sequence[int] = (), epochs: int | None = None) -> Loader:
    """The loader of this process after `taken` micro steps of the stage. `skip`: micro steps of the plan to skip."""
    sizes = {(b.resolution, b.num_frames): b.batch_size or 0 for b in self.config.parsed_buckets()}
    shard: Any = {key: (process_rows(split.layout, sizes[key]), sizes[key]) for key, split in self.splits.items()}
    start = plan.place(taken, skip)
    return make_loader(
      self.config, self.folder, shard=shard, start=start, skip=skip, condition=self._condition, epochs=epochs, cache=self.cache
    )
