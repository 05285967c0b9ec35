"""Makes faults in real trainings and prints what becomes of them: exit codes, restarts, steps that run twice, final bits.

  python -m tests.long.faults [--quick] [--only NAME ...] [--folder DIR]

Every run is `python -m stdit_jax.train` below launch/supervise.sh. Its final parameters and averages are compared with
those of an undisturbed run. Clips come from the disk, or from a stand-in of Cloud Storage on this machine that fails or
hangs. Full disks are small ones (tmpfs), which the program mounts where nobody else sees them. Only `Core halted` needs a
patch, of the function that makes the compiled update of the real command.

In column `exit codes`, a comma is a restart by the supervisor, a slash a start by a person who removed the cause, and a plus
joins two processes. Exit code 1: a row differs from what is expected.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable

import jax
import numpy as np

from stdit_jax.training.checkpoints import load_weights
from tests.long.supervised import EVERY, STEPS, Bench, Refusals, Run, children, own_mounts, small_disk
from tests.object_store import BUCKET
from tests.training import test_resume

# Raises JAX's error in the fifth update of the first start. The first argument names a file that marks the first start.
HALT = """
import pathlib, sys
import jax
from stdit_jax import train
from stdit_jax.training.stage_programs import StagePrograms

mark, made, calls = pathlib.Path(sys.argv.pop(1)), StagePrograms.update, []

def update(self):
  program = made(self)
  def step(*arguments):
    calls.append(1)
    if len(calls) == 5 and not mark.exists():
      mark.touch()
      raise jax.errors.JaxRuntimeError("INTERNAL: Core halted unexpectedly")
    return program(*arguments)
  return step

