"""Compiles programs in threads beside training, before they are needed, in the order in which the plan needs them.

The main thread traces and lowers programs of the mesh, since JAX's context (`jax.set_mesh`) belongs to one thread. Compiling
releases the GIL and needs no context. After a restart these programs come from JAX's cache. Programs of this process's own
devices need no context at all. They come from `Executables`.
"""

import concurrent.futures
import functools
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from data.read_ahead import usable_cpus
from data.shards import duration
from stdit_jax.training.counter import CompileCounter, was_cached
from stdit_jax.training.executables import Executables, OwnProgram

Future = concurrent.futures.Future


def thread_count(wanted: int) -> int:
  """Programs to compile at a time. 0: one for each eight cores, at least one and at most 16 (each takes up to 2 GB)."""
  return wanted or max(1, min(16, usable_cpus() // 8))


class AheadOfTime:
  """Compiles lowered programs in the background.

  Args:
    threads: number of programs that compile at the same time; see `thread_count`.
    say: prints a line when a program is ready, and a line when all programs are ready.
    alive: `watchdog.Watchdog.alive`.

  Attributes:
    counter: counts the programs by name.
  """

  def __init__(self, threads: int, say: Callable[[str], None], alive: Callable = lambda waits=0: None):
    self._say, self.alive, self._threads, self.counter = say, alive, thread_count(threads), CompileCounter()
    # Programs of the mesh and own programs do not wait for each other: a step needs both.
    make_pool = functools.partial(concurrent.futures.ThreadPoolExecutor, self._threads, "compilation", self.counter.take_thread)
    self._pool, self._own_pool = make_pool(), make_pool()
    self._lock, self._open, self._done = threading.Lock(), 0, []  # _done: [(from a cache, seconds)]
    self._own = Executables.beside_jax()

  def add(self, name: str, lowered: jax.stages.Lowered) -> Future:
    """Compiles a lowered program of the mesh. Returns the future of the compiled program. Messages contain `name`."""
    with self._lock:
      self._open += 1
    return self._pool.submit(self._compile, name, lowered)

  def _compile(self, name, lowered):
    began = time.monotonic()
    try:
      compiled, cached = lowered.compile(), was_cached()
    except BaseException:
      with self._lock:
        self._open -= 1
      raise
    seconds = time.monotonic() - began
    self.alive()
    self._say(f"{name}: {'from the compilation cache' if cached else 'compiled'} in {seconds:.1f} s")
    with self._lock:
      self._open -= 1
      self._done.append((cached, seconds))
      if not self._open:
        done, (hits, total) = len(self._done), map(sum, zip(*self._done))
        self._say(f"{done} programs are ready: {hits} from the cache, {done - hits} compiled; {total:.1f} s in all")
    return compiled

  def add_own(self, programs: Sequence[OwnProgram]) -> list[Future]:
    """Loads or compiles programs of this process's own devices, which are not traced yet. Returns their futures.

    `say` prints their number, how many have a file, and the time left for the others.
    """
    known = [self._own.has(program) for program in programs]
    if programs:
      text = f"{len(known)} {programs[0].kind} programs: {sum(known)} from files, {known.count(False)} to compile"
      self._say(f"{text}, {self._threads} at a time")
    left = _Countdown(known.count(False), self._say)
    return [self._own_pool.submit(self._make_own, program, None if k else left) for program, k in zip(programs, known)]

  def _make_own(self, program, left):
    began = time.monotonic()
    if (loaded := self._own.load(program)) is None:
      loaded = self._own.compile(program)
    if left:  # another process may have written the file since
      left.note(program.kind, (time.monotonic() - began) / self._threads)
    self.alive()
    return loaded

  def wait_for(self, program: Future) -> Any:
    """The result of a future of this class, for a thread beside the loop. Raises CancelledError after `close`."""
    if program.done():
      return program.result()
    self.alive(1)
    try:
      return program.result()  # unlike concurrent.futures.wait, it also ends when `close` cancels the future
    finally:
      self.alive(-1)

  def close(self) -> None:
    """Drops the programs that wait to be compiled."""
    for pool in (self._pool, self._own_pool):
      pool.shutdown(wait=False, cancel_futures=True)


class _Countdown:
  """Prints how many programs are still to compile and how long they take, at most once in ten seconds."""

  def __init__(self, left, say):
    self._left, self._say, self._seconds, self._lock, self._printed = left, say, [], threading.Lock(), 0.0

  def note(self, kind, seconds):
    """One more program is ready. `seconds`: its time divided by the number of threads."""
    with self._lock:
      self._left -= 1
      self._seconds.append(seconds)
      if (now := time.monotonic()) - self._printed > 10 or self._left == 0:
        self._printed = now
        rest = f"{self._left} left, about {duration(self._left * statistics.mean(self._seconds))}"
        self._say(f"{kind} programs: {len(self._seconds)} are ready, {rest if self._left > 0 else 'none is left'}")
