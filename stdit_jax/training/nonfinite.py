"""Optimizer steps whose loss or gradient was not finite: counted, and too many in a row end in `TooManyNonFinite`.

The update program leaves such a step out by itself (`step.update`), so that nothing here has to be quick: every step is
looked at when the next one has been handed to the device, which never waits for the host.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass
class MicroStep:
  """What is remembered of a micro step until its optimizer step has been looked at.

  position: in the stage's plan; bucket: (resolution, frames); loss: device scalar; paths: files of this process's rows.
  """

  position: int
  bucket: tuple
  loss: object
  paths: list

  def failed(self):
    return not math.isfinite(float(self.loss))

  def __str__(self):
    names = ", ".join(sorted(set(self.paths))[:3]) + (", ..." if len(set(self.paths)) > 3 else "")
    return f"plan position {self.position} ({self.bucket[0]} x {self.bucket[1]}): loss {float(self.loss):g}, {names}"


class TooManyNonFinite(Exception):  # noqa: N818 - the run goes back; an error only when it comes again
  """`steps`: [(optimizer step, its micro steps)], those in a row that were not finite."""

  def __init__(self, steps):
    super().__init__(f"{len(steps)} optimizer steps in a row were not finite")
    self.steps = steps

  def positions(self):
    """Plan positions of the micro steps that failed: those with a loss that is not finite; where all losses of an optimizer
    step are, its gradient was not, and any of them may have been it."""
    found = set()
    for _, micro_steps in self.steps:
      failed = [m for m in micro_steps if m.failed()] or micro_steps
      found |= {m.position for m in failed}
    return sorted(found)

  def report(self):
    """One line: steps, losses, files."""
    lines = [f"step {step}: {m}" for step, micro_steps in self.steps for m in micro_steps]
    return "; ".join(lines[:8]) + (f"; and {len(lines) - 8} more" if len(lines) > 8 else "")


class NonFinite:
  """Looks at the steps of one stage, one step late. Every process sees the same.

  Attributes: count: steps left out so far; row: how many in a row up to the last one looked at.
  """

  def __init__(self, limit):
    self.limit, self.count, self._row, self._last = limit, 0, [], None

  def after(self, step, nonfinite, micro_steps):
    """Optimizer step `step` has been handed to the device; looks at the one before. Raises TooManyNonFinite."""
    self.settle()
    self._last = step, nonfinite, micro_steps

  def settle(self):
    """Looks at the last step, too, which waits for the device; returns how many in a row up to it were not finite.

    Raises:
      TooManyNonFinite: that is the limit.
    """
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
