"""The `Run` of most training tests: a training run whose parts a test calls one by one."""

from stdit_jax.training import run
from stdit_jax.training.loop import train
from stdit_jax.training.restarts import Restarts


class Run(run.Run):
  """A `run.Run` with its restart policy and its loop."""

  def __init__(self, config):
    super().__init__(config)
    self.restarts = Restarts(self)

  def start(self):
    return self.restarts.start()

  def train(self, on_sample=None, started=None):
    return train(self, on_sample, self.restarts, started)

  def save(self, step, state, frozen):
    self.restarts.save(step, state, frozen)

  @property
  def skip(self):
    return self.restarts.skip

  def maker(self, stage=0):
    """The function `LoadedStep -> arrays` of a stage, as the loop has it."""
    parts = self.parts[stage]
    make = parts.objective.batch_maker(self.encoders, parts.stage.name)
    return lambda loaded: make(loaded, parts.data.splits[loaded.bucket].layout)
