"""Counts optimizer steps with a non-finite loss or gradient. Too many in a row raise `TooManyNonFinite`.

The update program itself skips such a step (`step.update`). So the check may be late. The host checks a step after it has
dispatched the following step, and the device never waits for the host.
"""

import dataclasses
import math
from typing import Any

import numpy as np


@dataclasses.dataclass
class MicroStep:
  """A micro step whose optimizer step is not checked yet.

  Attributes:
    position: in the stage's plan; bucket: (resolution, frames).
    loss: device scalar; paths: files of this process's rows.
  """

  position: int
  bucket: tuple
  loss: Any
  paths: list[str]

  def __str__(self):
    names = ", ".join(sorted(set(self.paths))[:3]) + (", ..." if len(set(self.paths)) > 3 else "")
    return f"plan position {self.position} ({self.bucket[0]} x {self.bucket[1]}): loss {float(self.loss):g}, {names}"


class TooManyNonFinite(Exception):  # noqa: N818 - the run goes back to a checkpoint; only a repetition is an error
  """Too many non-finite optimizer steps in a row. `steps`: [(optimizer step, its micro steps)]."""

  def __init__(self, steps: list[tuple[int, list[MicroStep]]]):
    super().__init__(f"{len(steps)} optimizer steps in a row were not finite")
    self.steps = steps

  def positions(self) -> list[int]:
    """Plan positions of the micro steps with a non-finite loss.

    If all losses of an optimizer step are finite, a gradient is not. Then all micro steps of this step count as failed.
    """
    found = set()
    for _, micro_steps in self.steps:
      failed = [m for m in micro_steps if not math.isfinite(float(m.loss))]
      found |= {m.position for m in failed or micro_steps}
    return sorted(found)

  def report(self) -> str:
    """One line with steps, losses and files."""
    lines = [f"step {step}: {m}" for step, micro_steps in self.steps for m in micro_steps]
    return "; ".join(lines[:8]) + (f"; and {len(lines) - 8} more" if len(lines) > 8 else "")


class NonFinite:
  """Checks the steps of one stage, one step late, with the same result on every process. `count`: skipped steps so far."""

  def __init__(self, limit: int):
    self.limit, self.count, self._row, self._last = limit, 0, [], None  # `limit` steps in a row raise TooManyNonFinite

  def after(self, step: int, nonfinite: Any, micro_steps: list[MicroStep]) -> None:
    """Checks the previous optimizer step, after step `step` was dispatched. Raises TooManyNonFinite."""
    self.settle()
    self._last = step, nonfinite, micro_steps

  def settle(self) -> int:
    """Waits for the device and checks the last step. Returns the number of non-finite steps in a row up to this step."""
    if self._last is not None:
      step, nonfinite, micro_steps = self._last
      self._last = None
      if np.asarray(nonfinite):
        self.count += 1
        self._row.append((step, micro_steps))
      else:
        self._row = []
      if len(self._row) >= self.limit:
        raise TooManyNonFinite(self._row)
    return len(self._row)
