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

import jax
import numpy as np
from jax.experimental import multihost_utils

from data import paths
from stdit_jax.cli import InputError
from stdit_jax.parallel.mesh import make_mesh
from stdit_jax.parallel.shardings import tree_shardings
from stdit_jax.training import batches, weights
from stdit_jax.training.checkpoints import CONFIG, Checkpoints, DamagedCheckpointError, plain
from stdit_jax.training.compilation import AheadOfTime
from stdit_jax.training.metrics import Averages, Metrics, Speed, batch_work, speed_note
from stdit_jax.training.nonfinite import MicroStep, NonFinite, TooManyNonFinite
from stdit_jax.training.objectives import OBJECTIVES, autoencoder_model
from stdit_jax.training.profiling import Profiler
from stdit_jax.training.stage_data import StageData
from stdit_jax.training.stages import make_stages, stage_of, total_steps
from stdit_jax.training.state import (
  learning_rate_scales,
  make_optimizer,
  new_state,
  state_shapes,
  with_shardings,
)
from stdit_jax.training.step import Programs, TraceCounter


class Preempted(Exception):  # noqa: N818 - nothing went wrong
  """The run was told to stop and has saved everything."""


def say(text, file=None):
  """Prints on the first process only."""
  if jax.process_index() == 0:
    print(text, file=file, flush=True)


def everywhere(condition):
  """Whether `condition` holds on all processes; each has to ask."""
  return bool(np.all(multihost_utils.process_allgather(np.asarray(condition)))) if jax.process_count() > 1 else condition


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
  changed = sorted(key for key in _changed(old, plain(config)) if key not in ("resume", "restart_data", "compilation_cache"))
  for key in changed:
    if key.split(".")[0] in ("model", "task", "seed") or key in ("text_encoder.name", "text_encoder.train", "autoencoder.name"):
      raise ValueError(
        f"config: output={folder!r} belongs to another run: {key} differs; give another output folder, or the config "
        "of that run"
      )
  return changed


def _foreign(folder):
  """Names in a folder that no run of ours put there before its first checkpoint: a run may have been stopped early."""
  data = [name for name in paths.names(paths.join(folder, "data")) if not name.startswith(("table-", "plan-", "tmp"))]
  own = {"checkpoints", "compilation_cache"} | (set() if data else {"data"})
  return [name for name in paths.names(folder) if name not in own and not name.startswith((".config.tmp", ".writable"))]


def _changed(old, new, prefix=""):
  for key in old.keys() | new.keys():
    a, b = old.get(key), new.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      yield from _changed(a, b, f"{prefix}{key}.")
    elif a != b:
      yield f"{prefix}{key}"


def constants(frozen):
  """The part of `frozen` that belongs to the run's own model, and not to a file that is read anew: the null caption, ..."""
  return {name: tree for name, tree in frozen.items() if name != "text_encoder"}


