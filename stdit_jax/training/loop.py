"""The training loop, the same for every objective: stages of steps, resumable at every checkpoint."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from data.loader import Loader
from data.shards import duration
from stdit_jax.parallel.shardings import Tree
from stdit_jax.training.batches import NextBatch
from stdit_jax.training.metrics import Averages, Metrics, Speed, speed_note, stage_note
from stdit_jax.training.nonfinite import MicroStep, NonFinite, TooManyNonFinite
from stdit_jax.training.restarts import Restarts
from stdit_jax.training.run import Run, say
from stdit_jax.training.signals import Preempted, Preemption, Profiler
from stdit_jax.training.stage_programs import StagePrograms
from stdit_jax.training.validation import Validation


def train(run: Run, on_sample: Callable | None = None, restarts: Restarts | None = None, started: tuple | None = None) -> Tree:
  """Runs all stages to the end. Returns the final state.

  Args:
    on_sample: `(step, state, frozen)`, called every `sample_every` steps and at the end.
    restarts, started: a `Restarts` of the run, and the result of its `start`. Without them, `train` makes its own.

  Raises:
    Preempted: the process received SIGTERM, and everything is saved.
    InputError: the disk is full, too many files can't be decoded, or steps fail again after `Restarts.go_back`.
  """
  beat, total, keep_every = run.beat, run.total_steps, run.config.keep_every
  restarts = restarts or Restarts(run)
  state, frozen, step = started or restarts.start()
  metrics = Metrics(run.config.output, step, total, active=jax.process_index() == 0)
  speed, profiler = Speed(list(run.mesh.devices.flat)), Profiler(run.config.output, run.config.profile_steps)
  compiled = [StagePrograms(p.programs, p.data.splits, run.compiler, beat, speed.paused) for p in run.parts]

  def next_batch():
    beat(f"step {step + 1}: waiting for data", waits=True)
    with speed.waiting_for_data():
      loaded, arrays = next(batches)
    beat(f"step {step + 1}: placing a batch of {loaded.bucket[0]} x {loaded.bucket[1]}", slow=True, waits=True)  # for programs
    return loaded, make_batch.place(arrays, loaded, layout_of(loaded))

  def layout_of(loaded):
    return parts.data.splits[loaded.bucket].layout

  def compile_next_stage():
    for following in run.parts[stage.index + 1 : stage.index + 2]:
      with speed.paused():
        steps = following.stage.steps * following.stage.config.optimizer.accumulate
        compiled[following.stage.index].prepare(following.data.buckets_ahead(0, steps))
      if run.encoders.holds(following.stage.config.autoencoder):
        make_batch.prepare(following.data.sizes_ahead(0), ())

  def save():
    metrics.flush()
    with speed.paused():
      restarts.save(step, state, frozen)

  def sample():
    if not on_sample:
      return
    beat(f"step {step}: sampling", slow=True)
    with speed.paused():
      on_sample(step, state, frozen)

  try:
    with Preemption() as preemption, profiler:
      while step < total:
        parts = run.parts_of(step)
        stage, config, validation, programs = parts.stage, parts.stage.config, parts.validation, compiled[parts.stage.index]
        accumulate, end, entered = config.optimizer.accumulate, stage.start + stage.steps, step
        last_part = max(step + 1, end - stage.steps // 10)  # its first step
        state, frozen = restarts.enter(parts, state, frozen, step)
        say(f"stage {stage.name!r}: steps {step} to {end} on {run.mesh.devices.size} device(s)")
        say(str(parts.data.report))
        taken, skip = (step - stage.start) * accumulate, restarts.skip.get(stage.name, ())
        buckets = parts.data.buckets_ahead(taken, stage.steps * accumulate - taken, skip)
        make_batch = parts.objective.batch_maker(run.encoders, stage.name)
        sizes = [*parts.data.sizes_ahead(taken, skip), *(validation.data.sizes_ahead(0) if validation else ())]
        make_batch.prepare(sizes, ())
        for bucket in buckets:  # all programs of the first step come first
          make_batch.prepare((), parts.data.text_ahead([bucket]))
          programs.prepare([bucket])
        if validation:
          validation.compile_ahead(run.compiler, parts.programs.shapes[0]["ema"], parts.programs.shapes[1])
        accumulator = parts.programs.new_accumulator(state["params"])
        averages, nonfinite, save_due, failure = Averages(), NonFinite(config.max_nonfinite), False, None
        make_rows = lambda loaded: make_batch.arrays(loaded, layout_of(loaded))  # noqa: B023, E731 - of this stage
        count = (end - step) * accumulate
        try:
          with parts.data.loader(taken, skip) as loader, NextBatch(loader, count, make_rows) as batches:
            say(f"stage {stage.name!r}: {loader.ahead}")
            began = time.monotonic()
            batch: Any = next_batch()
            say(f"stage {stage.name!r}: the first batch is ready after {duration(time.monotonic() - began)}")
            # The time of steps does not include the start of the workers.
            speed.start_stage()
            metrics.start_stage(step)
            while step < end:
              micro_steps = []
              profiler.before(step + 1)
              for micro in range(accumulate):
                loaded, arrays = batch
                name = f"{loaded.bucket[0]} x {loaded.bucket[1]}"
                program, gradient = programs.gradient(loaded.bucket, loaded.batch_size)
                beat(f"step {step + 1}: {name}", slow=step == entered)
                accumulator, values = gradient(state["params"], frozen, arrays, accumulator)
                speed.micro_step(program.work)
                weight = values.pop("weight")
                averages.add({**values, f"loss/{name}": values["loss"]}, weight)
                micro_steps.append(MicroStep(loaded.step, loaded.bucket, values["loss"], [s.path for s in loaded.samples]))
                # The device works on this micro step while the host prepares the next one.
                last = micro == accumulate - 1 and step + 1 == end
                batch = None if last else next_batch()
              update = programs.update()
              beat(f"step {step + 1}: update", slow=step == entered)
              state, accumulator, values = update(state, accumulator, np.int32(step))
              step += 1
              speed.step()
              if step == last_part:
                compile_next_stage()
              if note := profiler.after(step, values):
                say(note)
              averages.add(values)
              nonfinite.after(step, values["nonfinite"], micro_steps)

              if step % config.log_every == 0 or step == end:
                nonfinite.settle()
                values, rates = averages.take(), speed.take()  # waits for the device
                metrics.write(step, values | rates, speed_note(rates) + notes(loader, nonfinite))
              if validation and (step % config.validation.every == 0 or step == end):
                beat(f"step {step}: validating", slow=True, waits=True)
                with speed.paused():
                  validate(validation, step, state["ema"], frozen, make_batch, metrics)
              # The checkpoint waits for a finite step, so that the run never goes back to broken parameters.
              save_due = save_due or step % config.checkpoint_every == 0 or (keep_every > 0 and step % keep_every == 0)
              if save_due and not nonfinite.settle():
                save()
                save_due = False
              if step < total and preemption.requested():
                save()
                run.checkpoints.wait()
                raise Preempted(f"stopped by SIGTERM after step {step}, which is saved; the same command resumes")
              if step < total and config.sample_every and step % config.sample_every == 0:
                sample()
            nonfinite.settle()
        except TooManyNonFinite as error:
          failure = error.with_traceback(None)  # the traceback's stack frames hold the state
        if failure is not None:
          del state, frozen, accumulator, batch
          state, frozen, step = restarts.go_back(failure)
          metrics.close()
          metrics = Metrics(run.config.output, step, total, active=jax.process_index() == 0)
          continue
        steps, seconds, share = speed.stage_data()
        say(f"stage {stage.name!r}: {stage_note(steps, seconds, largest(share), loader.ahead)}")
        save()
        run.counter.check()
    run.checkpoints.wait()
    run.counter.check()
    if run.config.sample_every:
      sample()
  finally:
    run.compiler.close()  # first, since the others raise an error if the disk is full
    with contextlib.closing(run.checkpoints):
      metrics.close()
  say(f"finished: {step} steps; checkpoints and metrics are in {run.config.output}")
  return state


def validate(validation: Validation, step: int, params: Tree, frozen: Tree, make_batch: Callable, metrics: Metrics) -> None:
  """Measures, records and prints the loss of these weights on fixed samples."""
  began = time.monotonic()
  values = validation(params, frozen, make_batch)
  metrics.record(step, {name: value for name, value in values.items() if np.isfinite(value)})
  text = ", ".join(f"{name.removeprefix('validation/')}: {value:.4g}" for name, value in values.items())
  say(f"validation of step {step} in {duration(time.monotonic() - began)}: {text}")


def notes(loader: Loader, nonfinite: NonFinite) -> str:
  """Bad files and skipped steps, for the console."""
  bad = f"  {len(loader.bad_rows)} bad files" if loader.bad_rows else ""
  return bad + (f"  {nonfinite.count} non-finite steps skipped" if nonfinite.count else "")


def largest(value: float) -> float:
  """The largest `value` among all processes. Every process must call this function."""
  return float(np.max(multihost_utils.process_allgather(np.asarray(value)))) if jax.process_count() > 1 else value
