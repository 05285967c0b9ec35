"""SIGTERM stops a run after the current step, on all processes at the same step."""

import contextlib
import signal
import threading

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):  # noqa: N818 - nothing went wrong
  """The run was told to stop and has saved everything."""


class Preemption:
  """Whether the run must stop.

  In a run of one process, a signal handler notes SIGTERM while the `with` block runs. In a run of several, the runtime notes
  it on any process, and all processes stop at the same step.
  """

  def __init__(self):
    self._told, self._asked, self._old = False, 0, None

  def __enter__(self):
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      self._old = signal.signal(signal.SIGTERM, self._note)
    return self

  def __exit__(self, *_):
    if self._old is not None:
      signal.signal(signal.SIGTERM, self._old)

  def _note(self, *_):
    self._told = True

  def requested(self) -> bool:
    """Whether to stop now. The answer is the same on all processes. Call it once per optimizer step."""
    if jax.process_count() == 1:
      return self._told
    self._asked += 1
    with contextlib.suppress(RuntimeError):  # the service is disabled
      return multihost_utils.reached_preemption_sync_point(self._asked)
    return False
