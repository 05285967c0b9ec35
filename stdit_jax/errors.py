"""Errors during a command: errors of the user, and errors that may pass."""

from data.paths import PASSING


class InputError(ValueError):
  """A user's error that shows only during a run. There a plain ValueError may be a bug, and keeps its traceback."""


def may_pass(error: BaseException) -> bool:
  """Whether the same command may succeed later, although the user changes nothing.

  True for I/O errors of disks and networks, and for errors of JAX's runtime, such as a chip that halted. A device with too
  little memory is the user's error.
  """
  if isinstance(error, OSError):
    return error.errno in PASSING
  import jax  # takes seconds; commands parse their flags before

  return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)
