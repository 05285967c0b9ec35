"""Texts that the pipeline prints."""

from __future__ import annotations

import time


def say(text: str) -> None:
  """Prints a line at once."""
  print(text, flush=True)


def shown(text: str | None) -> str:
  """Foreign text, such as a file name, on one line of a terminal and without control characters."""
  return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text or "")[:300]


def one_line(error: BaseException) -> str:
  """The message of an exception as one line, or its type if it has no message."""
  return " ".join(str(error).split()) or type(error).__name__


class Progress:
  """Prints lines with rate and remaining time, at most one every two seconds."""

  def __init__(self, what: str, total: int, unit: str = "rows"):
    self.what, self.total, self.unit = what, total, unit
    self.begin = self.shown = time.monotonic()

  def __call__(self, done: float) -> None:
    """`done`: how many of `total` are finished, including fractions of those in work."""
    now = time.monotonic()
    if now - self.shown < 2.0:
      return
    self.shown = now
    rate = done / (now - self.begin)
    left = f"{clock((self.total - done) / rate)} left" if rate else "time left unknown"
    share = f"{100 * done / max(self.total, 1):.0f} %"
    say(f"{self.what}: {done:.4g} of {self.total} {self.unit} ({share}), {rate:.3g} per second, {left}")


def clock(seconds: float) -> str:
  """75 -> "1:15", 3700 -> "1:01:40"."""
  minutes, seconds = divmod(max(0, round(seconds)), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
