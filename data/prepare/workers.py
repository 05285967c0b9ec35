"""Functions on foreign files, in worker processes with limits: a bad file costs its row, never the run.

The pool replaces a process that dies or takes too much time or memory. It repeats an item if its process was killed from
outside (kill -9, the kernel's out-of-memory killer).
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import errno
import itertools
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any

from data.prepare.messages import one_line
from data.video import Away, BadVideo

CORES = os.cpu_count() or 1
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # nothing can be written: the run must end
_KILLED = (-signal.SIGKILL, -signal.SIGTERM)
_START = 60.0  # seconds that a new process may need for its imports
_TRIES = 3  # attempts at an item whose process was killed from outside


class Passing(Exception):  # noqa: N818 - the name says which kind of failure it is
  """A temporary failure: a server or a disk does not answer, or a file is missing. Another run may succeed."""


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of one file."""

  seconds: float = 120.0  # time for a small file
  bytes_per_second: float = 100e3  # the time grows by a second for this many bytes on disk
  memory_gb: float = 4.0  # address space that a worker may add for its items
  max_pixels: int = 8192 * 8192  # of an image or frame; a file that declares more is refused before decoding

  def check(self) -> None:
    if self.seconds <= 0 or self.bytes_per_second <= 0 or self.memory_gb <= 0 or self.max_pixels < 1:
      raise ValueError("seconds, bytes_per_second, memory_gb and max_pixels must be more than 0")


DEFAULT_LIMITS = Limits()


@dataclasses.dataclass(frozen=True)
class Failure:
  """The reason for a missing result. `retry`: another run may succeed."""

  reason: str
  retry: bool = False

  def columns(self, title: str) -> dict[str, Any]:
    """Columns of a row that failed in the step with this title."""
    return {"error": f"{title}: {self.reason}", "retry": self.retry}


class _Killed(Failure):
  """The item's process was killed from outside."""


def call(function: Callable, item: Any, report: Callable[[float], None]) -> Any:
  """function(item, report), or a `Failure`. Raises OSError only if nothing can be written."""
  try:
    return function(item, report)
  except Exception as error:  # an unexpected error of a library must cost one file only
    return failure_of(error)


def failure_of(error: Exception) -> Failure:
  """Turns an exception into a `Failure` of the file. Raises the exception if the file is not its cause."""
  line, number = one_line(error)[:300], getattr(error, "errno", None)
  if isinstance(error, (Away, Passing)):
    return Failure(line, retry=True)
  if isinstance(error, BadVideo):
    return Failure(line)
  if isinstance(error, OSError) and number in FULL:
    raise error
  # OpenCV and ONNX Runtime report missing memory in words.
  if isinstance(error, MemoryError) or number == errno.ENOMEM or "bad_alloc" in line or "nsufficient memory" in line:
    return Failure("needs more memory than limits.memory_gb allows")
  if isinstance(error, OSError):
    return Failure(line, retry=number is not None)  # Pillow raises OSError without a number for damaged files
  if os.environ.get("STDIT_JAX_TRACEBACK"):
    raise error
  return Failure(f"{type(error).__name__}: {line}")


def _work(pipe: connection.Connection, limits: Limits) -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
  with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: the worker dies with its parent
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond a limit raises an error instead of killing the process
  with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent has gone
    _serve(pipe, limits)


def _serve(pipe: connection.Connection, limits: Limits) -> None:
  for number in itertools.count():
    function, item = pipe.recv()
    pipe.send(("began", None))
    if not number:
      _limit_memory(limits)  # after unpickling the first item, which imported its modules
    try:
      result = call(function, item, lambda share: pipe.send(("at", share)))
    except OSError as error:
      pipe.send(("full", (error.errno, os.strerror(error.errno or 0), error.filename)))
      continue
    pipe.send(("done", result))


def _limit_memory(limits: Limits) -> None:
  """Limits the address space, the one memory limit that the kernel enforces per process."""
  if sys.platform != "linux":
    return
  with open("/proc/self/statm") as f:
    used = int(f.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
  most = used + int(limits.memory_gb * 2**30)
  hard = resource.getrlimit(resource.RLIMIT_AS)[1]
  resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
  """In this block, libraries of new processes use one thread each: the pool's processes are the parallelism."""
  before, names = dict(os.environ), ("POLARS_MAX_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENCV_FOR_THREADS_NUM")
  os.environ.update(dict.fromkeys(names, "1"))
  try:
    yield
  finally:
    os.environ.clear()
    os.environ.update(before)


class _Worker:
  """A process and the item that it works on (`index`, None: idle)."""

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


class Pool(contextlib.AbstractContextManager["Pool"]):
  """`count` worker processes under `limits`, as a context manager. The first `map` starts them."""

  def __init__(self, count: int, limits: Limits = DEFAULT_LIMITS):
    self.count, self.limits = max(1, count), limits
    self._context = multiprocessing.get_context("spawn")  # threads of decoders do not survive a fork
    self._workers: list[_Worker] = []

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
    """Returns function(item, report) or a `Failure` for every item, in order.

    Args:
      function: picklable. It may call `report(share)` with the finished share of its item.
      items: picklable.
      sizes: bytes of each item's file, for its time limit.
      progress: called with the number of finished items, including fractions of those in work.
      finished: called with (index, result) of each item when it is finished, in any order.

    Raises OSError if nothing can be written (disk full, quota, read-only).
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
            seconds = self.limits.seconds + ((sizes[index] if sizes else None) or 0) / self.limits.bytes_per_second
            try:
              worker.give(function, index, items[index], seconds)
            except (BrokenPipeError, ConnectionResetError):  # the worker died while idle
              waiting.appendleft(index)
              self._replace(worker)
              break
        for worker in self._events():
          outcome = self._outcome(worker)
          if outcome is None:
            continue
          index, worker.index = worker.index, None
          assert index is not None
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
    """Waits until workers send a message or are late. Returns these workers."""
    busy = [w for w in self._workers if w.index is not None]
    now = time.monotonic()
    ready = connection.wait([w.pipe for w in busy], min([2.0, *(max(0.0, w.deadline - now) for w in busy)]))
    now = time.monotonic()
    return [w for w in busy if w.pipe in ready or now >= w.deadline]

  def _outcome(self, worker: _Worker) -> Any:
    """Result of the worker's item, None if the worker has not finished it."""
    try:
      if worker.pipe.poll():
        kind, value = worker.pipe.recv()
        if kind == "began":  # the file's time starts after the imports
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
      return Failure(f"the decoder crashed ({signal.Signals(-code).name if code and code < 0 else f'exit code {code}'})")
    if time.monotonic() >= worker.deadline:
      self._replace(worker)
      return Failure("took longer than limits.seconds and limits.bytes_per_second allow")
    return None
