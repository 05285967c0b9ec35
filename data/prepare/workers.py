"""Functions on strangers' files, each in a process of its own with limits: a bad file costs its row, never the run.

A pool of spawned processes. A process that takes too long, too much memory, or dies is replaced by another one; what it was
at is tried again if it was killed from outside (kill -9, the kernel's out-of-memory killer).
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import errno
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any

from data.video import Away, BadVideo

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # nothing can be written: no file's fault, the run must end
_KILLED = (-signal.SIGKILL, -signal.SIGTERM)
_START = 60.0  # seconds that a new process may need for its imports
_TRIES = 3  # of an item whose process was killed from outside


class Passing(Exception):  # noqa: N818 - it says of what kind a failure is
  """A failure that another run may not have: a server or a disk that gives no answer, a file that is away."""


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one file may take.

  seconds: time, at least.
  bytes_per_second: longer files have more time, in the proportion of their real (never of a declared) size.
  memory_gb: address space beyond that of an idle worker.
  max_pixels: of a picture or frame; what declares more is refused before anything is decoded.
  """

  seconds: float = 120.0
  bytes_per_second: float = 100e3
  memory_gb: float = 4.0
  max_pixels: int = 8192 * 8192

  def check(self) -> None:
    """Raises ValueError about a value, in one line."""
    if self.seconds <= 0 or self.bytes_per_second <= 0 or self.memory_gb <= 0 or self.max_pixels < 1:
      raise ValueError("seconds, bytes_per_second, memory_gb and max_pixels must be more than 0")

  def time_of(self, size: int | None) -> float:
    """Seconds for a file of `size` bytes."""
    return self.seconds + (size or 0) / self.bytes_per_second


DEFAULT_LIMITS = Limits()


@dataclasses.dataclass(frozen=True)
class Failure:
  """Why there is no result; `retry`: another run may have one."""

  reason: str
  retry: bool = False


class _Killed(Failure):
  """Its process was ended from outside."""


def call(function: Callable, item: Any, report: Callable[[float], None]) -> Any:
  """function(item, report), its failures as `Failure`. Raises OSError only where nothing can be written any more."""
  try:
    return function(item, report)
  except Away as error:
    return Failure(_line(error), retry=True)
  except (BadVideo, MemoryError) as error:
    return Failure(_line(error) if isinstance(error, BadVideo) else "needs more memory than limits.memory_gb allows")
  except Passing as error:
    return Failure(_line(error), retry=True)
  except OSError as error:
    if error.errno in FULL:
      raise
    if error.errno == errno.ENOMEM:
      return Failure("needs more memory than limits.memory_gb allows")
    return Failure(_line(error), retry=error.errno is not None)  # Pillow raises some without a number, of damaged files
  except Exception as error:  # a library's surprise at a strange file must cost this file only
    if "bad_alloc" in str(error) or "nsufficient memory" in str(error):  # OpenCV's and ONNX Runtime's words
      return Failure("needs more memory than limits.memory_gb allows")
    if os.environ.get("STDIT_JAX_TRACEBACK"):
      raise
    return Failure(f"{type(error).__name__}: {_line(error)}")


def _line(error: BaseException) -> str:
  return " ".join(str(error).split())[:300] or type(error).__name__


