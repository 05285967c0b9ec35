"""`Run`: devices, mesh, and the objective, programs and data of each stage, all checked.

`Run(config)` compiles nothing. It writes at most indices and plans of the data to the output folder.
"""

import dataclasses
import json
import os
import sys
from typing import Any, TextIO

import jax

from data import paths
from stdit_jax.components import need_file
from stdit_jax.config import Config
from stdit_jax.errors import may_pass
from stdit_jax.parallel.mesh import make_mesh
from stdit_jax.training import claim
from stdit_jax.training.batches import Encoders
from stdit_jax.training.checkpoints import CONFIG, Checkpoints, from_plain, plain
from stdit_jax.training.compilation import AheadOfTime
from stdit_jax.training.objectives import make_objective
from stdit_jax.training.stage_data import StageData
from stdit_jax.training.stages import Stage, changed_keys, identity, make_stages, naming, stage_of, stage_that_made
from stdit_jax.training.step import ADVERSARY, Programs
from stdit_jax.training.validation import Validation

STARTS = "starts.json"  # in the run folder: how often the run started from its newest checkpoint


def say(text: str, file: TextIO | None = None) -> None:
  """Prints on the first process only."""
  if jax.process_index() == 0:
    print(text, file=file, flush=True)


def warn(text: str) -> None:
  """Prints a warning on the first process only."""
  say(f"warning: {text}", sys.stderr)


def check_platform(wanted: str) -> None:
  """Raises ValueError if the devices are not of the platform `wanted`."""
  try:
    found = jax.default_backend()
  except (RuntimeError, AssertionError) as error:  # JAX_PLATFORMS names a platform without devices
    reason = str(error).splitlines()[0] if str(error) else f"JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS')!r}"
    raise ValueError(f"JAX finds no devices: {reason}") from None
  if wanted and found != wanted:
    raise ValueError(f"config: platform is {wanted!r}, but JAX finds only {found!r} devices ({jax.device_count()} of them)")


def check_output(folder: str, config: Config) -> list[str]:
  """Keys of the configuration that changed since the run in `folder` began.

  Raises:
    ValueError: the folder is not writable, or belongs to another run.
  """
  path = paths.join(folder, CONFIG)
  try:
    if not paths.exists(path) and (others := _foreign(folder)):
      raise ValueError(
        f"config: output={folder!r} holds {', '.join(others[:3])} and no {CONFIG}, so no training made it; give another folder"
      )
    paths.check_writable(folder, "config: output")
    if not paths.exists(path):
      return []
    old = json.loads(paths.read_text(path))
  except OSError as error:
    if may_pass(error):
      raise
    raise ValueError(f"config: output={folder!r} can't be used: {error.strerror}; give another folder") from None
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"{path} is damaged ({error}); give another output folder") from None
  before, now = ({s.name: identity(plain(s.config)) for s in make_stages(c)} for c in (from_plain(old), config))
  for name in filter(before.get, now):
    for key in changed_keys(before[name], now[name]):
      raise ValueError(
        f"config: output={folder!r} belongs to another run: {key} differs in stage {name!r}; give another output folder, "
        "or the config of that run. To change a stage that has not begun, rename it"
      )
  return [key for key in changed_keys(old, plain(config)) if key not in ("resume", "restart_data", "compilation_cache")]


def _foreign(folder):
  """Names of files in `folder` that no training writes before its config.json."""
  # A dot starts the temporary names of `paths.whole`. Older versions wrote tables to tmp*.
  data = [n for n in paths.names(paths.join(folder, "data")) if not n.removeprefix(".").startswith(("table-", "plan-", "tmp"))]
  own = {"checkpoints", "compilation_cache", claim.NAME, STARTS} | (set() if data else {"data"})
  temporary = (".config.tmp", ".running.tmp", ".starts.tmp", ".writable")
  return [name for name in paths.names(folder) if name not in own and not name.startswith(temporary)]


@dataclasses.dataclass(frozen=True)
class StageParts:
  """The parts of one stage."""

  stage: Stage
  objective: Any
  programs: Programs
  data: StageData
  validation: Validation | None


class Run:
  """The parts of a run, checked. `restarts.Restarts` starts or resumes it, and `loop.train` runs it to its end.

  Args:
    config: of the run, as `Config.of` takes it.
    beat, alive: `Watchdog.beat`, called when the run begins an activity, and `Watchdog.alive`.

  Attributes:
    config, mesh; stages: list of `Stage`; total_steps: of all stages; parts: list of `StageParts`, one per stage.
    changed: keys of the configuration that changed since the run began.
    checkpoints, counter, compiler, encoders: services that all stages share.

  Raises:
    ValueError: an error in the configuration, its files or the output folder.
  """

  def __init__(self, config, beat=lambda what, slow=False, waits=False: None, alive=lambda waits=0: None):
    config = Config.of(config)
    self.config, self.beat = config, beat
    self.stages = make_stages(config)
    self.total_steps = self.stages[-1].start + self.stages[-1].steps
    check_platform(config.platform)
    self.mesh = make_mesh(config.mesh, slices=config.slices)
    self.compiler = AheadOfTime(config.compile_threads, say, alive)
    self.counter = self.compiler.counter
    if config.init:
      need_file(config.init, "init")
    made = [self._programs(stage) for stage in self.stages]
    self.changed = check_output(config.output, config)
    self.parts = []
    for stage, (objective, programs) in zip(self.stages, made):
      sources = stage, config.output, self.mesh, objective
      data = StageData(*sources)
      validation = Validation(*sources) if stage.config.validation.every else None
      self.parts.append(StageParts(stage, objective, programs, data, validation))
    self._check_split()
    ends = [stage.start + stage.steps for stage in self.stages]
    self.checkpoints = Checkpoints(config.output, config.keep_checkpoints, config.keep_every, ends)
    self.encoders = Encoders(self.compiler, self.mesh)

  def _programs(self, stage):
    """(objective, `Programs`) of a stage."""
    with naming(stage.name):
      objective = make_objective(stage.config)
      objective.check_files()
      programs = Programs(objective, stage, self.mesh, self.counter)
      if ADVERSARY in programs.scales and not any(jax.tree.leaves(programs.scales[ADVERSARY])):
        raise ValueError(
          f"config: train={stage.config.train!r} excludes the discriminator, so it would stay at its random initialisation. "
          "Include it, or set autoencoder.adversarial_weight=0"
        )
      return objective, programs

  def _check_split(self):
    """Raises ValueError if `split_tokens` names a bucket that no stage has."""
    known = {f"{b.resolution}:{b.num_frames}" for parts in self.parts for b in parts.data.config.parsed_buckets()}
    for stage in self.stages:
      named = stage.config.split_tokens
      if unknown := sorted(set(named.split(",")) - known - {"auto", "never", "always"}):
        raise ValueError(
          f"config: stage {stage.name!r}: split_tokens names {unknown[0]}, which no stage has; buckets are "
          f"{', '.join(sorted(known))}"
        )

  def parts_of(self, step: int) -> StageParts:
    """`StageParts` of the stage of optimizer step `step`."""
    return self.parts[stage_of(self.stages, step).index]

  def parts_that_made(self, step: int) -> StageParts:
    """`StageParts` of the stage that made the checkpoint after `step` optimizer steps."""
    return self.parts[stage_that_made(self.stages, step).index]
