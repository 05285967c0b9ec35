"""Programs compiled ahead: traced and lowered in the main thread in the order of need, compiled in threads beside training.

Lowering belongs to the main thread, where JAX's context is (`jax.set_mesh` is of one thread); compiling releases the GIL and
needs nothing of it. The persistent cache makes a restart read what the first start compiled.
"""

import concurrent.futures
import threading
import time

import jax

_HIT = "/jax/compilation_cache/cache_hits"
_here = threading.local()  # whether the last compilation of this thread came from the cache


def _note(event, **_):
  if event == _HIT:
    _here.hit = True


jax.monitoring.register_event_listener(_note)  # JAX calls it in the thread that compiles


class AheadOfTime:
  """Compiled programs by name.

  Args:
    threads: how many compile at a time.
    say: prints one line per program, and one about all.
  """

  def __init__(self, threads, say):
    self._threads, self._say, self._pool = threads, say, None
    self._lock = threading.Lock()
    self._programs, self._open, self._hits, self._seconds = {}, 0, 0, 0.0

  def __contains__(self, name):
    return name in self._programs

  def add(self, name, program, *shapes):
    """Traces and lowers a jitted `program` for arguments of these shapes now, and has it compiled in the background."""
    if self._pool is None:
      self._pool = concurrent.futures.ThreadPoolExecutor(self._threads, "compilation")
    lowered = program.lower(*shapes)
    with self._lock:
      self._open += 1
    self._programs[name] = self._pool.submit(self._compile, name, lowered)

  def ready(self, name):
    """Whether `get` returns at once."""
    return self._programs[name].done()

  def get(self, name):
    """The compiled program; waits for it. Raises what the compiler raised."""
    return self._programs[name].result()

  def _compile(self, name, lowered):
    _here.hit, began = False, time.monotonic()
    compiled = lowered.compile()
    seconds = time.monotonic() - began
    with self._lock:
      self._open -= 1
      self._hits += _here.hit
      self._seconds += seconds
      done, hits, total, left = len(self._programs) - self._open, self._hits, self._seconds, self._open
    self._say(f"{name}: {'from the compilation cache' if _here.hit else 'compiled'} in {seconds:.1f} s")
    if not left:
      self._say(f"{done} programs are ready: {hits} from the cache, {done - hits} compiled; {total:.1f} s in all")
    return compiled

  def close(self):
    """Gives up what has not begun to compile."""
    if self._pool is not None:
      self._pool.shutdown(wait=False, cancel_futures=True)
