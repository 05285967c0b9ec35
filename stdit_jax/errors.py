"""Errors of users that only show while a command is under way."""


class InputError(ValueError):
  """A user's error that shows only during a run. There a plain ValueError may be a bug, and keeps its traceback."""
