"""The training loop: stage after stage, resumable at every checkpoint, the same for every objective.

Order in which a run is put together, and resumed:
  1. configuration, stages, devices, mesh, model and table are checked; nothing has been compiled or written yet;
  2. the newest whole checkpoint gives parameters, average, optimizer, its step and the micro steps of the plan that are
     passed over; without one, step 0 and `init`;
  3. the step alone gives the stage, and the number of micro steps the data has advanced;
  4. the loader starts at that micro step of the plan, so that every row comes exactly as it would have.
"""

import contextlib
import json
import signal
import sys
import threading
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from data import paths
from stdit_jax.cli import InputError
from stdit_jax.parallel.mesh import make_mesh
from stdit_jax.parallel.shardings import tree_shardings
from stdit_jax.training import batches, claim, encoding, transition, weights
from stdit_jax.training.autoencoding import autoencoder_model, check_lengths
from stdit_jax.training.checkpoints import CONFIG, Checkpoints, DamagedCheckpointError, from_plain, plain
from stdit_jax.training.compilation import AheadOfTime
from stdit_jax.training.metrics import Averages, Metrics, Speed, batch_work, duration, speed_note, stage_note
from stdit_jax.training.nonfinite import MicroStep, NonFinite, TooManyNonFinite
from stdit_jax.training.objectives import OBJECTIVES
from stdit_jax.training.profiling import Profiler
from stdit_jax.training.stage_data import StageData
from stdit_jax.training.stages import changed_keys, identity, make_stages, naming, stage_of, stage_that_made, total_steps
from stdit_jax.training.state import learning_rate_scales, make_optimizer, new_state, state_shapes, with_shardings
from stdit_jax.training.step import Programs, TraceCounter
from stdit_jax.training.validation import Validation, describe
from stdit_jax.training.watchdog import StartAgain


class Preempted(Exception):  # noqa: N818 - nothing went wrong
  """The run was told to stop and has saved everything."""


def say(text, file=None):
  """Prints on the first process only."""
  if jax.process_index() == 0:
    print(text, file=file, flush=True)


def most(value):
  """The largest of a number over all processes; each has to ask."""
  return float(np.max(multihost_utils.process_allgather(np.asarray(value)))) if jax.process_count() > 1 else value


def check_platform(wanted):
  """Raises ValueError when the devices are not of the platform the config asks for."""
  try:
    found = jax.default_backend()
  except (RuntimeError, AssertionError) as error:  # JAX_PLATFORMS names one that is not there
    reason = str(error).splitlines()[0] if str(error) else f"JAX_PLATFORMS is {jax.config.jax_platforms!r}"
    raise ValueError(f"JAX finds no devices: {reason}") from None
  if wanted and found != wanted:
    raise ValueError(f"config: platform is {wanted!r}, but JAX finds only {found!r} devices ({jax.device_count()} of them)")


def check_output(folder, config):
  """Raises ValueError when the output folder is not ours to use: not writable, or of another run.

  Returns the keys of the configuration that changed since the run began.
  """
  path = paths.join(folder, CONFIG)
  try:
    if not paths.exists(path) and (others := _foreign(folder)):
      raise ValueError(
        f"config: output={folder!r} holds {', '.join(others[:3])} and no {CONFIG}: it is no run of ours; give another folder"
      )
    paths.check_writable(folder, "config: output")
    if not paths.exists(path):
      return []
    old = json.loads(paths.read_text(path))
  except OSError as error:
    raise ValueError(f"config: output={folder!r} can't be used: {error.strerror}; give another folder") from None
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"{path} is damaged ({error}); give another output folder") from None
  before, now = ({s.name: identity(plain(s.config)) for s in make_stages(c)} for c in (from_plain(old), config))
  for name in filter(before.get, now):
    for key in changed_keys(before[name], now[name]):
      raise ValueError(
        f"config: output={folder!r} belongs to another run: {key} differs in stage {name!r}; give another output folder, "
        "or the config of that run (a stage that has not begun may change under another name)"
      )
  return [key for key in changed_keys(old, plain(config)) if key not in ("resume", "restart_data", "compilation_cache")]


