"""Metrics of a run: one line on the console, TensorBoard, and JSON lines that survive everything."""

import collections
import json
import math
import pathlib
import time

from tensorboardX import SummaryWriter

from stdit_jax.training.checkpoints import write_text


def duration(seconds):
  """'3 s', '12:05' or '3:12:05'."""
  seconds = int(seconds)
  if seconds < 60:
    return f"{seconds} s"
  hours, minutes, seconds = seconds // 3600, seconds // 60 % 60, seconds % 60
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Averages:
  """Means over the steps since the last line. Values stay on the device until they are asked for: no wait per step.

  Values that are not finite are left out, as the update program leaves out their steps; `nonfinite` is the share of those.
  """

  def __init__(self):
    self._values = []

  def add(self, name, value, weight=1.0):
    """One value (a number or a device scalar) with its weight."""
    self._values.append((name, value, weight))

  def take(self):
    """{name: weighted mean}, and starts anew. Names without weight, or without a finite value, are left out."""
    sums = collections.defaultdict(lambda: [0.0, 0.0])
    for name, value, weight in self._values:
      value, weight = float(value), float(weight)
      if weight and math.isfinite(value):
        sums[name][0] += value * weight
        sums[name][1] += weight
    self._values = []
    return {name: total / weight for name, (total, weight) in sums.items()}


class Metrics:
  """Writes what the loop measures. Only the first process writes."""

  def __init__(self, output, first_step, total_steps, active=True):
    self._active, self._total, self.first_step = active, total_steps, first_step
    self._start = self._last_time = time.monotonic()
    self._last_step = first_step
    if not active:
      return
    folder = pathlib.Path(output)
    self._path = folder / "metrics.jsonl"
    if self._path.exists():
      # Steps after the checkpoint we resume from will be run again: drop their lines.
      lines = [line for line in self._path.read_text().splitlines() if _step(line) is not None and _step(line) <= first_step]
      write_text(self._path, "".join(f"{line}\n" for line in lines))
    self._file = self._path.open("a")
    self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step or None)

  def write(self, step, values, note=""):
    """Records scalars at optimizer step `step` (1 = after the first) and prints one line with rate and time left."""
    if not self._active:
      return
    now = time.monotonic()
    rate = (step - self._last_step) / max(now - self._last_time, 1e-9)
    mean_rate = (step - self.first_step) / max(now - self._start, 1e-9)
    self._last_time, self._last_step = now, step
    left = duration((self._total - step) / mean_rate) if mean_rate else "?"
    self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
    self._file.flush()
    for name, value in values.items():
      self._board.add_scalar(name.replace(" ", "_"), value, step)
    shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if "/" not in name)
    print(f"step {step}/{self._total}  {shown}  {rate:.2f} steps/s  {left} left{note}", flush=True)

  def close(self):
    if self._active:
      self._file.close()
      self._board.close()


def _step(line):
  try:
    return json.loads(line)["step"]
  except (json.JSONDecodeError, KeyError):
    return None
