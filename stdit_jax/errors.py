"""Errors of users that only show while a command is under way."""


class InputError(ValueError):
  """A user's error that only shows during a run, where a plain ValueError may also be ours."""
