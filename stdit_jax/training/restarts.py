"""Starts a run at step 0 or at a checkpoint, and moves it back to a checkpoint after non-finite steps.

The newest complete checkpoint has parameters, average, optimizer, its step, and the micro steps of the plan that the run skips.
The step alone tells the stage, and the number of micro steps of the data so far.
"""

import contextlib
import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from data import paths
from data.shards import digest
from stdit_jax.errors import InputError
from stdit_jax.parallel.shardings import Tree, tree_shardings, with_shardings
from stdit_jax.training import claim, transition
from stdit_jax.training.checkpoints import CONFIG, DamagedCheckpointError, is_run_folder, load_weights, plain, stage_config
from stdit_jax.training.nonfinite import TooManyNonFinite
from stdit_jax.training.objectives import Objective, part_of
from stdit_jax.training.run import STARTS, Run, StageParts, say, warn
from stdit_jax.training.stages import Stage, changed_keys, identity
from stdit_jax.training.state import new_state
from stdit_jax.training.watchdog import StartAgain

MOST_STARTS = 10  # from one step
# (group, key) of settings in which hosts may differ.
PER_HOST = (("data", "workers"), ("data", "read_ahead"), ("", "compile_threads"), ("", "compilation_cache"))


class Restarts:
  """Starts, resumes, saves and moves back one run.

  Attributes:
    skip: {name of a stage: micro steps of its plan that the run skips}.
  """

  def __init__(self, run: Run):
    self.run, self.checkpoints = run, run.checkpoints
    self.skip, self._went_back_to = {}, None

  def start(self) -> tuple[Tree, Tree, int]:
    """(state, frozen, step) of the newest readable checkpoint, or of step 0.

    Raises:
      ValueError: the data differs from that of the checkpoint, no checkpoint is readable, or `config.resume` asks for a
        checkpoint that does not exist.
    """
    self.run.beat("starting", slow=True)
    # The first process may have waited until another run released the folder. `reload` finds the checkpoints of that run.
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("the folder is ours")
      check_alike(self.run)
    self.checkpoints.reload()
    found, wanted = self.checkpoints.steps(), self.run.config.resume
    if wanted.isdigit() and self._went_back(found, wanted):
      say(f"the run already went back to step {wanted} and resumes. To go back again, move the newer checkpoints away")
      wanted = "auto"
    if wanted == "required" and not found:
      raise ValueError(f"config: resume='required', but {self.run.config.output} has no checkpoint")
    if wanted.isdigit() and int(wanted) not in found:
      raise ValueError(f"config: resume={wanted!r}, but {self.run.config.output} has only checkpoints {found}")
    self._count_start(found[-1] if found else 0)
    for key in self.run.changed if found else ():
      say(f"config: {key} has changed since this run began")
    tried, then = ([int(wanted)], "") if wanted.isdigit() else (found[::-1], "; trying an older one")
    for step in tried:
      if self.checkpoints.is_marked(step):
        warn(f"a process could not read checkpoint {step}{then}")
        continue
      try:
        state, frozen = self._restore(step)
      except DamagedCheckpointError as error:
        warn(f"{error}{then}")
        continue
      if newer := [s for s in found if s > step]:
        folder = self.checkpoints.set_aside(newer)  # else the run could not save these steps again
        warn(f"newer checkpoints, of steps {', '.join(map(str, newer))}, were moved to {folder}")
      say(f"resumed from step {step} of {self.run.config.output}")
      return state, frozen, step
    if wanted.isdigit():
      raise ValueError(f"config: resume={wanted!r}, but this checkpoint cannot be read; give another step of {found}")
    if found:
      raise ValueError(f"no checkpoint in {self.checkpoints.folder} can be read; move them away to start anew")
    state, frozen = self._initial()
    if jax.process_index() == 0:
      paths.write_text(paths.join(self.run.config.output, CONFIG), json.dumps(plain(self.run.config), indent=1))
    return state, frozen, 0

  def _count_start(self, step):
    """Raises ValueError after MOST_STARTS starts in a row with the same newest checkpoint, that of `step`.

    A supervisor would else restart the run for ever, if a fault does not pass.
    """
    if jax.process_index() or step == self.run.total_steps:
      return
    path = paths.join(self.run.config.output, STARTS)
    before = json.loads(paths.read_text(path)) if paths.exists(path) else {}
    count = before["count"] + 1 if before.get("step") == step else 1
    if count > MOST_STARTS:
      paths.remove(path)
      raise ValueError(
        f"{self.run.config.output}: the run started {MOST_STARTS} times in a row from step {step} and made no new checkpoint. "
        "Look for the cause in the messages of these starts. The same command tries again"
      )
    paths.write_text(path, json.dumps({"step": step, "count": count}))

  def _went_back(self, steps, wanted):
    """Whether the run already went back to `wanted` and has newer checkpoints. A supervisor repeats the same command."""
    if not steps or wanted == str(steps[-1]):
      return False
    with contextlib.suppress(DamagedCheckpointError):
      return self.checkpoints.position(steps[-1]).get("config", {}).get("resume") == wanted
    return False

  def _initial(self):
    """(state, frozen) of step 0: the original initialisation, replaced by the files of the configuration."""
    parts, mesh, path = self.run.parts[0], self.run.mesh, self.run.config.init
    objective, programs, key = parts.objective, parts.programs, jax.random.key(self.run.config.seed)
    params, frozen = jax.jit(objective.init, out_shardings=tree_shardings(objective.shapes, mesh, objective.rules))(key)
    params, frozen = objective.read_initial(params, mesh), frozen | objective.read_frozen(mesh)
    if path:
      load = functools.partial(from_run, objective) if is_run_folder(path) else objective.load_checkpoint
      params, frozen = load(path, params, frozen, mesh)
    return jax.jit(lambda p: new_state(p, programs.optimizer), out_shardings=programs.state_shardings)(params), frozen

  def _restore(self, step):
    """(state, frozen) of a checkpoint. Sets `skip`. Raises ValueError as `start`, and DamagedCheckpointError.

    With several processes a damaged checkpoint raises StartAgain, since the others may not see the damage. The next start skips
    this step.
    """
    parts, made = self.run.parts_of(step), self.run.parts_that_made(step)
    try:
      position = self.checkpoints.position(step)
      own = plain(made.stage.config)
      if other := changed_keys(identity(position.get("config", own)), identity(own)):
        raise ValueError(
          f"config: by its step, checkpoint {step} belongs to stage {made.stage.name!r}, but another model made it: "
          f"{', '.join(other)} differ. Give the stages the steps that they had"
        )
      same = self._check_data(step, parts, position)
      constants = {n: tree for n, tree in made.objective.shapes[1].items() if n not in made.objective.from_files}
      places = (with_shardings(tree, self.run.mesh, made.objective.rules) for tree in (made.programs.shapes[0], constants))
      state, frozen = self.checkpoints.restore(step, *places)
    except DamagedCheckpointError as error:
      if jax.process_count() == 1:
        raise
      self.checkpoints.mark(step)
      raise StartAgain(str(error)) from error
    skip = position.get("skip", {})
    self.skip = {name: tuple(positions) for name, positions in skip.items() if same or name != parts.stage.name}
    return state, frozen | made.objective.read_frozen(self.run.mesh)

  def _check_data(self, step, parts, position):
    """Whether the stage continues the data of the checkpoint. If not, raises ValueError, unless `restart_data` is set."""
    restart = self.run.config.restart_data
    # The checkpoint is the end of the previous stage and does not name this stage, which was added or renamed since then. So
    # this stage begins with its own data.
    if step == parts.stage.start and position["stage"] != parts.stage.name:
      return True
    if not restart:
      check_place(step, parts.stage, position)  # first, since another name of the stage is also another order of the data
    same = parts.data.check_same(position["data"], restart)
    if not restart:
      parts.data.follow(position.get("sources", ()))
    return same

  def save(self, step: int, state: Tree, frozen: Tree) -> None:
    """Writes a checkpoint after `step` optimizer steps."""
    self.run.beat(f"step {step}: saving", slow=True)
    parts, made = self.run.parts_of(step), self.run.parts_that_made(step)
    stage = parts.stage
    taken = (step - stage.start) * stage.config.optimizer.accumulate
    position = {"step": step, "stage": stage.name, "data": parts.data.identity, "skip": self.skip}
    position["sources"] = parts.data.sources(taken, self.skip.get(stage.name, ()))
    position["config"] = plain(made.stage.config)  # a reader needs the model of this step; config.json may have another
    own = {name: tree for name, tree in frozen.items() if name not in made.objective.from_files}
    self.checkpoints.save(step, state, own, position)

  def go_back(self, failure: TooManyNonFinite) -> tuple[Tree, Tree, int]:
    """(state, frozen, step) of the last checkpoint. From there the run skips the failed micro steps.

    Raises InputError if the run already went back to this checkpoint.
    """
    self.run.beat("going back to the last checkpoint", slow=True)
    self.checkpoints.wait()
    target = self.checkpoints.latest() or 0
    first, last = failure.steps[0][0], failure.steps[-1][0]
    if self._went_back_to == target:
      raise InputError(
        f"steps {first} to {last}: loss or gradient was not finite, although the run had gone back to step {target} and "
        f"skipped the failed micro steps ({failure.report()}). Look at these files, or lower optimizer.learning_rate"
      )
    self._went_back_to = target
    name = self.run.parts_of(first - 1).stage.name
    self.skip[name] = tuple(sorted({*self.skip.get(name, ()), *failure.positions()}))
    positions = ", ".join(map(str, failure.positions()))
    warn(
      f"steps {first} to {last}: loss or gradient was not finite ({failure.report()}); going back to step {target} "
      f"and skipping micro steps {positions} of the plan of stage {name!r}"
    )
    if not self.checkpoints.steps():
      return *self._initial(), 0
    skip = self.skip  # `_restore` replaces it with that of the checkpoint
    try:
      state, frozen = self._restore(target)
    except DamagedCheckpointError as error:
      raise StartAgain(f"{error}; the next start tries an older one") from error
    self.skip = skip
    return state, frozen, target

  def enter(self, parts: StageParts, state: Tree, frozen: Tree, step: int) -> tuple[Tree, Tree]:
    """(state, frozen) for the stage at `step`.

    Changes the model if the stage has another model. At the start of a stage with keep_optimizer=False, resets the optimizer,
    and the average to a copy of the parameters. Each run of the original begins like that.
    """
    objective, optimizer = parts.objective, parts.programs.optimizer
    before, own = transition.by_name(state["params"], frozen), transition.by_name(*objective.shapes)
    if change := transition.describe(before, own, objective.resizable):
      say(f"stage {parts.stage.name!r} changes the model; {change}")
      key, had = jax.random.fold_in(jax.random.key(self.run.config.seed), parts.stage.index), frozen.keys()
      state, frozen = transition.change_model(objective, optimizer, self.run.mesh, key, state, frozen)
      if not had >= set(objective.from_files):
        frozen |= objective.read_frozen(self.run.mesh)
    if step == parts.stage.start and step > 0 and not parts.stage.keep_optimizer:
      shardings = tree_shardings(parts.programs.shapes[0]["opt"], self.run.mesh, objective.rules)
      state["opt"] = jax.jit(optimizer.init, out_shardings=shardings)(state["params"])
      state["ema"] = jax.tree.map(jnp.copy, state["params"])
    return state, frozen


