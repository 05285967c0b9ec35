"""Metrics of a run: console lines, TensorBoard and JSON lines (`metrics.jsonl`)."""

import collections
import contextlib
import functools
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from data import paths
from data.read_ahead import Ahead
from data.shards import duration
from stdit_jax.parallel.topology import peak_tflops

MAX_DATA_SHARE = 0.02  # of the step time; above it the console gives advice
UPLOAD_SECONDS = 60.0  # between uploads to a storage bucket, which stores whole files only
_USUAL = {"nonfinite": 0, "stepped": 1}  # values that the console does not show
SHARE = "/share"  # "NAME/share" is the share of the samples that have a value NAME


class Averages:
  """Means over the steps since the last line. Values stay on the device until `take`, so that no step waits.

  `take` skips non-finite values, since the update program skips their steps. A value that only some samples have needs two
  entries: NAME, the mean with zeros for the other samples, and NAME/share, the share of the samples that have the value.
  """

  def __init__(self):
    self._values = []

  def add(self, values: Mapping[str, Any], weight: Any = 1.0) -> None:
    """Adds {name: number or device scalar} of one step or micro step."""
    self._values.append((values, weight))

  def take(self) -> dict[str, float]:
    """Returns {name: weighted mean} and starts anew. Skips names without a finite value of positive weight."""
    sums = collections.defaultdict(lambda: [0.0, 0.0])
    for values, weight in self._values:
      weight, values = float(weight), {name: float(value) for name, value in values.items()}
      for name, value in values.items():
        # If a value is skipped, its share is skipped as well.
        if weight and math.isfinite(value) and math.isfinite(values[name.removesuffix(SHARE)]):
          sums[name][0] += value * weight
          sums[name][1] += weight
    self._values = []
    means = {name: total / weight for name, (total, weight) in sums.items()}
    for name in [name for name in means if name.endswith(SHARE)]:
      share, value = means.pop(name), name.removesuffix(SHARE)
      if not share:
        means.pop(value, None)
      elif value in means:
        means[value] /= share
    return means


class Speed:
  """Measures the speed of a run since the last line, without checkpoints, samples and waiting for the compiler."""

  def __init__(self, devices: Sequence):
    self._devices, self._peak = len(devices), peak_tflops(devices[0].device_kind)
    self.start_stage()

  def start_stage(self) -> None:
    """Starts a stage. Called when its first batch is ready."""
    self._stage = np.zeros(3)  # steps, seconds, seconds of waiting for data
    self._start()

  def _start(self):
    self._began, self._sums = time.monotonic(), collections.defaultdict(float)

  def micro_step(self, work: tuple[float, float]) -> None:
    """Counts the (tokens, FLOPs) of a micro step."""
    self._sums["tokens"] += work[0]
    self._sums["flops"] += work[1]

  def step(self) -> None:
    self._sums["steps"] += 1

  @contextlib.contextmanager
  def _timed(self, what):
    began = time.monotonic()
    yield
    self._sums[what] += time.monotonic() - began

  waiting_for_data = functools.partialmethod(_timed, "data")
  paused = functools.partialmethod(_timed, "paused")

  def take(self) -> dict[str, float]:
    """Returns {"speed/...": value} since the last call."""
    sums, steps = self._sums, max(self._sums["steps"], 1)
    seconds = max(time.monotonic() - self._began - sums["paused"], 1e-9)
    values = {"step_seconds": seconds / steps, "data_seconds": sums["data"] / steps, "data_share": sums["data"] / seconds}
    if sums["tokens"]:
      values["tokens_per_second"] = sums["tokens"] / seconds
    if sums["flops"]:
      values["tflops_per_device"] = sums["flops"] / seconds / self._devices / 1e12
      if self._peak:
        values["mfu"] = values["tflops_per_device"] / self._peak
    memory = jax.local_devices()[0].memory_stats() or {}
    for key, name in (("bytes_in_use", "hbm_gib"), ("peak_bytes_in_use", "hbm_peak_gib")):
      if key in memory:
        values[name] = memory[key] / 2**30
    self._stage += sums["steps"], seconds, sums["data"]
    self._start()
    return {f"speed/{name}": value for name, value in values.items()}

  def stage_data(self) -> tuple[int, float, float]:
    """(steps, seconds per step, share of the time that waited for data) of the stage up to the last `take`."""
    steps, seconds, data = self._stage
    return int(steps), seconds / max(steps, 1), data / max(seconds, 1e-9)