def _foreign(folder):
  """Names in a folder that no run of ours put there before its first checkpoint: a run may have been stopped early."""
  data = [name for name in paths.names(paths.join(folder, "data")) if not name.startswith(("table-", "plan-", "tmp"))]
  own = {"checkpoints", "compilation_cache", claim.NAME} | (set() if data else {"data"})
  temporary = (".config.tmp", ".running.tmp", ".writable")
  return [name for name in paths.names(folder) if name not in own and not name.startswith(temporary)]


def constants(frozen):
  """The part of `frozen` that belongs to the run's own model, and not to a file that is read anew: the null caption, ..."""
  return {name: tree for name, tree in frozen.items() if name not in weights.FROM_FILES}


class Run:
  """A run, put together and checked; `train` runs it to its end.

  Args:
    config: of the run.
    beat: called with what the loop does next, and whether that may take long (`watchdog.Watchdog.beat`).

  Attributes: config, stages, mesh; per stage objectives, optimizers, scales, data, shapes of state and frozen; skip: {name of
  a stage: micro steps of its plan that are passed over}.
  """

  def __init__(self, config, beat=lambda what, slow=False: None):
    self.config = config
    self.stages = make_stages(config)
    check_platform(config.platform)
    self.mesh = make_mesh(config.mesh, slices=config.slices)
    if config.init:
      weights.need_file(config.init, "init")
    self.objectives, self.optimizers, self.scales, self.state_shapes, self.frozen_shapes = zip(
      *(self._put_together(stage) for stage in self.stages)
    )
    self.changed = check_output(config.output, config)
    self.data = [StageData(s, config.output, self.mesh, o) for s, o in zip(self.stages, self.objectives)]
    self._check_split()
    self.validations = [
      Validation(s, config.output, self.mesh, o) if s.config.validation.every else None
      for s, o in zip(self.stages, self.objectives)
    ]
    self.counter = TraceCounter()
    self.checkpoints = Checkpoints(config.output, config.keep_checkpoints)
    self.encoder, self._encoder_source, self._encoder_names = None, None, set()
    self.skip, self._programs, self._went_back_to = {}, {}, None
    self.compiled = AheadOfTime(config.compile_threads, say)
    self._terminated, self._beat, self._asked = False, beat, 0
    self._speed, self._work = Speed(list(self.mesh.devices.flat)), {}
    self._profiler = Profiler(config.output, config.profile_steps)

  def _put_together(self, stage):
    """(objective, optimizer, scales, shapes of the state, shapes of what is frozen) of a stage. Raises ValueError."""
    with naming(stage):
      config = stage.config
      objective, optimizer = OBJECTIVES[config.task](config), make_optimizer(config.optimizer)
      self._check_weights(config, objective)
      params, frozen = objective.shapes
      tree_shardings((params, frozen), self.mesh)  # raises where a size does not divide
      scales = learning_rate_scales(params, config.train, config.optimizer.scales)
      if "discriminator" in params and not any(jax.tree.leaves(scales["discriminator"])):
        raise ValueError(
          f"config: train={config.train!r} leaves out the discriminator, which would judge as it was drawn; let it train, or "
          "set autoencoder.adversarial_weight to 0"
        )
      return objective, optimizer, scales, state_shapes(params, optimizer), frozen

  def _check_split(self):
    """What `split_tokens` names are buckets: those of one stage, where it is said once for all."""
    known = {f"{b.resolution}:{b.num_frames}" for data in self.data for b in data.config.parsed_buckets()}
    for stage in self.stages:
      named = stage.config.split_tokens
      if unknown := sorted(set(named.split(",")) - known - {"auto", "never", "always"}):
        raise ValueError(
          f"config: stage {stage.name!r}: split_tokens names {unknown[0]}, which no stage has; buckets are "
          f"{', '.join(sorted(known))}"
        )

  @staticmethod
  def _check_weights(config, objective):
    """Everything that has to be read is there, before anything compiles."""
    if config.task == "denoiser":
      autoencoder = autoencoder_model(config.autoencoder).config
      check_lengths(config, autoencoder)
      if (latent := autoencoder.latent_channels) != (taken := objective.model.config.in_channels):
        raise ValueError(
          f"config: the autoencoder's latents have {latent} channels, but the denoiser takes {taken} (in_channels)"
        )
      latents, text = encoding.needed_encoders(config)
      if latents:
        weights.need_file(config.autoencoder.weights, "autoencoder.weights")
      if text or (config.text_encoder.where == "step" and not config.text_encoder.train):
        weights.need_file(config.text_encoder.weights, "text_encoder.weights")
      return
    if config.autoencoder.weights:
      raise ValueError(
        "config: autoencoder.weights are of one that encodes for a denoiser; to train an autoencoder from a file set init"
      )
    if config.autoencoder.image_weights:
      if config.init:
        raise ValueError("config: init brings the image autoencoder inside, too; set either it or autoencoder.image_weights")
      weights.need_file(config.autoencoder.image_weights, "autoencoder.image_weights")
    for name in ("latent", "identity"):
      if objective.weights[name] and not (config.init or config.autoencoder.image_weights):
        raise ValueError(
          f"config: autoencoder.{name}_weight compares with latents of the image autoencoder inside, which would be random; "
          "give autoencoder.image_weights, or init"
        )
    if objective.weights["perceptual"]:
      weights.load_perceptual(config.autoencoder.perceptual)  # only to see it: a wrong file must not end the run days later

  # Start or resume.

  def start(self):
    """-> (state, frozen, step): from the newest checkpoint that can be read, or from the beginning.

    Raises:
      ValueError: data that is not that of the checkpoint, checkpoints of which none can be read, or none where
        `config.resume` asks for one.
    """
    self._beat("starting", slow=True)
    # The first process may have waited until another run gave the folder up: what that one saved meanwhile counts.
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("the folder is ours")
    self.checkpoints.reload()
    there, wanted = self.checkpoints.steps(), self.config.resume
    if wanted.isdigit() and self._went_back(there, wanted):
      say(
        f"the run went back to step {wanted} before, and goes on from there; to go back once more, move newer checkpoints away"
      )
      wanted = "auto"
    if wanted == "required" and not there:
      raise ValueError(f"config: resume='required', but {self.config.output} has no checkpoint")
    if wanted.isdigit() and int(wanted) not in there:
      raise ValueError(f"config: resume={wanted!r}, but {self.config.output} has only checkpoints {there}")
    for key in self.changed if there else ():
      say(f"config: {key} has changed since this run began")
    for step in reversed(there):
      if wanted.isdigit() and step != int(wanted):
        continue
      if self.checkpoints.is_marked(step):
        say(f"warning: a process could not read checkpoint {step}; trying an older one", sys.stderr)
        continue
      try:
        state, frozen = self._restore(step)
      except DamagedCheckpointError as error:
        say(f"warning: {error}; trying an older one", sys.stderr)
        continue
      if newer := [s for s in there if s > step]:
        folder = self.checkpoints.set_aside(newer)  # or their steps could not be saved again
        say(f"warning: newer checkpoints, of steps {', '.join(map(str, newer))}, were moved to {folder}", sys.stderr)
      say(f"resumed from step {step} of {self.config.output}")
      return state, frozen, step
    if there:
      raise ValueError(f"no checkpoint in {self.checkpoints.folder} can be read; move them away to start anew")
    state, frozen = self._initial()
    if jax.process_index() == 0:
      paths.write_text(paths.join(self.config.output, CONFIG), json.dumps(plain(self.config), indent=1))
    return state, frozen, 0

  def _went_back(self, steps, wanted):
    """Whether the newest checkpoint was made by a run that had gone back to `wanted`: a supervisor gives the same command."""
    with contextlib.suppress(DamagedCheckpointError):
      return bool(steps) and self.checkpoints.position(steps[-1]).get("config", {}).get("resume") == wanted != str(steps[-1])
    return False

  def _initial(self):
    """(state, frozen) of step 0."""
    key, config = jax.random.key(self.config.seed), self.stages[0].config
    state, frozen = (tree_shardings(shapes[0], self.mesh) for shapes in (self.state_shapes, self.frozen_shapes))
    params, constants = weights.initial_weights(self.objectives[0], config, key, (state["params"], frozen), self.mesh)
    return jax.jit(lambda p: new_state(p, self.optimizers[0]), out_shardings=state)(params), constants

  def _restore(self, step):
    """(state, frozen) of a checkpoint, and what it says of the data. Raises as `start`, or DamagedCheckpointError; of several
    processes, of which only some may see the damage while others wait for them, StartAgain: the next start passes over it."""
    try:
      position = self.checkpoints.position(step)
      stage, made = stage_of(self.stages, step), stage_that_made(self.stages, step)
      own = plain(made.config)
      if other := changed_keys(identity(position.get("config", own)), identity(own)):
        raise ValueError(
          f"config: step {step} was made with another model than that of stage {made.name!r}, to which it belongs now "
          f"({', '.join(other)}); give the stages the steps that they had"
        )
      # A stage that was put behind a run that had ended begins with data of its own.
      begins = step == stage.start and position["stage"] != stage.name
      same = begins or self.data[stage.index].check_same(position["data"], self.config.restart_data)
      if not begins and not self.config.restart_data:
        self._check_place(step, stage, position)
        self.data[stage.index].follow(position.get("sources", ()))
      shapes = self.state_shapes[made.index], constants(self.frozen_shapes[made.index])
      state, frozen = self.checkpoints.restore(step, *(with_shardings(tree, self.mesh) for tree in shapes))
    except DamagedCheckpointError as error:
      if jax.process_count() == 1:
        raise
      self.checkpoints.mark(step)
      raise StartAgain(str(error)) from error
    self.skip = {name: tuple(positions) for name, positions in position.get("skip", {}).items() if same or name != stage.name}
    return state, frozen | weights.read_frozen(self.objectives[made.index], made.config, self.mesh)

  @staticmethod
  def _check_place(step, stage, position):
    """Raises ValueError where the steps of a stage would not be followed by those that come next in its data."""
    if position["stage"] != stage.name:
      raise ValueError(
        f"config: step {step} was made in stage {position['stage']!r} and belongs to {stage.name!r} now; give the stages the "
        "names and steps that they had"
      )
    now, was = stage.config.optimizer.accumulate, position.get("config", {}).get("optimizer", {}).get("accumulate")
    if step > stage.start and was not in (None, now):
      raise ValueError(
        f"config: optimizer.accumulate is {now} and was {was} up to step {step}, in the midst of stage {stage.name!r}: samples "
        f"would be left out or come again; set it to {was}, or end the stage at step {step} and begin another"
      )

  def save(self, step, state, frozen):
    """Writes a checkpoint after `step` optimizer steps."""
    self._beat(f"step {step}: saving", slow=True)
    stage = stage_of(self.stages, step)
    data, taken = self.data[stage.index], (step - stage.start) * stage.config.optimizer.accumulate
    position = {"step": step, "stage": stage.name, "data": data.identity(), "skip": self.skip}
    position["sources"] = data.sources(taken, self.skip.get(stage.name, ()))
    position["config"] = plain(stage_that_made(self.stages, step).config)  # a reader needs the model, and config.json is older
    with self._speed.paused():
      self.checkpoints.save(step, state, constants(frozen), position)

  def _go_back(self, failure):
    """(state, frozen, step) of the last checkpoint, from which the micro steps that failed will be passed over.

    Raises:
      InputError: that did not help the last time.
    """
    self._beat("going back to the last checkpoint", slow=True)
    self.checkpoints.wait()
    target = self.checkpoints.latest() or 0
    first, last = failure.steps[0][0], failure.steps[-1][0]
    if self._went_back_to == target:
      raise InputError(
        f"steps {first} to {last}: loss or gradient was not finite, although the run had gone back to step {target} and "
        f"passed over what failed ({failure.report()}). Look at these files, or lower optimizer.learning_rate"
      )
    self._went_back_to = target
    stage = stage_of(self.stages, first - 1)
    self.skip[stage.name] = tuple(sorted({*self.skip.get(stage.name, ()), *failure.positions()}))
    positions = ", ".join(map(str, failure.positions()))
    say(
      f"warning: steps {first} to {last}: loss or gradient was not finite ({failure.report()}); going back to step {target} "
      f"and passing over micro steps {positions} of the plan of stage {stage.name!r}",
      sys.stderr,
    )
    if not self.checkpoints.steps():
      return *self._initial(), 0
    skip = self.skip
    try:
      state, frozen = self._restore(target)
    except DamagedCheckpointError as error:
      raise StartAgain(f"{error}; the next start tries an older one") from error
    self.skip = skip
    return state, frozen, target

  # Run.

  @contextlib.contextmanager
  def _noting_sigterm(self):
    """SIGTERM only sets a flag. Of several processes the runtime notes it, and makes them stop at the same step."""
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
      yield
      return

    def note(*_):
      self._terminated = True

    old = signal.signal(signal.SIGTERM, note)
    try:
      yield
    finally:
      signal.signal(signal.SIGTERM, old)

  def _must_stop(self):
    """Whether SIGTERM came, here or on another process; the answer is the same on all. Asked once per optimizer step."""
    self._asked += 1
    return self.checkpoints.reached_preemption(self._asked) if jax.process_count() > 1 else self._terminated

  def train(self, on_sample=None, started=None):
    """Runs all stages to the end.

    Args:
      on_sample: `(step, state, frozen)`, called every `sample_every` steps and at the end.
      started: what `start` returned; called here otherwise.

    Returns:
      the final state.

    Raises:
      Preempted: SIGTERM came; everything is saved.
      InputError: a disk that is full, too many files that can't be decoded, steps that are not finite time and again.
    """
    state, frozen, step = started or self.start()
    total = total_steps(self.stages)
    metrics = Metrics(self.config.output, step, total, active=jax.process_index() == 0)
    try:
      with self._noting_sigterm(), self._profiler:
        while step < total:
          stage, failure = stage_of(self.stages, step), None
          state, frozen = self._enter(stage, state, frozen, step)
          try:
            state, step = self._run_stage(stage, state, frozen, step, metrics, on_sample)
          except TooManyNonFinite as error:
            failure = error.with_traceback(None)  # whose frames hold the state
          if failure is not None:
            state = frozen = None
            state, frozen, step = self._go_back(failure)
            metrics.close()
            metrics = Metrics(self.config.output, step, total, active=jax.process_index() == 0)
      metrics.flush()
      self.save(step, state, frozen)
      self.checkpoints.wait()
      self.counter.check()
      if on_sample and self.config.sample_every:
        self._beat("sampling", slow=True)
        on_sample(step, state, frozen)
    finally:
      metrics.close()
      self.compiled.close()
      self.checkpoints.close()
    say(f"finished: {step} steps; checkpoints and metrics are in {self.config.output}")
    return state

  def _enter(self, stage, state, frozen, step):
    """(state, frozen) with which a stage goes on at `step`: of its own model, at its start with a fresh optimizer on demand."""
    optimizer = self.optimizers[stage.index]
    own = transition.by_name(self.state_shapes[stage.index]["params"], self.frozen_shapes[stage.index])
    if change := transition.describe(transition.by_name(state["params"], frozen), own):
      say(f"stage {stage.name!r} changes the model; {change}")
      key = jax.random.fold_in(jax.random.key(self.config.seed), stage.index)
      objective, before = self.objectives[stage.index], frozen
      state, frozen = transition.change_model(objective, optimizer, self.mesh, key, state, frozen)
      if not before.keys() >= frozen.keys() & set(weights.FROM_FILES):
        frozen |= weights.read_frozen(objective, stage.config, self.mesh)
    if step == stage.start and step > 0 and not stage.keep_optimizer:
      shardings = tree_shardings(self.state_shapes[stage.index]["opt"], self.mesh)
      state["opt"] = jax.jit(optimizer.init, out_shardings=shardings)(state["params"])
    return state, frozen

  def _programs_of(self, stage, frozen):
    """The programs of a stage; made once, also when the run goes back."""
    if stage.index not in self._programs:
      frozen_shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), frozen)
      self._programs[stage.index] = Programs(
        self.objectives[stage.index].loss, self.mesh, self.state_shapes[stage.index], frozen_shapes,
        self.optimizers[stage.index], self.scales[stage.index], stage, self.counter,
      )  # fmt: skip
    return self._programs[stage.index]

  def _run_stage(self, stage, state, frozen, step, metrics, on_sample):
    config, data = stage.config, self.data[stage.index]
    accumulate = config.optimizer.accumulate
    taken, skip = (step - stage.start) * accumulate, self.skip.get(stage.name, ())
    programs = self._programs_of(stage, frozen)
    say(f"stage {stage.name!r}: steps {step} to {stage.start + stage.steps} on {self.mesh.devices.size} device(s)")
    say(str(data.report))
    self._compile_ahead(stage, programs, data.buckets_ahead(taken, stage.steps * accumulate - taken, skip))
    if validation := self.validations[stage.index]:
      frozen_shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), frozen)
      validation.compile_ahead(self.compiled, self.counter, self.state_shapes[stage.index]["ema"], frozen_shapes)
    make_batch = self._batch_maker(stage, state)
    accumulator = programs.new_accumulator(state["params"])
    log, nonfinite, due, first = Averages(), NonFinite(config.max_nonfinite), False, step
    loader = data.loader(taken, skip)
    try:
      rows = iter(loader)
      began = time.monotonic()
      batch = self._next_batch(rows, make_batch, step)
      say(f"stage {stage.name!r}: the first batch is there after {duration(time.monotonic() - began)}")
      # Until here workers start and programs compile: no time of steps.
      self._speed.start_stage()
      metrics.start_stage(step)
      while step < stage.start + stage.steps:
        micro_steps = []
        self._profiler.before(step + 1)
        for micro in range(accumulate):
          loaded, arrays = batch
          program = self._gradient_program(stage, programs, loaded.bucket, loaded.batch_size)
          self._beat(f"step {step + 1}: {loaded.bucket[0]} x {loaded.bucket[1]}", slow=step == first)
          accumulator, values = program(state["params"], frozen, arrays, accumulator)
          self._speed.micro_step(self._work[stage.index, loaded.bucket])
          weight = values.pop("weight")
          log.add({**values, f"loss/{loaded.bucket[0]} x {loaded.bucket[1]}": values["loss"]}, weight)
          micro_steps.append(MicroStep(loaded.step, loaded.bucket, values["loss"], [s.path for s in loaded.samples]))
          last = micro == accumulate - 1 and step + 1 == stage.start + stage.steps
          # The device works on this micro step while the host prepares the next.
          batch = None if last else self._next_batch(rows, make_batch, step + 1)
        update = self._ready(f"{stage.name}: update")
        self._beat(f"step {step + 1}: update", slow=step == first)
        state, accumulator, values = update(state, accumulator, np.int32(step))
        step += 1
        self._speed.step()
        if note := self._profiler.after(step, values):
          say(note)
        log.add(values)
        nonfinite.after(step, values["nonfinite"], micro_steps)
        if step % config.log_every == 0 or step == stage.start + stage.steps:
          nonfinite.settle()
          values = log.take()  # waits for the device
          speed = self._speed.take()
          metrics.write(step, values | speed, speed_note(speed) + self._notes(loader, nonfinite))
        if validation and (step % config.validation.every == 0 or step == stage.start + stage.steps):
          self._validate(validation, step, state["ema"], frozen, make_batch, metrics)
        # Parameters with which nothing is finite are no place to go back to: the checkpoint waits for a good step.
        due = due or step % config.checkpoint_every == 0
        if due and not nonfinite.settle():
          metrics.flush()
          self.save(step, state, frozen)
          due = False
        if step < total_steps(self.stages):
          if self._must_stop():
            metrics.flush()
            self.save(step, state, frozen)
            self.checkpoints.wait()
            raise Preempted(f"stopped by SIGTERM after step {step}, which is saved; the same command goes on from there")
          if on_sample and config.sample_every and step % config.sample_every == 0:
            self._beat(f"step {step}: sampling", slow=True)
            with self._speed.paused():
              on_sample(step, state, frozen)
      nonfinite.settle()
    finally:
      loader.close()
    self.counter.check()
    steps, seconds, share = self._speed.stage_data()
    say(f"stage {stage.name!r}: {stage_note(steps, seconds, most(share), config.data)}")
    return state, step

  def _validate(self, validation, step, params, frozen, make_batch, metrics):
    self._beat(f"step {step}: validating", slow=True)
    began = time.monotonic()
    with self._speed.paused():
      values = validation(params, frozen, make_batch, self.compiled.get)
    metrics.record(step, {name: value for name, value in values.items() if np.isfinite(value)})
    say(f"validation of step {step}: {describe(values)} in {duration(time.monotonic() - began)}")

  @staticmethod
  def _notes(loader, nonfinite):
    """What the console line says beside the numbers."""
    bad = f"  {len(loader.bad_rows)} bad files" if loader.bad_rows else ""
    return bad + (f"  {nonfinite.count} steps left out, not finite" if nonfinite.count else "")

  def _next_batch(self, rows, make_batch, step):
    self._beat(f"step {step + 1}: waiting for data")
    try:
      with self._speed.waiting_for_data():
        loaded = next(rows)
    except (ValueError, RuntimeError) as error:  # too many files that can't be decoded, or a disk that fails
      raise InputError(str(error)) from error
    self._beat(f"step {step + 1}: making a batch of {loaded.bucket[0]} x {loaded.bucket[1]}", slow=True)  # may compile
    return loaded, make_batch(loaded)

  def _compile_ahead(self, stage, programs, buckets):
    """Lowers all programs that the stage needs for these buckets, the first ones first; they compile in the background."""
    name = f"{stage.name}: update"
    for i, bucket in enumerate(buckets):
      self._beat(f"lowering {bucket.name}", slow=True)
      self._lower_gradient(stage, programs, (bucket.resolution, bucket.num_frames), bucket.batch_size)
      if i == 0 and name not in self.compiled:
        self.compiled.add(name, programs.update, *programs.update_arguments())

  def _lower_gradient(self, stage, programs, bucket, rows):
    """-> name of the gradient program of a bucket, which is lowered unless it has been."""
    name = f"{stage.name}: gradient {bucket[0]} x {bucket[1]}"
    if name not in self.compiled:
      data, objective = self.data[stage.index], self.objectives[stage.index]
      layout = data.layouts[bucket]
      batch = batches.batch_shapes(stage.config, objective, bucket, rows, layout.token_parts)
      self._work[stage.index, bucket] = batch_work(stage.config, objective, batch)
      programs.make_gradient(bucket, tuple(batch), data.micro_batches[bucket], layout)
      self.compiled.add(name, programs.gradients[bucket], *programs.gradient_arguments(batch))
    return name

  def _gradient_program(self, stage, programs, bucket, rows):
    """The compiled gradient program of a bucket; one of a bucket that only a later epoch's plan has is lowered here."""
    return self._ready(self._lower_gradient(stage, programs, bucket, rows))

  def _ready(self, name):
    if not self.compiled.ready(name):
      self._beat(f"waiting for the program {name}", slow=True)
      with self._speed.paused():
        return self.compiled.get(name)
    return self.compiled.get(name)

  def _batch_maker(self, stage, state):
    config = stage.config
    latents, text = encoding.needed_encoders(config)
    if latents:
      source = autoencoder_model(config.autoencoder).config, config.autoencoder.weights
      if source != self._encoder_source:
        name = stage.name
        while name in self._encoder_names:  # the run went back over a change of the autoencoder: other programs
          name += " again"
        self._encoder_names.add(name)
        self.encoder, self._encoder_source = batches.load_encoder(config, self.counter, name), source
    layouts = self.data[stage.index].layouts
    return batches.batch_maker(config, self.objectives[stage.index], layouts, self.mesh, self.encoder, text)