StagePrograms.update = update
train.main()
"""


def in_bucket(bench: Bench, name: str, **changes) -> Run:
  """A run with its clips in the bucket."""
  bench.store.copy_in(bench.folder / "assets", name)
  return Run(bench, name, assets=f"gs://{BUCKET}/{name}", **changes)


# ------------------------------------------------------------------------------------------------------------------- rows


def alone(bench, name):
  return Run(bench, name)


def two_alone(bench, name):
  return Run(bench, name, count=2)


def one_missing(bench, name):
  made = in_bucket(bench, name)
  bench.store.refuse.rules[f"/o/{name}/3.mp4"] = lambda: 404
  return made


def unshared_folder(bench, name):
  run = Run(bench, name, count=2, output="run")
  run.places = [run.folder / "a", run.folder / "b"]
  for place in run.places:
    place.mkdir()
  run.start().wait()
  run.places = [run.folder] * 2
  return run.start().wait()


def fails_for(bench, name, seconds, status=503):
  """Seconds 0: one request fails."""
  run, rules, failed = in_bucket(bench, name), bench.store.refuse.rules, []
  run.start().until_step(2)

  def rule():
    failed.append(time.monotonic())
    if time.monotonic() - failed[0] >= seconds:
      rules.pop(f"/o/{name}/", None)
    return status

  rules[f"/o/{name}/"] = rule
  run.wait()
  assert failed, "no request came"
  return run


def fails_once(bench, name):
  return fails_for(bench, name, 0)


def fails_for_a_minute(bench, name):
  return fails_for(bench, name, 10 if bench.quick else 60)


def fails_always(bench, name):
  """gcsfs itself retries 503 for half a minute, but not 507."""
  run, rules = in_bucket(bench, name), bench.store.refuse.rules
  run.start().until_step(2)
  rules[f"/o/{name}/"] = lambda: 507 if bench.quick else 503
  run.until_restart(2)
  del rules[f"/o/{name}/"]
  return run.wait()


def hang(bench, name, part, **changes):
  run, free = in_bucket(bench, name, data__row_timeout=3.0, **changes), threading.Event()
  return run, lambda: bench.store.refuse.rules.update({f"/o/{name}/{part}": lambda: free.wait() and None}), free


def a_row_hangs(bench, name):
  run, begin, free = hang(bench, name, "3.mp4")
  begin()
  run.start().wait()
  free.set()
  return run


def all_rows_hang(bench, name):
  run, begin, free = hang(bench, name, "")
  run.start().until_step(3)
  begin()
  run.until(lambda: "starting again" in run.text() or run.processes[0].poll() is not None, "the end of a start")
  free.set()
  run.wait()
  return run if run.codes[-1].endswith("0") else run.start().wait()


def full_at_a_checkpoint(bench, name):
  run, reference = Run(bench, name), bench.undisturbed("alone", alone)
  size = sum(p.stat().st_size for p in (reference / "checkpoints" / str(STEPS)).rglob("*") if p.is_file())
  make_room = small_disk(run.output / "checkpoints", 3 * size // 2)
  run.start().wait()
  make_room()
  return run.start().wait()


def full_in(bench, name, folder, **changes):
  """`folder` of the run is on a disk of one block. The run has a config.json, as if it had been stopped at its start."""
  run, reference = Run(bench, name, **changes), bench.undisturbed("alone", alone)
  run.output.mkdir()
  (run.output / "config.json").write_bytes((reference / "config.json").read_bytes())
  make_room = small_disk(run.output / folder, 4096)
  run.start().wait()
  make_room()
  return run.start().wait()


def full_at_a_sample(bench, name):
  return full_in(bench, name, "samples", sample_every=5)


def full_at_the_metrics(bench, name):
  return full_in(bench, name, "tensorboard")


def worker_killed(bench, name, count=1):
  run = Run(bench, name, count, data__workers=1, watchdog={"timeout": 20.0, "slow_timeout": 300.0})
  run.start().until_step(3)
  (worker,) = [pid for pid in children(run.training(count - 1)) if is_worker(pid)]
  os.kill(worker, signal.SIGKILL)
  return run.wait()


def is_worker(pid):
  with contextlib.suppress(OSError):
    return b"spawn_main" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
  return False


def process_killed(bench, name, count=1):
  run = Run(bench, name, count, watchdog={"timeout": 20.0, "slow_timeout": 300.0})
  run.start().until_step(5)
  os.kill(run.training(count - 1), signal.SIGKILL)
  return run.wait()


def core_halted(bench, name):
  run = Run(bench, name)
  return run.start(("-c", HALT, str(run.folder / "halted"))).wait()


def sigterm_during_a_save(bench, name, count=1):
  run = Run(bench, name, count)
  run.start().until_step(3).until(lambda: test_resume.writes_a_checkpoint(run.output), "a save")
  os.kill(run.training(count - 1), signal.SIGTERM)
  return run.wait()


@dataclasses.dataclass(frozen=True)
class Row:
  """A fault and what is expected of it."""

  fault: str
  run: Callable
  codes: str  # a regular expression
  lost: int  # the most steps that may run twice
  reference: tuple = ("alone", alone)
  long: bool = False  # skipped by --quick


def of_two(function):
  return lambda bench, name: function(bench, name, count=2)


TWO = ("two-alone", two_alone)
ROWS = (
  Row("folder not shared", unshared_folder, r"2\+2 / 0\+0", 0, TWO),
  Row("EIO once", fails_once, "0", 0),
  Row("EIO for a minute", fails_for_a_minute, "0", 0),
  Row("EIO in every call", fails_always, "75(,75)+,0", EVERY),
  Row("one row hangs", a_row_hangs, "0", 0, ("one-missing", one_missing)),
  Row("all rows hang", all_rows_hang, "75,0", EVERY),
  Row("disk full at a checkpoint", full_at_a_checkpoint, "2 / 0", 2 * EVERY),
  Row("disk full at a sample", full_at_a_sample, "2 / 0", EVERY),
  Row("disk full at the metrics", full_at_the_metrics, "2 / 0", 2 * EVERY),
  Row("worker killed", worker_killed, "75,0", EVERY),
  Row("process killed", process_killed, "137,0", 2 * EVERY),
  Row("Core halted", core_halted, "75,0", EVERY),
  Row("SIGTERM during a save", sigterm_during_a_save, "75,0", 0),
  Row("worker of one of two killed", of_two(worker_killed), r"(75,)+0\+(75,)+0", EVERY, TWO, long=True),
  Row("one of two killed", of_two(process_killed), r"(75,)+0\+137,(75,)*0", 2 * EVERY, TWO, long=True),
  Row("SIGTERM to one of two during a save", of_two(sigterm_during_a_save), r"75,0\+75,0", 0, TWO, long=True),
)


def weights(output: pathlib.Path) -> dict[str, bytes]:
  """The final parameters and averages of a run."""
  found = {item: load_weights(output, item, STEPS)[0] for item in ("params", "ema")}
  return {jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in jax.tree_util.tree_flatten_with_path(found)[0]}


def try_row(bench: Bench, row: Row) -> tuple[list[str], bool]:
  """(the cells of a row, whether all is as expected)."""
  began, name = time.monotonic(), row.fault.replace(" ", "-")
  try:
    run = row.run(bench, name)
  except Exception as error:
    text = f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"
    return [row.fault, text, "", "", "no", f"failed after {time.monotonic() - began:.0f} s"], False
  finally:
    for run in [run for run in bench.runs if run.folder.name == name]:
      run.kill()
  codes, lost = " / ".join(run.codes), run.lost()
  try:
    alone, other = weights(bench.undisturbed(*row.reference)), weights(run.output)
    wrong = [name for name in alone if alone[name] != other[name]]
    same = f"other bits in {len(wrong)} of {len(alone)} arrays" if wrong else "same bits"
  except Exception as error:  # also a missing checkpoint
    same = f"no weights ({' '.join(str(error).split())[:100]})"
  right = re.fullmatch(row.codes, codes) is not None and lost <= row.lost and same == "same bits"
  expected = "as expected" if right else f"expected {row.codes}, at most {row.lost} lost, same bits"
  return [row.fault, codes, str(codes.count(",")), str(lost), same, expected, f"{time.monotonic() - began:.0f} s"], right


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument(
    "--quick",
    action="store_true",
    help="under five minutes: skips the rows of two processes except 'folder not shared'; EIO lasts 10 s",
  )
  parser.add_argument("--only", nargs="+", metavar="NAME", help="only faults whose names contain one of these words")
  parser.add_argument("--jobs", type=int, default=2, help="rows at a time (default: %(default)s)")
  parser.add_argument("--folder", type=pathlib.Path, help="new folder, which stays (default: a temporary folder)")
  arguments = parser.parse_args()
  own_mounts()
  jax.config.update("jax_platforms", "cpu")
  began, folder = time.monotonic(), arguments.folder or pathlib.Path(tempfile.mkdtemp(prefix="faults-"))
  rows = [row for row in ROWS if not (arguments.quick and row.long)]
  rows = [row for row in rows if not arguments.only or any(name in row.fault for name in arguments.only)]
  bench = Bench(folder, arguments.quick)
  Refusals(bench.store)
  bench.undisturbed("alone", alone)  # alone, since it compiles what the others then find in the cache
  with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
    list(pool.map(lambda reference: bench.undisturbed(*reference), {row.reference for row in rows}))
  print(f"{len(bench.references)} undisturbed runs after {time.monotonic() - began:.0f} s; logs are in {folder}", flush=True)
  print("fault | exit codes | restarts | steps lost | bits | expected | time")
  with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
    right = []
    for future in concurrent.futures.as_completed([pool.submit(try_row, bench, row) for row in rows]):
      cells, as_expected = future.result()
      right.append(as_expected)
      print(f"{len(right)}/{len(rows)}  {' | '.join(cells)}", flush=True)
  print(f"{sum(right)} of {len(rows)} rows as expected after {time.monotonic() - began:.0f} s")
  raise SystemExit(not all(right))


if __name__ == "__main__":
  main()
