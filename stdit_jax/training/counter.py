"""Counts the programs that JAX compiles, from JAX's own events."""

import collections
import threading
from collections.abc import Callable

import jax

_COMPILED, _HIT = "/jax/core/compile/backend_compile_duration", "/jax/compilation_cache/cache_hits"
_lock, _here = threading.Lock(), threading.local()  # flags of the thread's program
_requests = collections.Counter()  # of each function name, in threads that belong to no counter


def _note_hit(event, **_):
  if event == _HIT:
    _here.hit = True


def _note_program(event, duration_secs, **values):
  """JAX calls it in the thread that compiles, after a program was compiled or read from JAX's cache."""
  if event == _COMPILED:
    name, hit = str(values.get("fun_name", "")), getattr(_here, "hit", False)
    name = name.removeprefix("jit(").removesuffix(")")
    _here.hit, _here.cached = False, hit
    with _lock:
      getattr(_here, "requests", _requests)[name] += 1


jax.monitoring.register_event_listener(_note_hit)
jax.monitoring.register_event_duration_secs_listener(_note_program)


def was_cached() -> bool:
  """Whether the last program of this thread came from JAX's cache."""
  return getattr(_here, "cached", False)


class CompileCounter:
  """Counts how often the programs of each name are compiled or read from JAX's cache: at most once for each program.

  A second time means that shapes, dtypes or devices changed, or that one program is compiled for each device. Programs of
  several stages may share a name. If they are equal, JAX's cache then finds the program of the other stage.
  """

  def __init__(self):
    self._before, self._programs, self._of_threads = {}, collections.Counter(), collections.Counter()

  def take_thread(self) -> None:
    """Counts the programs of this thread for this counter alone. Another run of the process may have the same names."""
    _here.requests = self._of_threads

  def counted(self, name: str, function: Callable) -> Callable:
    """`function` under another name. JAX reports its programs by this name."""

    def named(*args):
      return function(*args)

    named.__name__ = named.__qualname__ = name
    self.expect(name)
    return named

  def expect(self, name: str) -> None:
    """Counts one more program of this name."""
    self._before.setdefault(name, _requests[name])
    self._programs[name] += 1

  @property
  def counts(self) -> dict[str, int]:
    """{name: how often its programs were compiled or read}."""
    with _lock:
      return {name: self._of_threads[name] + _requests[name] - before for name, before in self._before.items()}

  def check(self) -> None:
    """Raises RuntimeError if a program was compiled more than once."""
    if again := {name: n for name, n in self.counts.items() if n > self._programs[name]}:
      raise RuntimeError(f"programs were compiled more than once (shapes, dtypes or devices changed between steps): {again}")
