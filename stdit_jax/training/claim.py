"""Allows one training per run folder. Two trainings would overwrite each other's checkpoints.

The first process of a run writes its identity and a counter to `<output>/running.json`. It increases the counter every few
seconds. A second training finds this note. On the same machine it asks the system whether the process is alive. From another
machine or container it watches the counter for a while.

A killed training stops counting, so it does not block the next one. Clocks of two machines are never compared. The note works
on any disk and in a storage bucket. If two trainings start at the same moment, one of them exits at its next count. A
suspended training also exits if another training has taken its folder meanwhile.
"""

import contextlib
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from data import paths

NAME = "running.json"
PERIOD = 10.0  # seconds between counts; a storage bucket allows one write of an object per second
SILENT = 3  # periods without a count before a holder is considered dead
PATIENCE = 6  # periods to wait for a live holder to end before the new training is refused


@contextlib.contextmanager
def claim(folder: str, taken: Callable, period: float = PERIOD) -> Iterator[None]:
  """Holds a run folder for this process while the block runs.

  `claim` waits up to PATIENCE periods for a holder on another machine, because this process may be its replacement.

  Args:
    folder: the run's folder, on a disk or in a storage bucket.
    taken: called with one line, in another thread, if another process has taken the folder meanwhile.

  Raises:
    ValueError: another process is training in the folder.
  """
  path = paths.join(folder, NAME)
  own = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "machine": _machine(), "process": os.getpid()}
  own["began"] = _began(os.getpid())
  _wait_until_free(path, period)
  stopped = threading.Event()

  def count():
    number = 0
    while not stopped.wait(period):
      number += 1
      with contextlib.suppress(OSError):  # the run itself reports a full disk or an unreachable bucket
        if (found := _read(path)) and found["id"] != own["id"]:
          taken(f"{folder}: {_name(found)} took this folder and trains in it")
          return
        paths.write_text(path, json.dumps({**own, "count": number}))

  paths.write_text(path, json.dumps({**own, "count": 0}))
  thread = threading.Thread(target=count, name="claim", daemon=True)
  thread.start()
  try:
    yield
  finally:
    stopped.set()
    thread.join()
    with contextlib.suppress(OSError):
      if (found := _read(path)) and found["id"] == own["id"]:
        paths.remove(path)


def holder(folder: str) -> str:
  """Identity of the training that holds a run folder, "" if there is none."""
  found = _read(paths.join(folder, NAME))
  return found["id"] if found else ""


def _wait_until_free(path, period):
  """Returns when no live process holds the folder. Raises ValueError if one does.

  It waits only for a process on another machine, at most PATIENCE periods.
  """
  found = _read(path)
  if found and found["machine"] == _machine():
    if found["began"] is not None and _began(found["process"]) == found["began"]:
      raise ValueError(_refusal(path, found))
    return
  start = changed = time.monotonic()
  if found:
    wait = f"waiting {SILENT * period:.0f} s to see if it still is"
    print(f"{_name(found)} was training in {os.path.dirname(path)}; {wait}", flush=True)
  while found and time.monotonic() - changed < SILENT * period:
    if time.monotonic() - start > PATIENCE * period:
      raise ValueError(_refusal(path, found))
    time.sleep(period / 5)
    before, found = found, _read(path)
    changed = time.monotonic() if found != before else changed


def _read(path):
  """The content of the note at `path`. None if the note does not exist or cannot be parsed."""
  try:
    found = json.loads(paths.read_text(path))
    return {key: found[key] for key in ("id", "host", "machine", "process", "began", "count")}
  except (FileNotFoundError, ValueError, TypeError, KeyError):
    return None


def _machine():
  """The boot and the container of this process. Processes with the same value see each other's process ids.

  If the system does not tell them, the value is random, so that no other process has the same value.
  """
  try:
    start = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{start} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return uuid.uuid4().hex


def _began(process):
  """Start time of a process on this machine, None if it has ended. It distinguishes processes that reuse an id."""
  try:
    state, *rest = pathlib.Path(f"/proc/{int(process)}/stat").read_text().rpartition(")")[2].split()
  except (OSError, ValueError):
    return None
  return None if state in "ZX" else rest[18]


def _name(found):
  return f"process {found['process']} on {found['host']}"


def _refusal(path, found):
  training = f"{_name(found)} is training in this folder, as its {NAME} says"
  return f"config: output={os.path.dirname(path)!r}: {training}. Stop that training, or give another folder"
