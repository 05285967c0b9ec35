"""Orbax checkpoints of a run: parameters, average, optimizer and position as separate items, written asynchronously.

`<output>/config.json` is the whole configuration, `<output>/checkpoints/<step>/` a checkpoint: it is whole or not there (in
a bucket, orbax's `commit_success.txt` is written last, and what has none does not count).
Items apart let a reader take only the averaged parameters (jax-practice: one big item can't be restored in part).
"""

import contextlib
import json
import re

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from configs import base
from data import paths
from stdit_jax.cli import InputError
from stdit_jax.parallel.shardings import tree_shardings
from stdit_jax.training.stages import FREE, make_stages, stage_that_made
from stdit_jax.training.watchdog import StartAgain

CONFIG = "config.json"
# What tensorstore says when a checkpoint may well be whole, but cannot be had now.
_NOT_ITS_FAULT = "PERMISSION_DENIED|UNAUTHENTICATED|RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED"
# Of these, and of what `paths.errors` says of a bucket out of reach, a later attempt may find nothing.
_PASSES = "RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|INTERNAL|the bucket gives no answer"


def plain(config):
  """A ConfigDict as JSON-able values: tuples become lists."""
  return json.loads(json.dumps(config.to_dict() if hasattr(config, "to_dict") else config))


NO_LONGER = (("autoencoder", "temporal"),)  # keys of earlier versions, with which nothing was trained


def from_plain(values):
  """The configuration of what `plain` made, keys that it is too old to have at their defaults, without those that are gone."""
  values = {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
  for group, key in NO_LONGER:
    values.get(group, {}).pop(key, None)
  config = base.get_config()
  with config.unlocked(), config.ignore_type():
    config.update_from_flattened_dict({key: {} for key in FREE})  # a field that was not set there must not be set here
    config.update(values)
  return config


class DamagedCheckpointError(ValueError):
  """A checkpoint that is there, but cannot be read."""


class _Manager(ocp.CheckpointManager):
  def reached_preemption(self, step):
    """Orbax would ask while it saves, with the step of the checkpoint; the loop asks, and all have to count alike."""
    return False


def _lost_process(error):
  """Whether an error comes from waiting for all processes, of which one is gone; orbax makes a TimeoutError of it."""
  return any(isinstance(e, jax.errors.JaxRuntimeError) for e in (error, error.__cause__, error.__context__))


def reached_preemption(number):
  """Whether all processes of a run of several stop at this call: one was sent SIGTERM, or its machine will be taken away.

  The answer is the same on each process. Call it in every step, with a number that grows.
  """
  with contextlib.suppress(RuntimeError):  # the service is switched off
    return multihost_utils.reached_preemption_sync_point(number)
  return False


class Checkpoints:
  """The checkpoints of one run folder."""

  def __init__(self, output, keep=3):
    self._output = paths.absolute(output)
    self.folder = paths.join(self._output, "checkpoints")
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True, create=True)
    # Named handlers: without them a fresh process can't read what shapes an item has, only on the devices that wrote it.
    handlers = {name: ocp.StandardCheckpointHandler() for name in ("params", "ema", "opt", "constants")}
    handlers["position"] = ocp.JsonCheckpointHandler()
    self._manager = _Manager(self.folder, options=options, item_handlers=handlers)

  def reload(self):
    """Looks anew at what is there."""
    self._manager.reload()

  def latest(self):
    """Step of the newest checkpoint that was written to its end, or None."""
    return self._manager.latest_step()

  def steps(self):
    """Steps of all checkpoints that were written to their end, ascending."""
    return sorted(self._manager.all_steps())

  def pick(self, step=None):
    """`step`, or the newest one; ValueError when it is not there."""
    steps = self.steps()
    step = max(steps, default=None) if step is None else step
    if step not in steps:
      raise ValueError(f"{self._output} has no checkpoint of step {step}; there are {steps or 'none'}")
    return step

  def save(self, step, state, constants, position):
    """Starts writing; returns as soon as the arrays are copied off the device."""
    if self.latest() == step:
      return
    if jax.process_index() == 0 and self.is_marked(step):
      paths.remove(self._mark(step))  # of one that is no longer there
    items = {**state, **({"constants": constants} if constants else {})}
    arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    with self._writing():
      self._manager.save(step, args=ocp.args.Composite(position=ocp.args.JsonSave(position), **arrays))

  def position(self, step):
    """The JSON written with the checkpoint: step, data position and fingerprints. Raises DamagedCheckpointError."""
    with self._reading(step):
      return self._manager.restore(step, args=ocp.args.Composite(position=ocp.args.JsonRestore()))["position"]

  def restore(self, step, state_shapes, constants_shapes):
    """(state, constants) into the given shapes with shardings, on whatever mesh they name. Raises DamagedCheckpointError."""
    items = {**state_shapes, **({"constants": constants_shapes} if constants_shapes else {})}
    args = {name: ocp.args.StandardRestore(shapes) for name, shapes in items.items()}
    with self._reading(step):
      restored = self._manager.restore(step, args=ocp.args.Composite(**args))
      return {name: restored[name] for name in state_shapes}, restored.get("constants") or {}

  def _mark(self, step):
    return paths.join(self._output, "damaged", str(step))

  def mark(self, step):
    """Notes that a checkpoint can't be read, for processes that do not see it themselves."""
    paths.write_text(self._mark(step), "")

  def is_marked(self, step):
    return paths.exists(self._mark(step))

  def set_aside(self, steps):
    """Moves checkpoints out of the way of those that will be written, to `<output>/set-aside/<step>`; returns the folder."""
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

  def wait(self):
    """Returns when everything is on disk."""
    with self._writing():
      self._manager.wait_until_finished()

  def close(self):
    with self._writing():
      self._manager.close()

  @contextlib.contextmanager
  def _reading(self, step):
    """What orbax and tensorstore raise about files that are missing, cut or garbled, as DamagedCheckpointError."""
    try:
      with paths.errors(self.folder):
        yield
    except Exception as error:
      text = " ".join(str(error).split())
      refused = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
      if _lost_process(error) or refused or isinstance(error, MemoryError) or re.search(_NOT_ITS_FAULT, text):
        raise
      raise DamagedCheckpointError(f"checkpoint {paths.join(self.folder, str(step))} is damaged: {text[:200]}") from error

  @contextlib.contextmanager
  def _writing(self):
    """A full disk and its like, which orbax reports when it is next called, as one clear line. A bucket that gives no answer
    now is StartAgain."""
    try:
      with paths.errors(self.folder):
        yield
    except (OSError, RuntimeError, ValueError) as error:
      if _lost_process(error):
        raise RuntimeError("a process was lost while a checkpoint was written") from error
      reason = re.sub(r"\W*\[os_error_code.*", "", " ".join(str(error).split()))[-200:]  # it comes last
      if paths.is_remote(self.folder) and re.search(_PASSES, str(error)):
        raise StartAgain(f"a checkpoint could not be written to {self.folder}, which may pass: {reason}") from error
      raise InputError(
        f"a checkpoint could not be written to {self.folder}: {reason}. Make room there or "
        "mend it; the same command then goes on from the newest whole checkpoint"
      ) from error


