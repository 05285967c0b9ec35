"""The training loop: stage after stage, resumable at every checkpoint, the same for every objective.

Order in which a run is put together, and resumed:
  1. configuration, stages, devices, mesh, model and table are checked; nothing has been compiled or written yet;
  2. the newest whole checkpoint gives parameters, average, optimizer and its step; without one, step 0 and `init`;
  3. the step alone gives the stage, and the number of micro steps the data has advanced;
  4. the loader starts at that micro step of the plan, so that every row comes exactly as it would have.
"""

import json
import pathlib

import jax
import numpy as np

from stdit_jax.cli import InputError
from stdit_jax.parallel.mesh import make_mesh
from stdit_jax.parallel.shardings import tree_shardings
from stdit_jax.training import batches, weights
from stdit_jax.training.checkpoints import CONFIG, Checkpoints, plain, write_text
from stdit_jax.training.metrics import Averages, Metrics
from stdit_jax.training.objectives import OBJECTIVES, autoencoder_model
from stdit_jax.training.stage_data import StageData
from stdit_jax.training.stages import make_stages, stage_of, total_steps
from stdit_jax.training.state import (
  learning_rate,
  learning_rate_scales,
  make_optimizer,
  new_state,
  state_shapes,
  with_shardings,
)
from stdit_jax.training.step import Programs, TraceCounter


def say(text):
  """Prints on the first process only."""
  if jax.process_index() == 0:
    print(text, flush=True)


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
  folder = pathlib.Path(folder)
  path = folder / CONFIG
  try:
    if not path.exists() and (others := _foreign(folder)):
      raise ValueError(
        f"config: output={str(folder)!r} holds {', '.join(others[:3])} and no {CONFIG}: it is no run of ours; "
        "give another folder"
      )
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".writable"
    probe.write_text("")
    probe.unlink()
    if not path.exists():
      return []
    old = json.loads(path.read_text())
  except OSError as error:
    raise ValueError(f"config: output={str(folder)!r} can't be used: {error.strerror}; give another folder") from None
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f"{path} is damaged ({error}); give another output folder") from None
  changed = sorted(_changed(old, plain(config)))
  for key in changed:
    if key.split(".")[0] in ("model", "task", "seed") or key in ("text_encoder.name", "text_encoder.train", "autoencoder.name"):
      raise ValueError(
        f"config: output={str(folder)!r} belongs to another run: {key} differs; give another output folder, or the config "
        "of that run"
      )
  return changed


