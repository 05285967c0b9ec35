"""Compiles programs in threads beside training, before they are needed.

The main thread traces and lowers the programs, since JAX's context (`jax.set_mesh`) belongs to one thread. Compiling releases
the GIL and needs no context. After a restart the programs come from the persistent cache.
"""

import concurrent.futures
import threading
import time
from collections.abc import Callable, Iterable, Mapping

import jax

from data.buckets import Bucket
from stdit_jax.training.step import Program, Programs

_HIT = "/jax/compilation_cache/cache_hits"
_here = threading.local()  # whether the last compilation of this thread came from the cache


def _note(event, **_):
  if event == _HIT:
    _here.hit = True


jax.monitoring.register_event_listener(_note)  # JAX calls it in the thread that compiles


class AheadOfTime:
  """Compiles lowered programs in the background.

  Args:
    threads: number of programs that compile at the same time.
    say: prints a line when a program is ready, and a line when all programs are ready.
  """

  def __init__(self, threads, say):
    self._say, self._pool = say, concurrent.futures.ThreadPoolExecutor(threads, "compilation")
    self._lock, self._open, self._done = threading.Lock(), 0, []  # _done: [(from the cache, seconds)]

  def add(self, name: str, lowered: jax.stages.Lowered) -> concurrent.futures.Future:
    """Compiles a lowered program. Returns the future of the compiled program. Messages contain `name`."""
    with self._lock:
      self._open += 1
    return self._pool.submit(self._compile, name, lowered)

  def _compile(self, name, lowered):
    _here.hit, began = False, time.monotonic()
    compiled = lowered.compile()
    seconds = time.monotonic() - began
    self._say(f"{name}: {'from the compilation cache' if _here.hit else 'compiled'} in {seconds:.1f} s")
    with self._lock:
      self._open -= 1
      self._done.append((_here.hit, seconds))
      if not self._open:
        done, (hits, total) = len(self._done), map(sum, zip(*self._done))
        self._say(f"{done} programs are ready: {hits} from the cache, {done - hits} compiled; {total:.1f} s in all")
    return compiled

  def close(self) -> None:
    """Drops the programs that wait to be compiled."""
    self._pool.shutdown(wait=False, cancel_futures=True)


class StagePrograms:
  """The compiled programs of one stage. Waits for a program inside `paused`, so that step times do not include the wait."""

  def __init__(self, programs: Programs, splits: Mapping, compiler: AheadOfTime, beat: Callable, paused: Callable):
    self._programs, self._splits, self._compiler, self._beat, self._paused = programs, splits, compiler, beat, paused
    self._lowered = {}  # {bucket, or None for the update: (Program, future)}

  def prepare(self, buckets: Iterable[Bucket]) -> None:
    """Lowers and starts to compile the programs of these buckets in order, with the update after the first bucket."""
    for bucket in buckets:
      self._lower((bucket.resolution, bucket.num_frames), bucket.batch_size)
      self._lower(None, 0)

  def _lower(self, bucket, rows):
    if bucket not in self._lowered:
      program = self._programs.gradient(bucket, rows, self._splits[bucket]) if bucket else self._programs.update
      self._beat(f"lowering {program.name}", slow=True)
      self._lowered[bucket] = program, self._compiler.add(program.name, program.lower())
    return self._lowered[bucket]

  def gradient(self, bucket: tuple[str, int], rows: int) -> tuple[Program, jax.stages.Compiled]:
    """(`step.Program`, its executable) of a bucket. Lowers the program if `prepare` did not."""
    return self._finished(*self._lower(bucket, rows))

  def update(self) -> jax.stages.Compiled:
    """The executable of the update program."""
    return self._finished(*self._lower(None, 0))[1]

  def _finished(self, program, compiled):
    if not compiled.done():
      self._beat(f"waiting for the program {program.name}", slow=True)
      with self._paused():
        concurrent.futures.wait([compiled])
    return program, compiled.result()
