"""Texts that the pipeline prints."""

from __future__ import annotations


def say(text: str) -> None:
  print(text, flush=True)


def shown(text: str | None) -> str:
  """Foreign text, such as a file name, on one line of a terminal and without control characters."""
  return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text or "")[:300]


def one_line(error: BaseException) -> str:
  """The message of an exception as one line, or its type if it has no message."""
  return " ".join(str(error).split()) or type(error).__name__