def _foreign(folder):
  """Names in a folder that no run of ours put there before its first checkpoint: a run may have been stopped early."""
  if not folder.exists():
    return []
  plans = [p for p in (folder / "data").glob("*") if not p.name.startswith(("table-", "plan-", "tmp"))]
  own = {"checkpoints", ".writable"} | (set() if plans else {"data"})
  return sorted(p.name for p in folder.iterdir() if p.name not in own and not p.name.startswith(f"{CONFIG}.tmp"))


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

  Attributes: config, stages, mesh; objectives, optimizers and data per stage; shapes of state and frozen.
  """

  def __init__(self, config):
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
    """-> (state, frozen, step): from the newest checkpoint, or from the beginning."""
    step = self.checkpoints.latest()
    if step is None:
      key = jax.random.key(self.config.seed)
      params, frozen = weights.initial_weights(
        self.objectives[0], self.config, key, (self.shardings[0]["params"], self.shardings[1]), self.mesh
      )
      state = jax.jit(lambda p: new_state(p, self.optimizers[0]), out_shardings=self.shardings[0])(params)
      write_text(pathlib.Path(self.config.output) / CONFIG, json.dumps(plain(self.config), indent=1))
      return state, frozen, 0
    position = self.checkpoints.position(step)
    stage = stage_of(self.stages, step)
    self.data[stage.index].check_same(position["data"], self.config.restart_data)
    for key in self.changed:
      say(f"config: {key} has changed since this run began")
    state, frozen = self.checkpoints.restore(
      step, with_shardings(self.state_shapes, self.mesh), with_shardings(constants(self.frozen_shapes), self.mesh)
    )
    if "text_encoder" in self.frozen_shapes:
      frozen["text_encoder"] = weights.load_text_encoder(self.config, self.objectives[0].text, self.mesh)
    say(f"resumed from step {step} of {self.config.output}")
    return state, frozen, step

  def save(self, step, state, frozen):
    """Writes a checkpoint after `step` optimizer steps."""
    stage = stage_of(self.stages, step)
    position = {"step": step, "stage": stage.name, "data": self.data[stage.index].identity()}
    self.checkpoints.save(step, state, constants(frozen), position)

  # Run.

  def train(self, on_sample=None, started=None):
    """Runs all stages to the end.

    Args:
      on_sample: `(step, state, frozen)`, called every `sample_every` steps and at the end.
      started: what `start` returned; called here otherwise.

    Returns:
      the final state.
    """
    state, frozen, step = started or self.start()
    total = total_steps(self.stages)
    metrics = Metrics(self.config.output, step, total, active=jax.process_index() == 0)
    try:
      for stage in self.stages:
        if step < stage.start + stage.steps:
          if step == stage.start and step > 0 and not stage.keep_optimizer:
            optimizer = self.optimizers[stage.index]
            state["opt"] = jax.jit(optimizer.init, out_shardings=self.shardings[0]["opt"])(state["params"])
          state, step = self._run_stage(stage, state, frozen, step, metrics, on_sample)
      self.save(step, state, frozen)
      self.checkpoints.wait()
      self.counter.check()
      if on_sample and self.config.sample_every:
        on_sample(step, state, frozen)
    finally:
      metrics.close()
      self.checkpoints.close()
    say(f"finished: {step} steps; checkpoints and metrics are in {self.config.output}")
    return state

  def _run_stage(self, stage, state, frozen, step, metrics, on_sample):
    config, data, objective = stage.config, self.data[stage.index], self.objectives[stage.index]
    frozen_shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), frozen)
    programs = Programs(
      objective.loss, self.mesh, self.state_shapes, frozen_shapes, self.optimizers[stage.index],
      self.scales[stage.index], learning_rate(config.optimizer, stage.start, stage.steps), config, self.counter, stage.name,
    )  # fmt: skip
    make_batch = self._batch_maker(stage, state)
    accumulate = config.optimizer.accumulate
    accumulator = programs.new_accumulator(state["params"])
    say(f"stage {stage.name!r}: steps {step} to {stage.start + stage.steps} on {self.mesh.devices.size} device(s)")
    say(str(data.report))
    log = Averages()
    loader = data.loader((step - stage.start) * accumulate)
    try:
      rows = iter(loader)
      batch = self._next_batch(rows, make_batch)
      while step < stage.start + stage.steps:
        for micro in range(accumulate):
          loaded, arrays = batch
          program = self._gradient_program(programs, loaded.bucket, arrays, data)
          accumulator, values = program(state["params"], frozen, arrays, accumulator)
          weight = values.pop("weight")
          for name, value in values.items():
            log.add(name, value, weight)
          log.add(f"loss/{loaded.bucket[0]} x {loaded.bucket[1]}", values["loss"], weight)
          last = micro == accumulate - 1 and step + 1 == stage.start + stage.steps
          # The device works on this micro step while the host prepares the next.
          batch = None if last else self._next_batch(rows, make_batch)
        state, accumulator, values = programs.update(state, accumulator, np.int32(step))
        step += 1
        for name, value in values.items():
          log.add(name, value)
        if step % config.log_every == 0 or step == stage.start + stage.steps:
          metrics.write(step, log.take(), f"  {len(loader.bad_rows)} bad files" if loader.bad_rows else "")
        if step % config.checkpoint_every == 0:
          self.save(step, state, frozen)
        if on_sample and config.sample_every and step % config.sample_every == 0 and step < total_steps(self.stages):
          on_sample(step, state, frozen)
    finally:
      loader.close()
    self.counter.check()
    return state, step

  def _next_batch(self, rows, make_batch):
    try:
      loaded = next(rows)
    except ValueError as error:  # too many files that can't be decoded
      raise InputError(str(error)) from error
    return loaded, make_batch(loaded)

  def _gradient_program(self, programs, bucket, arrays, data):
    """The gradient program of a bucket; says so when it is about to compile."""
    if bucket not in programs.gradients:
      say(f"compiling the gradient program of {bucket[0]} x {bucket[1]} frames ...")
      programs.make_gradient(bucket, tuple(arrays), data.micro_batches[bucket], data.layouts[bucket])
    return programs.gradients[bucket]

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