def check_alike(run: Run) -> None:
  """Compares what the processes see. Every process must call it, after the first one has claimed the folder.

  Raises ValueError, the same on all processes, for a folder that they do not share, another configuration or other data.
  """
  config = plain(run.config)
  for group, key in PER_HOST:
    del (config[group] if group else config)[key]
  seen = claim.holder(run.config.output), config, [parts.data.identity for parts in run.parts]
  numbers = np.array([int(digest(value)[:8], 16) for value in seen], np.uint32)
  of_all = multihost_utils.process_allgather(numbers)  # [processes, 3]
  for values, what in zip(of_all.T, (
    f"does not see in output={run.config.output!r} what process 0 wrote. Give a folder that all hosts share, e.g. gs://BUCKET/NAME",
    "has another configuration than process 0. Start the same command with the same files on every host",
    "finds other data than process 0. Give every host the same data.tables",
  )):  # fmt: skip
    if others := np.flatnonzero(values != values[0]).tolist():
      raise ValueError(f"config: process {others[0]} {what}")


def from_run(objective: Objective, path: str, params: Tree, frozen: Tree, mesh: Mesh) -> tuple[Tree, Tree]:
  """(params, frozen) with the averaged weights of another run's folder. Raises ValueError for another model."""
  config, step = stage_config(path)
  if (part := part_of(config)) != (own := objective.part):
    raise ValueError(f"config: init={path!r} is a run that trains the {part}; this run trains the {own}; give another init")
  loaded, constants, _ = load_weights(path, step=step, mesh=mesh, rules=objective.rules)
  new_params = params | {name: loaded[name] for name in params if name in loaded}
  new_frozen = frozen | {name: constants[name] for name in frozen if name in constants}
  new = new_params, new_frozen
  ours, theirs = ({name: tuple(x.shape) for name, x in transition.by_name(*trees).items()} for trees in ((params, frozen), new))
  if wrong := sorted({name for name, _ in ours.items() ^ theirs.items()}):
    details = "; ".join(f"{n}: {theirs.get(n, 'missing')}, model has {ours.get(n, 'none')}" for n in wrong[:5])
    raise ValueError(f"{path} belongs to another model: {len(wrong)} parameters differ ({details})")
  return new


def check_place(step: int, stage: Stage, position: Mapping[str, Any]) -> None:
  """Raises ValueError if resuming would repeat or skip data."""
  if position["stage"] != stage.name:
    raise ValueError(
      f"config: by its step, checkpoint {step} belongs to stage {stage.name!r}, but stage {position['stage']!r} made it. Give "
      "the stages the names and steps that they had"
    )
  now, was = stage.config.optimizer.accumulate, position.get("config", {}).get("optimizer", {}).get("accumulate")
  if step > stage.start and was not in (None, now):
    raise ValueError(
      f"config: optimizer.accumulate is {now} and was {was} up to step {step}, in the midst of stage {stage.name!r}. The run "
      f"would skip or repeat samples. Set it to {was}, or end the stage at step {step} and begin another stage"
    )
