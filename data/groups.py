"""Groups of rows: what a worker decodes at a time, and their places among all rows (`data/read_ahead.py`)."""

import bisect
from typing import Protocol

import numpy as np


class Source(Protocol):
  """Groups of rows. Picklable."""

  def place(self, number: int) -> tuple[int, int]:
    """Returns (weight of all groups before this one, weight of this group)."""
    ...

  def __getitem__(self, number: int) -> list:
    """Returns the rows of a group, arguments of the decoder. [] after the last row."""
    ...


class RowSource:
  """The rows that one process reads, in the order of the plan, in groups. Rows are arguments of `loader.RowDecoder`.

  Args:
    shares: (parts, number of parts) of every bucket.
    rows_per_step: number of rows of a step that the process reads, for every bucket.
    ahead: weights and groups of the buckets.
    start: (epoch, step of the epoch) of the first group.
    epochs: the source ends after this many epochs. None = never.
  """

  def __init__(self, sequence, shares, rows_per_step, ahead, start, epochs):
    self.plans, self.shares, self.rows_per_step, self.ahead, self.epochs = sequence, shares, rows_per_step, ahead, epochs
    self.start = start
    # Of a step of every bucket: groups, and their weight.
    self._groups = [-(-n // size) for n, size in zip(rows_per_step, ahead.groups)]
    self._weights = [n * weight for n, weight in zip(rows_per_step, ahead.weights)]
    self._firsts, self._begins = [0], [0]  # number and weight of the groups before each epoch, from the first one on
    self._ends = {}  # {epoch: (groups, weight) up to the end of each step}, only for the last two epochs

  def __reduce__(self):  # a copy opens its own plans
    return RowSource, (self.plans, self.shares, self.rows_per_step, self.ahead, self.start, self.epochs)

  def _ends_of(self, epoch):
    if epoch not in self._ends:
      ends = tuple(self.plans.plan(epoch).ends(counts) for counts in (self._groups, self._weights))
      self._ends = {own: self._ends[own] for own in self._ends if own == epoch - 1} | {epoch: ends}
    return self._ends[epoch]

  def _find(self, number):
    """(epoch, step, group of the step, weight before the step), or None after the last epoch."""
    first, begun = self.start
    with self.plans.lock:
      while True:
        epoch = first + bisect.bisect_right(self._firsts, number) - 1
        if self.epochs is not None and epoch >= self.epochs:
          return None
        groups, weights = self._ends_of(epoch)
        at = epoch - first
        before = (int(groups[begun - 1]), int(weights[begun - 1])) if begun and not at else (0, 0)  # steps before the start
        if at + 1 == len(self._firsts):
          self._firsts.append(self._firsts[at] + int(groups[-1]) - before[0])
          self._begins.append(self._begins[at] + int(weights[-1]) - before[1])
        if number < self._firsts[at + 1]:
          break
      within = number - self._firsts[at] + before[0]
      step = int(np.searchsorted(groups, within, "right"))
      group, weight = (within - int(groups[step - 1]), int(weights[step - 1])) if step else (within, 0)
      return epoch, step, group, self._begins[at] + weight - before[1]

  def _rows_of(self, step_bucket, group):
    """Numbers, among the rows of a step that this process reads, of the rows of a group."""
    size = self.ahead.groups[step_bucket]
    return range(group * size, min((group + 1) * size, self.rows_per_step[step_bucket]))

  def place(self, number: int) -> tuple[int, int]:
    if (found := self._find(number)) is None:
      return 0, 0
    epoch, step, group, before = found
    bucket = self.plans.plan(epoch).bucket_index(step)
    rows, weight = self._rows_of(bucket, group), self.ahead.weights[bucket]
    return before + rows.start * weight, len(rows) * weight

  def __getitem__(self, number: int) -> list:
    if (found := self._find(number)) is None:
      return []
    epoch, step, group, _ = found
    current = self.plans.plan(epoch)
    index, (begin, end) = current.bucket_index(step), current.slots(step)
    parts, count = self.shares[index]
    size, rows = (end - begin) // count, []  # slots of one part
    for within in self._rows_of(index, group):
      slot = begin + parts[within // size] * size + within % size if parts else begin
      row, key, bucket, _ = current.slot(slot)
      rows.append((epoch, slot, row, key, bucket, bool(parts)))
    return rows


class ListSource:
  """The rows of a list, in groups of consecutive rows.

  Args:
    rows: array.
    weights: of the rows.
    most: weight of a group. A heavier row is a group of its own.
  """

  def __init__(self, rows: np.ndarray, weights: np.ndarray, most: int):
    ends = np.cumsum(weights)
    number = (ends - 1) // max(most, 1)
    self._rows, self._starts = rows, np.append(np.flatnonzero(np.diff(number, prepend=-1)), len(rows))
    self._begins = np.append(0, ends)[self._starts]

  def __len__(self):
    return len(self._starts) - 1

  def place(self, number: int) -> tuple[int, int]:
    if number >= len(self):
      return 0, 0
    return int(self._begins[number]), int(self._begins[number + 1] - self._begins[number])

  def __getitem__(self, number: int) -> list:
    return self._rows[slice(*self._starts[number : number + 2])].tolist() if number < len(self) else []
