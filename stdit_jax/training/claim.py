"""One training per run folder: two that write the same checkpoints would make both worthless.

The first process of a run notes in `<output>/running.json` who it is, with a count that goes on every few seconds. Who finds
such a note asks, on the same machine, whether that process lives; of another machine, or in another container, it watches the
count for a while. What was killed counts no more, so nothing has to be cleaned up, and clocks of two machines are never
compared. It works on any disk and in a bucket; who began at the very same moment, or slept so long that another took the
folder, sees it at the next count and ends.
"""

import contextlib
import json
import os
import pathlib
import socket
import threading
import time
import uuid

from data import paths

NAME = "running.json"
PERIOD = 10.0  # seconds from count to count; a bucket takes one write of the same object a second
SILENT, PATIENCE = 3, 6  # periods without a count after which nobody is there; those after which one that counts stays


def _say(text):
  print(text, flush=True)


@contextlib.contextmanager
def claim(folder, taken, period=PERIOD, say=_say):
  """Holds a run folder for this process while the block runs.

  Args:
    folder: of the run, on a disk or in a bucket.
    taken: called with one line, in another thread, when another process has taken the folder nevertheless.
    say: called with what it waits for.

  Raises ValueError when a process is training there. One of another machine that ends within a minute is waited for: it may
  have been told to stop, and this be the one that goes on in its place.
  """
  path = paths.join(folder, NAME)
  own = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "machine": _machine(), "process": os.getpid()}
  own["began"] = _began(os.getpid())
  _wait_until_free(path, period, say)
  stopped = threading.Event()

  def count():
    number = 0
    while not stopped.wait(period):
      number += 1
      with contextlib.suppress(OSError):  # a full disk or a bucket out of reach shows in the run itself
        if (found := _read(path)) and found["id"] != own["id"]:
          taken(f"{folder} is another's now: {_name(found)} trains there")
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


def _wait_until_free(path, period, say):
  """Returns when nobody counts in the note at `path`, and raises ValueError when somebody goes on."""
  found = _read(path)
  if found and found["machine"] == _machine():
    began = _began(found["process"])
    if began is not None and began == found["began"]:
      raise ValueError(_refusal(path, found))
    return
  start = changed = time.monotonic()
  if found:
    say(f"{_name(found)} was training in {os.path.dirname(path)}; waiting for {SILENT * period:.0f} s whether it still does")
  while found and time.monotonic() - changed < SILENT * period:
    if time.monotonic() - start > PATIENCE * period:
      raise ValueError(_refusal(path, found))
    time.sleep(period / 5)
    before, found = found, _read(path)
    changed = time.monotonic() if found != before else changed


def _read(path):
  """What a note says, None where there is none that can be understood."""
  try:
    found = json.loads(paths.read_text(path))
    return {key: found[key] for key in ("id", "host", "machine", "process", "began", "count")}
  except (FileNotFoundError, ValueError, TypeError, KeyError):
    return None


def _machine():
  """What processes have in common that see each other's numbers: a start of a system, and there a container; or a random text
  where neither can be known, so that nobody is taken for one of them."""
  try:
    start = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{start} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return uuid.uuid4().hex


def _began(process):
  """When a process of this machine began, None if it has ended. Numbers of processes come again; this tells them apart."""
  try:
    state, *rest = pathlib.Path(f"/proc/{int(process)}/stat").read_text().rpartition(")")[2].split()
  except (OSError, ValueError):
    return None
  return None if state in "ZX" else rest[18]


def _name(found):
  return f"process {found['process']} on {found['host']}"


def _refusal(path, found):
  folder = os.path.dirname(path)
  return (
    f"config: output={folder!r}: {_name(found)} is training in this folder, as its {NAME} says; stop it first, or give another "
    "folder"
  )
