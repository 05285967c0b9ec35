"""Orbax checkpoints of a run, written asynchronously.

`<output>/config.json` is the whole configuration. `<output>/checkpoints/<step>/` is a checkpoint, which exists only when it is
complete. In a storage bucket a checkpoint counts once orbax has written `commit_success.txt`.

Parameters, averages, optimizer and position are separate items. So a reader can restore the averages alone: Orbax does not
restore parts of one item.
"""

import contextlib
import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from configs import base
from data import paths
from stdit_jax.config import Config
from stdit_jax.errors import InputError, may_pass
from stdit_jax.parallel.shardings import with_shardings
from stdit_jax.training.stages import make_stages, stage_that_made
from stdit_jax.training.watchdog import StartAgain

CONFIG = "config.json"
# Errors of tensorstore that do not mean a damaged checkpoint.
_NOT_ITS_FAULT = "PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED"
# Errors of tensorstore and `paths.errors` after which another attempt may succeed.
_PASSES = "RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|INTERNAL|the bucket gives no answer"


def plain(config: Any) -> Any:
  """A `Config` as values that JSON can hold. Tuples become lists."""
  return json.loads(json.dumps(config.to_dict()))


NO_LONGER = (("autoencoder", "temporal"),)  # keys of earlier versions that had no effect on training


