"""Worker processes: an item that fails in any way does not disturb the others."""

import os
import signal
import time

from data.prepare import steps, workers
from data.video import Away, BadVideo


def test_time_limits_follow_the_file_size(tmp_path):
  (tmp_path / "a").write_bytes(b"x" * 3000)
  rows = [{"path": str(tmp_path / "a")}, {"path": "/nowhere"}, {"path": "/b", "bytes": 5}]
  assert steps.sizes_of(rows) == [3000, None, 5]
  context = steps.Context("", "")
  context.pool = workers.Pool(1)
  seen = []
  context.pool.map = lambda function, items, *, sizes, progress: seen.append(sizes)
  context.map(None, [[row] for row in rows])
  assert seen == [[3000, 0, 5]]


def behave(item, report):
  """In a worker: behaves as the item says."""
  kind, value = item
  if kind == "bad":
    raise BadVideo("bad\nfile")
  if kind == "passing":
    raise workers.Passing("no answer")
  if kind == "sleep":
    time.sleep(value)
  if kind == "memory":
    return len(bytes(value))
  if kind == "signal":
    os.kill(os.getpid(), value)
  if kind == "once":  # dies the first time
    try:
      os.close(os.open(value, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
      return "second"
    os.kill(os.getpid(), signal.SIGKILL)
  if kind == "odd":
    raise RuntimeError("what is this")
  if kind == "away":
    raise Away("no such file")
  if kind == "damaged":  # Pillow's message for a damaged image
    raise OSError("image file is truncated")
  return value


def test_workers_survive_every_failure(tmp_path):
  items = [("ok", 1), ("bad", 0), ("passing", 0), ("sleep", 60), ("memory", 1 << 30), ("signal", signal.SIGSEGV),
           ("signal", signal.SIGKILL), ("once", str(tmp_path / "mark")), ("odd", 0), ("ok", 2),
           ("away", 0), ("damaged", 0)]  # fmt: skip
  seen = []
  with workers.Pool(2, workers.Limits(seconds=2.0, memory_gb=0.5)) as pool:
    results = pool.map(behave, items, progress=seen.append)
  reasons = [r.reason if isinstance(r, workers.Failure) else r for r in results]
  assert reasons[0] == 1 and reasons[7] == "second" and reasons[9] == 2  # noqa: PT018
  assert reasons[1] == "bad file"
  assert reasons[3].startswith("took longer than")
  assert reasons[4].startswith("needs more memory")
  assert reasons[5].startswith("the decoder crashed (SIGSEGV)")
  assert reasons[6].startswith("killed")
  assert reasons[8] == "RuntimeError: what is this"
  retried = [r.retry for r in results if isinstance(r, workers.Failure)]
  assert retried == [False, True, False, False, False, True, False, True, False]
  assert seen[-1] == len(items)
