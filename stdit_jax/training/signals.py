"""Signals to a running training: SIGTERM stops it after the current step, SIGUSR1 starts a profile of the next steps.

TensorBoard and Perfetto show the profiles in `<output>/profile`.
"""

import contextlib
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

from data import paths

SIGNALLED_STEPS = 3


class Preempted(Exception):  # noqa: N818 - nothing went wrong
  """The run was told to stop and has saved everything."""


class _Noted:
  """Notes a signal while the `with` block runs. Only the main thread can set a handler."""

  def __init__(self, number):
    self._number, self._noted, self._old = number, False, None

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      self._old = signal.signal(self._number, self._note)
    return self

  def __exit__(self, *_):
    if self._old is not None:
      signal.signal(self._number, self._old)

  def _note(self, *_):
    self._noted = True


class Preemption(_Noted):
  """Whether the run must stop.

  In a run of one process, a signal handler notes SIGTERM while the `with` block runs. In a run of several, the runtime notes
  it on any process, and all processes stop at the same step.
  """

  def __init__(self):
    super().__init__(signal.SIGTERM)
    self._asked = 0

  def __enter__(self):
    return super().__enter__() if jax.process_count() == 1 else self

  def requested(self) -> bool:
    """Whether to stop now. The answer is the same on all processes. Call it once per optimizer step."""
    if jax.process_count() == 1:
      return self._noted
    self._asked += 1
    with contextlib.suppress(RuntimeError):  # the runtime's preemption service is disabled
      return multihost_utils.reached_preemption_sync_point(self._asked)
    return False


class Profiler(_Noted):
  """Traces the optimizer steps `steps` = (first, last), and the next three steps after SIGUSR1."""

  def __init__(self, output: str, steps: tuple):
    super().__init__(signal.SIGUSR1)
    self._folder, self._local, self._running = paths.join(output, "profile"), contextlib.ExitStack(), False
    self._first, self._last = steps or (0, 0)

  def __exit__(self, *_):
    super().__exit__()
    self.after(self._last)

  def before(self, step: int) -> None:
    """Starts the trace if the window begins at optimizer step `step` (1 = the first)."""
    if self._noted and not self._running:
      self._noted, self._first, self._last = False, step, step + SIGNALLED_STEPS - 1
    if step == self._first and not self._running:
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # Python calls would slow the steps and fill the trace
      jax.profiler.start_trace(self._local.enter_context(paths.local_folder(self._folder)), profiler_options=options)
      self._running = True

  def after(self, step: int, result: Any = None) -> str:
    """Ends the trace after the last step of the window, when `result` is ready. Returns a note for the console, or ""."""
    if not self._running or step < self._last:
      return ""
    jax.block_until_ready(result)
    jax.profiler.stop_trace()
    self._local.close()
    self._running = False
    return f"profile of steps {self._first} to {step}: {self._folder}"
