"""Resumable output in shards, as `data.prepare` and `stdit_jax.encode` make it.

Every shard has a number, and `Share` tells which shards a process makes. `paths.whole` writes a shard under a temporary name
and renames it, so a killed process leaves no half shard. `digest` names the provenance of a shard. The next command keeps a
shard with the expected provenance and makes the others.
"""

import hashlib
import json
import sys
import time
from typing import Any, NamedTuple


class Share(NamedTuple):
  """The shards of one process: every `count`-th, from number `index` on."""

  index: int = 0
  count: int = 1

  @classmethod
  def parse(cls, text: str) -> "Share":
    """The value of `--shard`, "I/N". Raises ValueError."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
      raise ValueError(f"--shard {text}: give I/N with I from 0 to N - 1, such as 0/2")
    return cls(int(index), int(count))

  def owns(self, number: int) -> bool:
    return number % self.count == self.index


def digest(value: Any) -> str:
  """32 hexadecimal digits of a JSON value."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


class Progress:
  """Prints lines with the rate and the time left: at most one in two seconds, or in 30 seconds if stdout is a file."""

  def __init__(self, what: str, total: float, unit: str = "rows"):
    self.what, self.total, self.unit = what, total, unit
    self.begin = self.shown = time.monotonic()
    self._every = 2.0 if sys.stdout.isatty() else 30.0

  def __call__(self, done: float) -> None:
    """`done`: the finished part of `total`, with fractions of the items in work."""
    now = time.monotonic()
    if now - self.shown < self._every:
      return
    self.shown = now
    rate = done / (now - self.begin)
    left = f"{duration((self.total - done) / rate)} left" if rate else "time left unknown"
    share = f"{100 * done / max(self.total, 1):.0f} %"
    print(f"{self.what}: {done:,.1f} of {self.total:,.0f} {self.unit} ({share}), {rate:.3g} per second, {left}", flush=True)


def duration(seconds: float) -> str:
  """A duration such as '3 s', '12:05' or '3:12:05'."""
  seconds = max(0, int(seconds))
  if seconds < 60:
    return f"{seconds} s"
  hours, minutes, seconds = seconds // 3600, seconds // 60 % 60, seconds % 60
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