def is_run_folder(path):
  """Whether `path` is the folder of a training run of ours."""
  return paths.exists(paths.join(path, CONFIG)) and paths.exists(paths.join(path, "checkpoints"))


def read_config(folder):
  """The configuration of a run folder, as `from_plain`; ValueError when there is none."""
  path = paths.join(folder, CONFIG)
  try:
    return from_plain(json.loads(paths.read_text(path)))
  except FileNotFoundError:
    raise ValueError(f"{folder} is no run folder: it has no {CONFIG}; give the `output` folder of a training run") from None
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"{path} is damaged: {error}") from None


def stage_config(folder, step=None):
  """(configuration of the stage that made a checkpoint, whose model it holds; its step), by default of the latest.

  Raises:
    ValueError: no run folder, no checkpoint, no such step.
  """
  stages = make_stages(read_config(folder))
  checkpoints = Checkpoints(folder)
  try:
    step = checkpoints.pick(step)
    position = checkpoints.position(step)
    config = from_plain(position["config"]) if "config" in position else stage_that_made(stages, step).config
    return config, step
  finally:
    checkpoints.close()


def load_weights(folder, item="ema", step=None, mesh=None, rules=()):
  """Weights of a run folder: ({"denoiser": ..., ...}, constants, step), laid over the mesh, without one on one device.

  Args:
    folder: the run's `output`.
    item: "ema" (averaged) or "params".
    step: a checkpoint's step, the latest by default.
    mesh, rules: where the weights go, by the sharding rules of their model.

  Raises:
    ValueError: no run folder, no checkpoint, no such step.
  """
  if item not in ("ema", "params"):
    raise ValueError(f"weights {item!r} are unknown; allowed: 'ema', 'params'")
  read_config(folder)
  checkpoints = Checkpoints(folder)
  try:
    step = checkpoints.pick(step)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    metadata = checkpoints._manager.item_metadata(step)

    def read(name):
      tree = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), metadata[name].tree)
      places = tree_shardings(tree, mesh, rules) if mesh else jax.tree.map(lambda _: device, tree)
      shapes = jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), tree, places)
      args = ocp.args.Composite(**{name: ocp.args.StandardRestore(shapes)})
      return checkpoints._manager.restore(step, args=args)[name]

    constants = read("constants") if metadata.get("constants") is not None else {}
    return read(item), constants, step
  finally:
    checkpoints.close()