def from_plain(values: Mapping[str, Any]) -> Config:
  """The configuration from the values that `plain` made, perhaps in an earlier version.

  Missing keys get their defaults. Keys in NO_LONGER are dropped. Raises ValueError as `Config.of`.
  """
  values = {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
  for group, key in NO_LONGER:
    values.get(group, {}).pop(key, None)
  config: Any = base.get_config()
  with config.unlocked(), config.ignore_type():
    config.model.fields, config.diffusion.fields = {}, {}  # the saved values alone decide which fields are set
    config.update(values)
  return Config.of(config)


class DamagedCheckpointError(ValueError):
  """A checkpoint exists but cannot be read."""


class _Manager(ocp.CheckpointManager):
  def reached_preemption(self, step):
    """Always False: only signals.py may ask the runtime, since its own counter and Orbax's steps would conflict."""
    return False


def _lost_process(error):
  """Whether an error comes from waiting for a process that died. Orbax turns such an error into a TimeoutError."""
  while error and not isinstance(error, jax.errors.JaxRuntimeError):
    error = error.__cause__ or error.__context__
  return error is not None


@dataclasses.dataclass
class _FirstOfEach(policy.PreservationPolicy):
  """Preserves the first checkpoint at or after each multiple of `every`. A step that is not finite delays its checkpoint."""

  every: int

  def should_preserve(self, checkpoints, *, context):
    multiples = [0, *(checkpoint.step // self.every for checkpoint in checkpoints)]
    return [before < here for before, here in itertools.pairwise(multiples)]


class Checkpoints:
  """The checkpoints of one run folder.

  It never deletes the checkpoints of the steps `ends`, and the first one at or after each multiple of `every` (0: no such
  ones). It also keeps the newest `keep` of all checkpoints.
  """

  def __init__(self, output: Any, keep: int = 3, every: int = 0, ends: Sequence[int] = ()):
    self._output = paths.absolute(output)
    self.folder = paths.join(self._output, "checkpoints")
    policies = [policy.LatestN(keep), policy.CustomSteps(ends), *([_FirstOfEach(every)] if every else [])]
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policy.AnyPreservationPolicy(policies), enable_async_checkpointing=True, create=True
    )
    # Without these handlers a process could not read the shapes of an item that was written on other devices.
    handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in ("params", "ema", "opt", "constants")}
    handlers["position"] = ocp.JsonCheckpointHandler()
    self._manager = _Manager(self.folder, options=options, item_handlers=handlers)

  def reload(self) -> None:
    """Reads the list of checkpoints again."""
    self._manager.reload()

  def latest(self) -> int | None:
    """Step of the newest complete checkpoint, or None."""
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    """Steps of all complete checkpoints, ascending."""
    return sorted(self._manager.all_steps())

  def pick(self, step: int | None = None) -> int:
    """Returns `step`, or the newest step for None. Raises ValueError if its checkpoint does not exist."""
    steps = self.steps()
    step = max(steps, default=None) if step is None else step
    if step not in steps:
      raise ValueError(f"{self._output} has no checkpoint of step {step}; there are {steps or 'none'}")
    return step

  def save(self, step: int, state: Mapping, constants: Any, position: Any) -> None:
    """Starts to write a checkpoint. Returns as soon as the arrays are copied from the device."""
    if self.latest() == step:
      return
    if jax.process_index() == 0 and self.is_marked(step):
      paths.remove(self._mark(step))  # an earlier checkpoint of this step had the mark
    items = {**state, **({"constants": constants} if constants else {})}
    arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    with self._writing():
      self._manager.save(step, args=ocp.args.Composite(position=ocp.args.JsonSave(position), **arrays))

  def position(self, step: int) -> dict[str, Any]:
    """The JSON item of a checkpoint: step, data position and fingerprints. Raises DamagedCheckpointError."""
    with self._reading(step):
      return self._manager.restore(step, args=ocp.args.Composite(position=ocp.args.JsonRestore()))["position"]

  def restore(self, step: int, state_shapes: Mapping, constants_shapes: Any) -> tuple[dict[str, Any], Any]:
    """Restores (state, constants) with the given shapes and shardings, on any mesh. Raises DamagedCheckpointError."""
    items = {**state_shapes, **({"constants": constants_shapes} if constants_shapes else {})}
    args = {name: ocp.args.StandardRestore(shapes) for name, shapes in items.items()}
    with self._reading(step):
      restored = self._manager.restore(step, args=ocp.args.Composite(**args))
      return {name: restored[name] for name in state_shapes}, restored.get("constants") or {}

  def _mark(self, step):
    return paths.join(self._output, "damaged", str(step))

  def mark(self, step: int) -> None:
    """Marks a checkpoint as damaged, for processes that do not see the damage themselves."""
    paths.write_text(self._mark(step), "")

  def is_marked(self, step: int) -> bool:
    """Whether a process has marked a checkpoint as damaged."""
    return paths.exists(self._mark(step))

  def set_aside(self, steps: Sequence[int]) -> str:
    """Moves checkpoints to `<output>/set-aside/<step>`, so that their steps can be saved again. Returns that folder."""
    folder = paths.join(self._output, "set-aside")
    if jax.process_index() == 0:
      for step in steps:
        place, number = paths.join(folder, str(step)), 1
        while paths.exists(place):
          place, number = paths.join(folder, f"{step}.{number}"), number + 1
        paths.move(paths.join(self.folder, str(step)), place)
        if self.is_marked(step):
          paths.remove(self._mark(step))
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("checkpoints set aside")
    self.reload()
    return folder

  def wait(self) -> None:
    """Waits until all checkpoints are on disk."""
    with self._writing():
      self._manager.wait_until_finished()

  def close(self) -> None:
    with self._writing():
      self._manager.close()

  @contextlib.contextmanager
  def _reading(self, step: int) -> Iterator[None]:
    """Turns the errors of orbax and tensorstore about missing or damaged files into DamagedCheckpointError."""
    try:
      with paths.errors(self.folder):
        yield
    except Exception as error:
      text = " ".join(str(error).split())
      refused = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
      if paths.is_remote(self.folder) and re.search(_PASSES, text):
        raise StartAgain(f"{self.folder}: checkpoint {step} could not be read; a restart may help: {text[-200:]}") from error
      if _lost_process(error) or refused or isinstance(error, MemoryError) or re.search(_NOT_ITS_FAULT, text):
        raise
      raise DamagedCheckpointError(f"checkpoint {paths.join(self.folder, str(step))} is damaged: {text[:200]}") from error

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Turns write errors, which orbax reports at its next call, into one line. Raises StartAgain if a restart may help."""
    try:
      with paths.errors(self.folder):
        yield
    except (OSError, RuntimeError, ValueError) as error:
      if _lost_process(error):
        raise jax.errors.JaxRuntimeError("a process died while a checkpoint was written") from error
      reason = re.sub(r"\W*\[os_error_code.*", "", " ".join(str(error).split()))
      reason = re.sub(r".*(?=\s.{200})\s", "... ", reason)  # the reason is at the end
      if may_pass(error) or (paths.is_remote(self.folder) and re.search(_PASSES, str(error))):
        raise StartAgain(f"a checkpoint could not be written to {self.folder}; a restart may help: {reason}") from error
      raise InputError(
        f"a checkpoint could not be written to {self.folder}: {reason}. Make room there or mend the cause; the same command "
        "then resumes from the newest complete checkpoint"
      ) from error


def is_run_folder(path: Any) -> bool:
  """Whether `path` is the folder of a training run of this project."""
  return paths.exists(paths.join(path, CONFIG)) and paths.exists(paths.join(path, "checkpoints"))


def read_config(folder: Any) -> Config:
  """The configuration of a run folder, read by `from_plain`. Raises ValueError if the folder has none."""
  path = paths.join(folder, CONFIG)
  try:
    return from_plain(json.loads(paths.read_text(path)))
  except FileNotFoundError:
    raise ValueError(f"{folder} is no run folder: it has no {CONFIG}; give the `output` folder of a training run") from None
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"{path} is damaged ({error}); restore it, or give another folder") from None


def stage_config(folder: Any, step: int | None = None) -> tuple[Config, int]:
  """(configuration of the stage that made a checkpoint, its step; default: the latest). Raises ValueError if it is missing."""
  stages = make_stages(read_config(folder))
  with contextlib.closing(Checkpoints(folder)) as checkpoints:
    step = checkpoints.pick(step)
    position = checkpoints.position(step)
    return from_plain(position["config"]) if "config" in position else stage_that_made(stages, step).config, step


def load_weights(
  folder: Any, item: str = "ema", step: int | None = None, mesh: jax.sharding.Mesh | None = None, rules: Sequence = ()
) -> tuple[dict[str, Any], Any, int]:
  """Loads the weights of a run folder: ({"denoiser": ..., ...}, constants, step).

  Args:
    folder: the run's `output`.
    item: "ema" (averages) or "params".
    step: of the checkpoint; None: the latest.
    mesh, rules: shard the weights by the rules of their model. Without a mesh they are on one device.

  Raises:
    ValueError: `folder` is no run folder, or has no such checkpoint.
  """
  if item not in ("ema", "params"):
    raise ValueError(f"weights {item!r} are unknown; allowed: 'ema', 'params'")
  read_config(folder)
  with contextlib.closing(Checkpoints(folder)) as checkpoints:
    step = checkpoints.pick(step)
    metadata = checkpoints._manager.item_metadata(step)

    def read(name):
      shapes = with_shardings(metadata[name].tree, mesh, rules)
      args = ocp.args.Composite(**{name: ocp.args.StandardRestore(shapes)})
      return checkpoints._manager.restore(step, args=args)[name]

    constants = read("constants") if metadata.get("constants") is not None else {}
    return read(item), constants, step
