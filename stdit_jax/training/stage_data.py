"""The data of one stage: its plan, the check against a checkpoint, the loader of this process."""

import math
import pathlib

import jax

from data import plan, sources
from data.config import DataConfig
from data.loader import make_loader
from stdit_jax.generation.prompts import TokenizeText
from stdit_jax.models import t5


class StageData:
  """Opens the tables and plans of a stage; raises ValueError when nothing fits or a batch does not divide.

  Attributes: report: where the rows of the first epoch go, a table when printed.
  """

  def __init__(self, stage, output, mesh):
    config = stage.config
    self.stage = stage.name
    values = config.data.to_dict()
    try:
      self.config = DataConfig.create(values)
      self.folder = str(pathlib.Path(output) / "data")
      table = sources.open_table(self.config, self.folder)
      self._plans = plan.PlanSequence(table, self.config, self.folder)
      self.report = self._plans.report(0)
    except ValueError as error:
      raise ValueError(f"config: stage {stage.name!r}: {error}") from None
    self._tokenize = None
    if config.task == "denoiser" and config.text_encoder.where != "disk":
      text = config.text_encoder
      self._tokenize = TokenizeText(text.tokenizer, text.max_length, text.clean_captions)
      if (ids := self._tokenize.vocab_size) > (known := t5.get_config(text.name).vocab_size):
        raise ValueError(f"config: tokenizer {text.tokenizer!r} has {ids} ids, but text encoder {text.name!r} knows {known}")
    devices = math.prod(mesh.shape.values())
    for bucket in self.config.parsed_buckets():
      if bucket.batch_size and bucket.batch_size % devices:
        near = math.ceil(bucket.batch_size / devices) * devices
        raise ValueError(
          f"config: stage {stage.name!r}: the batch of {bucket.batch_size} of bucket {bucket.name} does not divide by the "
          f"{devices} devices of the mesh; take {near}, or another mesh"
        )
    self._devices = devices

  def micro_batches(self, batch, limit):
    """Parts to split a global batch into, so that a device holds at most `limit` tokens of it at a time (0: one part)."""
    if not limit or "latents_mean" not in batch:
      return 1
    rows, frames, space, _ = batch["latents_mean"].shape
    rows //= self._devices
    return next(k for k in range(1, rows + 1) if rows % k == 0 and (rows // k * frames * space <= limit or k == rows))

  def identity(self):
    """What a checkpoint stores of the plan: everything that it depends on."""
    return self._plans.description

  def check_same(self, old, restart):
    """Whether the plan is the one of the checkpoint; raises ValueError, naming what changed, unless `restart` lets it pass."""
    changes = plan.changed_keys(old, self.identity())
    if changes and not restart:
      raise ValueError(
        f"config: the data of stage {self.stage!r} is not that of the checkpoint ({'; '.join(changes)}); restore it, or "
        "start the data anew with --config.restart_data=True"
      )
    return not changes

  def loader(self, taken, skip=()):
    """This process's loader, after so many micro steps of the stage; those of the plan in `skip` are passed over."""
    shard = jax.process_index(), jax.process_count()
    return make_loader(self.config, self.folder, shard=shard, start=plan.place(taken, skip), skip=skip, tokenize=self._tokenize)
