"""Decodes rows in advance, in the order of the plan, in worker processes or threads.

Rows differ in size: a clip of 360p x 408 has 282 MB, an image of 144p 0.1 MB. So bytes limit the rows ahead, not their number.
grain runs the processes and counts elements. An element is a *group* of consecutive rows of one step, up to 16 MB, so that
small rows do not travel one by one. Before a process decodes a group, it waits until the bytes ahead leave room (`_Gate`). So
any number of processes keeps the limit. The next group is always allowed.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import shared_memory
from typing import Any

import numpy as np

from data.config import DataConfig
from data.groups import Source

_ENDLESS = 1 << 40  # length of an endless source; grain requires a length
_GROUP_BYTES = 16 << 20  # of a group; larger groups cost no less per byte
_STEPS, _USUAL_BYTES = 8, 4 << 30  # the bytes ahead: those of 8 steps, but not more than 4 GiB
_MEMORY_SHARE = 0.25  # of the free memory: the batches, other caches and the files that the system caches need the rest
_CACHE_WORKERS = 16  # processes that read a cache: a core reads hundreds of rows a second, a video a few
_MOST_GROUPS = 256  # groups ahead, so that small steps are not read hours ahead
_POLL = 0.02  # seconds between two looks at the room ahead


@dataclasses.dataclass(frozen=True)
class Ahead:
  """How far a process reads ahead. `str(ahead)` says it.

  Attributes:
    workers: number of worker processes; 0: `threads` threads.
    room: the most that is decoded, or being decoded, and not yet taken: bytes, or rows if `in_rows`.
    weights: bytes of a row of each kind (bucket); 1 if `in_rows`.
    groups: rows of a group of each kind.
    names: names of the kinds; "" for a kind that is not in use.
  """

  workers: int
  threads: int
  room: int
  in_rows: bool
  weights: tuple[int, ...]
  groups: tuple[int, ...]
  names: tuple[str, ...]

  @classmethod
  def of(
    cls, config: DataConfig, row_bytes: Sequence[int], rows: Sequence[int], names: Sequence[str], cached: bool = False
  ) -> "Ahead":
    """Chooses the numbers that the configuration leaves open.

    Two steps must fit, so that one is complete while the training takes the other. Eight steps, up to 4 GiB, are better: they
    outlast a pause of the storage. Free memory is the limit.

    Args:
      row_bytes: about the bytes of a decoded row of each kind.
      rows: rows of a step that this process reads; 0: the kind is not in use.
      cached: the rows come from a cache of latents.
    """
    cpus = usable_cpus()
    workers = min(max(1, cpus * 7 // 8), _CACHE_WORKERS if cached else cpus) if config.workers is None else config.workers
    step = max(n * size for n, size in zip(rows, row_bytes))
    room = min(max(2 * step, min(_STEPS * step, _USUAL_BYTES)), int(_MEMORY_SHARE * free_memory(bool(workers))))
    most = min(_GROUP_BYTES, room // (4 * (workers or cpus)))  # several groups for every worker
    groups = [max(1, min(n, most // max(size, 1))) for n, size in zip(rows, row_bytes)]
    if config.read_ahead:
      room = config.read_ahead
      groups = [min(n, max(1, room // (2 * (workers or cpus)))) for n in groups]
    groups = [-(-n // -(-n // size)) if n else 1 for n, size in zip(rows, groups)]  # equal parts of a step
    weights = tuple(1 if config.read_ahead else max(1, size) for size in row_bytes)
    if config.workers is None:  # more workers than groups would have nothing to do
      workers = min(workers, max(1, *(-(-room // (n * size)) for n, size, used in zip(groups, weights, rows) if used)))
    used = tuple(name if n else "" for name, n in zip(names, rows))
    return cls(workers, cpus, room, bool(config.read_ahead), weights, tuple(groups), used)

  @property
  def amount(self) -> str:
    if self.in_rows:
      return f"{self.room} rows"
    return f"{self.room / 1e9:.3g} GB" if self.room >= 1e9 else f"{self.room / 1e6:.3g} MB"

  def __str__(self):
    who = f"{self.workers} worker process{'es' * (self.workers > 1)}" if self.workers else f"up to {self.threads} threads"
    counts = sorted((max(1, self.room // weight), name) for weight, name in zip(self.weights, self.names) if name)
    (least, first), (most, last) = counts[0], counts[-1]
    rows = f" ({least:,} rows of {first} to {most:,} of {last})" if least < most else f" ({least:,} rows of {first})"
    rows = "" if self.in_rows else rows
    return f"{who}, at most {self.amount} ahead{rows}"


def usable_cpus() -> int:
  """Number of the CPUs that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int | None:
  """Bytes of this machine's memory that programs can still take; None if unknown."""
  with contextlib.suppress(OSError), open("/proc/meminfo") as f:
    return next((int(line.split()[1]) << 10 for line in f if line.startswith("MemAvailable")), None)
  return None


def free_memory(shared: bool) -> int:
  """Bytes of memory that programs can still take. `shared`: as shared memory, which a container may limit to less."""
  free = available_memory() or 4 * _USUAL_BYTES
  with contextlib.suppress(OSError):
    place = os.statvfs("/dev/shm")
    free = min(free, place.f_bavail * place.f_frsize) if shared else free
  return free