class Run:
  """A run, put together and checked; `train` runs it to its end.

  Args:
    config: of the run.
    beat: called with what the loop does next, and whether that may take long (`watchdog.Watchdog.beat`).

  Attributes: config, stages, mesh; objectives, optimizers and data per stage; shapes of state and frozen; skip: {name of a
  stage: micro steps of its plan that are passed over}.
  """

  def __init__(self, config, beat=lambda what, slow=False: None):
    self.config = config
    self.stages = make_stages(config)
    check_platform(config.platform)
    self.mesh = make_mesh(config.mesh, slices=config.slices)
    self.objectives = [OBJECTIVES[config.task](stage.config) for stage in self.stages]
    self.optimizers = [make_optimizer(stage.config.optimizer) for stage in self.stages]  # their states are alike
    params, self.frozen_shapes = jax.eval_shape(self.objectives[0].init, jax.random.key(0))
    self.state_shapes = state_shapes(params, self.optimizers[0])
    self.shardings = tree_shardings(self.state_shapes, self.mesh), tree_shardings(self.frozen_shapes, self.mesh)
    self.scales = [learning_rate_scales(params, s.config.train, s.config.optimizer.scales) for s in self.stages]
    self._check_weights()
    self.changed = check_output(config.output, config)
    self.data = [StageData(s, config.output, self.mesh, o) for s, o in zip(self.stages, self.objectives)]
    self.counter = TraceCounter()
    self.checkpoints = Checkpoints(config.output, config.keep_checkpoints)
    self.encoder = None
    self.skip, self._programs, self._went_back_to = {}, {}, None
    self.compiled = AheadOfTime(config.compile_threads, say)
    self._terminated, self._beat, self._asked = False, beat, 0
    self._speed, self._work = Speed(list(self.mesh.devices.flat)), {}
    self._profiler = Profiler(config.output, config.profile_steps)

  def _check_weights(self):
    """Everything that has to be read is there, before anything compiles."""
    config = self.config
    if config.init:
      weights.need_file(config.init, "init")
    if config.task == "denoiser":
      latent = autoencoder_model(config.autoencoder).config.latent_channels
      if latent != (taken := self.objectives[0].model.config.in_channels):
        raise ValueError(
          f"config: the autoencoder's latents have {latent} channels, but the denoiser takes {taken} (in_channels)"
        )
      if config.autoencoder.temporal:
        raise ValueError("config: autoencoder.temporal can be planned, but not trained with yet: it does not encode")
      weights.need_file(config.autoencoder.weights, "autoencoder.weights")
      where = config.text_encoder.where
      if where == "ahead" or (where == "step" and not config.text_encoder.train):
        weights.need_file(config.text_encoder.weights, "text_encoder.weights")

  # Start or resume.

  def start(self):
    """-> (state, frozen, step): from the newest checkpoint that can be read, or from the beginning.

    Raises:
      ValueError: data that is not that of the checkpoint, checkpoints of which none can be read, or none where
        `config.resume` asks for one.
    """
    self._beat("starting", slow=True)
    there, wanted = self.checkpoints.steps(), self.config.resume
    if wanted == "required" and not there:
      raise ValueError(f"config: resume='required', but {self.config.output} has no checkpoint")
    if wanted.isdigit() and int(wanted) not in there:
      raise ValueError(f"config: resume={wanted!r}, but {self.config.output} has only checkpoints {there}")
    for key in self.changed if there else ():
      say(f"config: {key} has changed since this run began")
    for step in reversed(there):
      if wanted.isdigit() and step != int(wanted):
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

  def _initial(self):
    """(state, frozen) of step 0."""
    key = jax.random.key(self.config.seed)
    params, frozen = weights.initial_weights(
      self.objectives[0], self.config, key, (self.shardings[0]["params"], self.shardings[1]), self.mesh
    )
    return jax.jit(lambda p: new_state(p, self.optimizers[0]), out_shardings=self.shardings[0])(params), frozen

  def _restore(self, step):
    """(state, frozen) of a checkpoint, and what it says of the data. Raises as `start`, or DamagedCheckpointError, on all
    processes alike."""
    damage = None
    try:
      position = self.checkpoints.position(step)
      stage = stage_of(self.stages, step)
      same = self.data[stage.index].check_same(position["data"], self.config.restart_data)
      state, frozen = self.checkpoints.restore(
        step, with_shardings(self.state_shapes, self.mesh), with_shardings(constants(self.frozen_shapes), self.mesh)
      )
    except DamagedCheckpointError as error:
      damage = error
    if not everywhere(damage is None):
      raise damage or DamagedCheckpointError(f"checkpoint {step} can't be read by another process")
    self.skip = {name: tuple(positions) for name, positions in position.get("skip", {}).items() if same or name != stage.name}
    if "text_encoder" in self.frozen_shapes:
      frozen["text_encoder"] = weights.load_text_encoder(self.config, self.objectives[0].text, self.mesh)
    return state, frozen

  def save(self, step, state, frozen):
    """Writes a checkpoint after `step` optimizer steps."""
    self._beat(f"step {step}: saving", slow=True)
    stage = stage_of(self.stages, step)
    position = {"step": step, "stage": stage.name, "data": self.data[stage.index].identity(), "skip": self.skip}
    with self._speed.paused():
      self.checkpoints.save(step, state, constants(frozen), position)

  def _go_back(self, failure):
    """(state, step) of the last checkpoint, from which the micro steps that failed will be passed over.

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
      return self._initial()[0], 0
    skip = self.skip
    state, _ = self._restore(target)
    self.skip = skip
    return state, target

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
          if step == stage.start and step > 0 and not stage.keep_optimizer:
            optimizer = self.optimizers[stage.index]
            state["opt"] = jax.jit(optimizer.init, out_shardings=self.shardings[0]["opt"])(state["params"])
          try:
            state, step = self._run_stage(stage, state, frozen, step, metrics, on_sample)
          except TooManyNonFinite as error:
            failure = error.with_traceback(None)  # whose frames hold the state
          if failure is not None:
            state = None
            state, step = self._go_back(failure)
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

  def _programs_of(self, stage, frozen):
    """The programs of a stage; made once, also when the run goes back."""
    if stage.index not in self._programs:
      frozen_shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), frozen)
      self._programs[stage.index] = Programs(
        self.objectives[stage.index].loss, self.mesh, self.state_shapes, frozen_shapes, self.optimizers[stage.index],
        self.scales[stage.index], stage, self.counter,
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
    make_batch = self._batch_maker(stage, state)
    accumulator = programs.new_accumulator(state["params"])
    log, nonfinite, due, first = Averages(), NonFinite(config.max_nonfinite), False, step
    loader = data.loader(taken, skip)
    try:
      rows = iter(loader)
      batch = self._next_batch(rows, make_batch, step)
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
    return state, step

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
    config, layouts = stage.config, self.data[stage.index].layouts
    if config.task == "autoencoder":
      return batches.AutoencoderBatches(config, layouts)
    if self.encoder is None:
      model = autoencoder_model(config.autoencoder)
      variables = weights.load_autoencoder(config, model)
      self.encoder = batches.ClipEncoder(model, variables, config.autoencoder, self.counter)
    objective, embed = self.objectives[stage.index], None
    if config.text_encoder.where == "ahead":
      embed = batches.text_ahead(objective.text, weights.load_text_encoder(config, objective.text, self.mesh))
    return batches.DenoiserBatches(config, objective.model.config, self.encoder, layouts, embed)