def stage_note(steps: int, seconds: float, share: float, ahead: Ahead) -> str:
  """The console's note at the end of a stage.

  `share`: largest share of waiting for data among the processes; `ahead`: how far the loader read ahead.
  """
  text = f"{steps} steps of {seconds:.3g} s, {share:.1%} of it waiting for data"
  if share <= MAX_DATA_SHARE:
    return text
  now = f"data.workers (now {ahead.workers}) or data.read_ahead (now {ahead.amount})"
  return f"{text}: more than {MAX_DATA_SHARE:.0%}; cache latents (python -m stdit_jax.encode), or raise {now}"


def speed_note(values: Mapping[str, float]) -> str:
  """The console's note on the values of `Speed.take`."""
  text = f"  data {values['speed/data_share']:.1%}"
  if "speed/tflops_per_device" in values:
    text += f"  {values['speed/tflops_per_device']:.3g} TFLOP/s per device"
  return text + (f" (MFU {values['speed/mfu']:.1%})" if "speed/mfu" in values else "")


class Metrics:
  """Writes the measurements of the loop, on the first process only (`active`).

  A storage bucket cannot append to a file. So the files of such a run grow in a local folder, and `flush` uploads them whole.
  """

  def __init__(self, output: str, first_step: int, total_steps: int, active: bool = True):
    self._active, self._total, self._output = active, total_steps, output
    self.start_stage(first_step)
    self._remote, self._uploaded = active and paths.is_remote(output), time.monotonic()
    self._folder = tempfile.mkdtemp(prefix="stdit_jax-") if self._remote else output
    path = os.path.join(self._folder, "metrics.jsonl") if active else os.devnull
    if active and paths.exists(old := paths.join(output, "metrics.jsonl")):
      # The run repeats the steps after its checkpoint: drop their lines.
      lines = paths.read_text(old).splitlines()
      paths.write_text(path, "".join(f"{line}\n" for line in lines if _step(line) <= first_step))
    self._file = open(path, "a")  # noqa: SIM115 - open as long as the run
    folder = os.path.join(self._folder, "tensorboard")
    self._board = SummaryWriter(folder, purge_step=first_step or None, write_to_disk=active)

  def start_stage(self, step: int) -> None:
    """Starts a stage after step `step`. The time left is estimated from the steps of this stage alone."""
    self._start = self._last_time = time.monotonic()
    self._first_step = self._last_step = step

  def write(self, step: int, values: Mapping[str, float], note: str = "") -> None:
    """Records scalars at optimizer step `step` (1 = after the first) and prints a line with rate and time left.

    The time left assumes the mean rate of this stage for all remaining steps, also for those of later stages.
    """
    now = time.monotonic()
    rate = (step - self._last_step) / max(now - self._last_time, 1e-9)
    mean_rate = (step - self._first_step) / max(now - self._start, 1e-9)
    self._last_time, self._last_step = now, step
    left = duration((self._total - step) / mean_rate) if mean_rate else "?"
    self.record(step, values)
    shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if "/" not in name and _USUAL.get(name) != value)
    if self._active:
      print(f"step {step}/{self._total}  {shown}  {rate:.2f} steps/s  {left} left{note}", flush=True)

  def record(self, step: int, values: Mapping[str, float]) -> None:
    """Records scalars at optimizer step `step` without printing."""
    self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
    self._file.flush()
    for name, value in values.items():
      self._board.add_scalar(name.replace(" ", "_"), value, step)
    # A full disk must show here. In the writer's own thread the error would end that thread, and then `add_scalar` would hang.
    self._board.flush()
    if self._remote and time.monotonic() - self._uploaded > UPLOAD_SECONDS:
      self.flush()

  def flush(self) -> None:
    """Writes all values to the output folder. Called before a checkpoint, so that a resumed run has the earlier values."""
    self._file.flush()
    self._board.flush()
    self._upload()

  def _upload(self):
    if not self._remote:
      return
    self._uploaded = time.monotonic()
    try:
      paths.upload(self._folder, self._output)
    except OSError as error:  # the next upload includes all values
      print(f"warning: metrics could not be written to {self._output}: {error.strerror}", file=sys.stderr, flush=True)

  def close(self) -> None:
    self._file.close()
    self._board.close()
    self._upload()
    if self._remote:
      shutil.rmtree(self._folder)


def _step(line):
  try:
    return json.loads(line)["step"]
  except (json.JSONDecodeError, KeyError):
    return math.inf  # a line that was cut off