class Rows(Iterator[dict]):
  """Iterator of decoded rows. Close it."""

  def __init__(self, source: Source, decode: Callable[[Any], dict], ahead: Ahead):
    self._groups = (_Processes if ahead.workers else _Threads)(source, decode, ahead)
    self._rows = iter(())

  def __next__(self) -> dict:
    while (row := next(self._rows, None)) is None:
      if not (rows := next(self._groups)):
        raise StopIteration
      self._rows = iter(rows)
    return row

  def close(self) -> None:
    self._groups.close()


class _Threads:
  """Decodes groups in threads of this process."""

  def __init__(self, source, decode, ahead):
    self._source, self._decode, self._room = source, decode, ahead.room
    self._pool = concurrent.futures.ThreadPoolExecutor(ahead.threads)
    self._pending, self._number = collections.deque(), 0  # (end, future of the rows) of groups; number of the next group

  def __next__(self):
    self._submit(self._pending[0][0] if self._pending else 0)
    _, future = self._pending.popleft()
    return future.result()

  def _submit(self, taken):
    """Starts groups while they have room. `taken`: weight of all groups up to the one that is taken now."""
    while len(self._pending) < _MOST_GROUPS:
      begin, weight = self._source.place(self._number)
      if self._pending and begin + weight - taken > self._room:
        return
      self._pending.append((begin + weight, self._pool.submit(self._group, self._number)))
      self._number += 1

  def _group(self, number):
    return [self._decode(row) for row in self._source[number]]

  def close(self):
    self._pool.shutdown(wait=False, cancel_futures=True)


class _Processes:
  """Decodes groups in worker processes of grain."""

  def __init__(self, source, decode, ahead):
    import grain  # takes seconds, since it imports jax
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain reads absl flags, but a library's user may never call app.run
      flags.FLAGS.mark_as_parsed()
    self._source, self._number, self._gate = source, 0, _Gate(ahead.room)
    # A worker that waits at the gate does not see that grain stops it. So the gate closes first, also at the program's end.
    self._closing = weakref.finalize(self, self._gate.close)
    groups = grain.MapDataset.source(_Numbers()).map(functools.partial(_packed_group, source, decode, self._gate))
    dataset = groups.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    # grain holds this number of elements twice, in a queue and in a thread.
    each = -(-_MOST_GROUPS // (2 * ahead.workers))
    options = grain.MultiprocessingOptions(num_workers=ahead.workers, per_worker_buffer_size=each)
    self._elements = iter(dataset.mp_prefetch(options, worker_init_fn=_end_with_parent))

  def __next__(self):
    element = next(self._elements)
    self._gate.take(sum(self._source.place(self._number)))
    self._number += 1
    return _unpack(element)

  def close(self):
    self._closing()
    self._elements.close()


class _Numbers:
  """0, 1, 2, ... as a source for grain."""

  def __len__(self):
    return _ENDLESS

  def __getitem__(self, index):
    return index


class _Gate:
  """Keeps workers at most `room` ahead of their reader. It is a number in shared memory: the weight that the reader has taken.

  Picklable: workers open the memory by its name.
  """

  def __init__(self, room, name=None):
    self.room = room
    self._memory: Any = shared_memory.SharedMemory(name, create=name is None, size=8)

  def __reduce__(self):
    return _Gate, (self.room, self._memory.name)

  def take(self, end):
    """Tells the workers that the reader has taken everything before `end`. -1 closes the gate."""
    self._memory.buf[:8] = end.to_bytes(8, "little", signed=True)  # one store: workers never read a half-written number

  def wait(self, begin, weight):
    """Waits until a group has room. The next group always has. Returns False if the gate was closed."""
    while (taken := int.from_bytes(self._memory.buf[:8], "little", signed=True)) >= 0:
      if begin <= taken or begin + weight - taken <= self.room:
        return True
      time.sleep(_POLL)
    return False

  def close(self):
    """Closes the gate for all processes. Only its maker calls this method."""
    self.take(-1)
    self._memory.close()
    self._memory.unlink()


def _packed_group(source, decode, gate, number):
  if not gate.wait(*source.place(number)):
    return _pack([])
  return _pack([decode(row) for row in source[number]])


_ALIGNMENT = 64  # bytes


def _pack(rows):
  """Rows as JSON and one array with the values of all arrays. grain would put each array into a shared memory of its own."""
  arrays, begin = [], 0

  def plain(value):  # json calls it for the values that it does not know
    nonlocal begin
    if isinstance(value, np.generic):
      return value.item()
    arrays.append((begin, np.ascontiguousarray(value)))
    begin += -(-value.nbytes // _ALIGNMENT) * _ALIGNMENT
    return {"array": arrays[-1][0], "dtype": value.dtype.name, "shape": value.shape}

  text = json.dumps(rows, default=plain)
  packed = np.empty(begin, np.uint8)
  for start, value in arrays:
    packed[start : start + value.nbytes] = value.reshape(-1).view(np.uint8)
  return {"rows": text, "packed": packed}


def _unpack(element):
  """The rows of `_pack`. Their arrays are views of the packed one. Tuples are lists."""
  packed = element["packed"]

  def restore(values):
    if values.keys() != {"array", "dtype", "shape"}:
      return values
    dtype, shape = np.dtype(values["dtype"]), values["shape"]
    return packed[values["array"] :][: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)

  return json.loads(element["rows"], object_hook=restore)


def _end_with_parent(*_):
  """Ends this worker process when its parent ends. Otherwise the workers of a killed training keep their memory for ever."""

  def watch(parent):
    parent.join()
    os._exit(1)

  if parent := multiprocessing.parent_process():
    threading.Thread(target=watch, args=(parent,), daemon=True).start()