def _work(pipe: connection.Connection, limits: Limits) -> None:
  """A worker process."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
  with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a killed parent leaves nobody behind
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond a limit is an error, not the end
  with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent has gone
    _serve(pipe, limits)


def _serve(pipe: connection.Connection, limits: Limits) -> None:
  limited = False
  while True:
    function, item = pipe.recv()
    pipe.send(("began", None))
    if not limited:
      _limit_memory(limits)  # with the first item: its modules are loaded now
      limited = True
    try:
      result = call(function, item, lambda share: pipe.send(("at", share)))
    except OSError as error:
      pipe.send(("full", (error.errno, os.strerror(error.errno), error.filename)))
      continue
    pipe.send(("done", result))


def _limit_memory(limits: Limits) -> None:
  """Address space beyond what is in use now: the one measure that a process can be held to."""
  if sys.platform != "linux":
    return
  with open("/proc/self/statm") as f:
    there = int(f.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
  most = there + int(limits.memory_gb * 2**30)
  hard = resource.getrlimit(resource.RLIMIT_AS)[1]
  resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
  """What is started inside uses one thread a library: the processes are the parallelism."""
  before = dict(os.environ)
  os.environ.update(
    dict.fromkeys(("POLARS_MAX_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"), "1")
  )
  try:
    yield
  finally:
    os.environ.clear()
    os.environ.update(before)


class _Worker:
  """A process and what it is at."""

  def __init__(self, context, limits: Limits):
    self.pipe, far = context.Pipe()
    self.process = context.Process(target=_work, args=(far, limits), daemon=True)
    with _one_thread():
      self.process.start()
    far.close()
    self.index: int | None = None
    self.deadline, self.seconds, self.share = 0.0, 0.0, 0.0

  def give(self, function: Callable, index: int, item: Any, seconds: float) -> None:
    self.index, self.share, self.seconds = index, 0.0, seconds
    self.deadline = time.monotonic() + _START + seconds
    self.pipe.send((function, item))

  def end(self) -> None:
    self.process.kill()
    self.process.join()
    self.pipe.close()


class Pool:
  """`count` worker processes under `limits`; used as a context. One that is not used starts none."""

  def __init__(self, count: int, limits: Limits = DEFAULT_LIMITS):
    self.count, self.limits = max(1, count), limits
    self._context = multiprocessing.get_context("spawn")  # threads of decoders would not survive a fork
    self._workers: list[_Worker] = []

  def __enter__(self) -> Pool:
    return self

  def __exit__(self, *_: object) -> None:
    for worker in self._workers:
      worker.end()
    self._workers = []

  def map(
    self,
    function: Callable[[Any, Callable[[float], None]], Any],
    items: Sequence[Any],
    *,
    sizes: Sequence[int | None] | None = None,
    progress: Callable[[float], None] = lambda done: None,
    finished: Callable[[int, Any], None] = lambda index, result: None,
  ) -> list[Any]:
    """[result or `Failure`] of function(item, report) for every item, in order.

    Args:
      function: picklable; `report(share)` may be called with the share of the item that is done.
      items: picklable.
      sizes: bytes of each item's file, for its time limit.
      progress: called with the number of items done, fractions of those at work included.
      finished: called with (index, result) when one is there, in any order.

    Raises:
      OSError: nothing can be written any more (disk full, quota, read-only).
    """
    results: list[Any] = [None] * len(items)
    waiting, tries, done = collections.deque(range(len(items))), collections.Counter(), 0
    try:
      while done < len(items):
        while len(self._workers) < min(self.count, len(items) - done):
          self._workers.append(_Worker(self._context, self.limits))
        for worker in self._workers:
          if worker.index is None and waiting:
            index = waiting.popleft()
            seconds = self.limits.time_of(sizes[index] if sizes else None)
            try:
              worker.give(function, index, items[index], seconds)
            except (BrokenPipeError, ConnectionResetError):  # it died while idle
              waiting.appendleft(index)
              worker.index = None
              self._replace(worker)
              break
        for worker in self._events():
          outcome = self._outcome(worker)
          if outcome is None:
            continue
          index, worker.index = worker.index, None
          if isinstance(outcome, _Killed) and tries[index] < _TRIES - 1:
            tries[index] += 1
            waiting.append(index)
            continue
          results[index] = outcome
          finished(index, outcome)
          done += 1
        progress(done + sum(w.share for w in self._workers if w.index is not None))
    except BaseException:
      self.__exit__()
      raise
    return results

  def _replace(self, worker: _Worker) -> None:
    worker.end()
    self._workers.remove(worker)

  def _events(self) -> list[_Worker]:
    """Workers that said something or are late; waits for them."""
    busy = [w for w in self._workers if w.index is not None]
    now = time.monotonic()
    ready = connection.wait([w.pipe for w in busy], min([2.0, *(max(0.0, w.deadline - now) for w in busy)]))
    now = time.monotonic()
    return [w for w in busy if w.pipe in ready or now >= w.deadline]

  def _outcome(self, worker: _Worker) -> Any:
    """What became of the worker's item; None: still at work."""
    try:
      if worker.pipe.poll():
        kind, value = worker.pipe.recv()
        if kind == "began":  # from here on the time is the file's
          worker.deadline = time.monotonic() + worker.seconds
          return None
        if kind == "at":
          worker.share = min(max(float(value), 0.0), 1.0)
          return None
        if kind == "full":
          raise OSError(*value)
        return value
    except (EOFError, ConnectionResetError):
      worker.process.join(10)
      code = worker.process.exitcode
      self._replace(worker)
      if code in _KILLED:
        return _Killed("killed: its process was ended from outside (no memory left?)", retry=True)
      return Failure(f"the decoder died of it ({signal.Signals(-code).name if code and code < 0 else f'exit code {code}'})")
    if time.monotonic() >= worker.deadline:
      self._replace(worker)
      return Failure("took longer than limits.seconds and limits.bytes_per_second allow")
    return None
