"""Profiles of training steps, chosen by the configuration or by SIGUSR1. TensorBoard and Perfetto show `<output>/profile`."""

import contextlib
import signal
import threading
from typing import Any

import jax

from data import paths

SIGNALLED_STEPS = 3


class Profiler:
  """Traces the optimizer steps `steps` = (first, last), and the next three steps after SIGUSR1."""

  def __init__(self, output: str, steps: tuple):
    self._folder, self._local = paths.join(output, "profile"), contextlib.ExitStack()
    self._first, self._last = steps or (0, 0)
    self._signalled, self._running, self._old = False, False, None

  def __enter__(self) -> "Profiler":
    if threading.current_thread() is threading.main_thread():
      self._old = signal.signal(signal.SIGUSR1, self._note)
    return self

  def __exit__(self, *_):
    if self._old is not None:
      signal.signal(signal.SIGUSR1, self._old)
    self.after(self._last)

  def _note(self, *_):
    self._signalled = True

  def before(self, step: int) -> None:
    """Starts the trace if the window begins at optimizer step `step` (1 = the first)."""
    if self._signalled and not self._running:
      self._signalled, self._first, self._last = False, step, step + SIGNALLED_STEPS - 1
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
