"""Trainings below launch/supervise.sh, for `tests.long.faults`: their exit codes, repeated steps and small disks."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from tests import QUICK_FLAGS, tiny_run
from tests.object_store import ObjectStore
from tests.training import test_resume

STEPS, EVERY = 12, 2  # of each run; between checkpoints


class Bench:
  """The assets, the compilation cache and the stand-in of Cloud Storage that all rows share."""

  def __init__(self, folder: pathlib.Path, quick: bool):
    self.folder, self.quick, self.store = folder, quick, ObjectStore()
    (folder / "assets").mkdir(parents=True)
    tiny_run.make_assets(folder / "assets")
    self.references, self.runs = {}, []  # {name: run folder}; all runs

  def undisturbed(self, name: str, run: Callable) -> pathlib.Path:
    """The output folder of the run that `run(self, name)` makes. Makes it once."""
    if name not in self.references:
      made = run(self, name)
      made.end("0" if made.count == 1 else "0+0")
      self.references[name] = made.output
    return self.references[name]


class Run:
  """A run of `count` processes, each below a supervisor of its own.

  Attributes:
    output: folder of the run.
    codes: the exit codes so far, as in the table.
  """

  def __init__(self, bench: Bench, name: str, count: int = 1, assets: str = "", output: str = "", **changes):
    self.bench, self.count, self.codes, self.seen, self.processes = bench, count, [], [0] * count, []
    bench.runs.append(self)
    self.folder = bench.folder / name
    self.folder.mkdir()
    self.output, self.places = self.folder / "run", [self.folder] * count
    settings = {
      "stages": ({"name": "all", "steps": STEPS},),
      "checkpoint_every": EVERY,
      "keep_checkpoints": 2,
      "data__read_ahead": 2,  # rows; else all rows would be read before the fault begins
      **tiny_run.frozen_text(bench.folder / "assets", "ahead"),
      **changes,
    }
    # The rows of a table name their files relative to the table.
    settings["data__tables"] = f"{assets or bench.folder / 'assets'}/table.csv"
    self.config = tiny_run.write_config(self.folder / "config.py", bench.folder / "assets", output or self.output, **settings)
    self.logs = [self.folder / f"{i}.log" for i in range(count)]

  def start(self, program: tuple = ("-m", "stdit_jax.train")) -> "Run":
    """Starts all processes."""
    with socket.socket() as free:
      free.bind(("localhost", 0))
      port = free.getsockname()[1]
    self.processes = []
    for i in range(self.count):
      place = {"STDIT_JAX_COORDINATOR": f"localhost:{port}", "STDIT_JAX_NUM_PROCESSES": "2", "STDIT_JAX_PROCESS_ID": str(i)}
      own = tiny_run.environment(
        **self.bench.store.environment(),
        **(place if self.count > 1 else {}),
        STDIT_JAX_RESTART_WAIT="0",
        JAX_COMPILATION_CACHE_DIR=str(self.bench.folder / "xla"),
        XLA_FLAGS=QUICK_FLAGS,
      )
      command = ["bash", str(tiny_run.ROOT / "launch" / "supervise.sh"), sys.executable, *program, "--config", str(self.config)]
      with self.logs[i].open("a") as log:
        self.processes.append(subprocess.Popen(command, cwd=self.places[i], env=own, stdout=log, stderr=subprocess.STDOUT))
    return self

  def text(self, i: int = 0) -> str:
    return self.logs[i].read_text() if self.logs[i].exists() else ""

  def until(self, condition: Callable[[], object], what: str, seconds: float = 300) -> "Run":
    """Waits until a condition holds. Raises AssertionError if the run ends before."""
    end = time.monotonic() + seconds
    while not condition():
      assert all(p.poll() is None for p in self.processes), f"ended before {what}: {self.text()[-2000:]}"
      assert time.monotonic() < end, f"never {what}: {self.text()[-2000:]}"
      time.sleep(0.001)
    return self

  def until_step(self, step: int) -> "Run":
    return self.until(lambda: max(test_resume.metrics_steps(self.output), default=0) >= step, f"step {step}")

  def until_restart(self, number: int = 1) -> "Run":
    """Waits for a restart by the supervisor. While a bucket fails, each start retries for about four minutes."""
    return self.until(lambda: self.text().count("starting again") >= number, f"restart {number}", 1200)

  def training(self, i: int = 0) -> int:
    """Process id of the training below supervisor i."""
    return children(self.processes[i].pid)[0]

  def wait(self, seconds: float = 600) -> "Run":
    """Waits for the end of all processes, and notes their exit codes."""
    found = []
    for i, process in enumerate(self.processes):
      code, text = process.wait(seconds), self.text(i)
      found.append(",".join([*re.findall(r"ended with exit code (\d+): starting", text[self.seen[i] :]), str(code)]))
      self.seen[i] = len(text)
    self.codes.append("+".join(found))
    return self

  def kill(self) -> None:
    """Ends the supervisors and the trainings that still run."""
    for process in self.processes:
      for pid in [*children(process.pid), process.pid] if process.poll() is None else []:
        os.kill(pid, signal.SIGKILL)

  def end(self, codes: str) -> None:
    """Starts the run, and waits until it ends with these exit codes."""
    self.start().wait()
    assert self.codes[-1] == codes, (self.codes, self.text()[-3000:])

  def lost(self) -> int:
    """Number of optimizer steps that the run repeated."""
    last = lost = 0
    for first, step in re.findall(r"^(?:stage 'all': steps (\d+) to|step (\d+)/)", self.text(), re.MULTILINE):
      if first:
        lost += max(0, last - int(first))
      last = int(first or step)
    return lost


def children(parent: int) -> list[int]:
  """Process ids of the children of a process."""
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*"):
    with contextlib.suppress(OSError):
      if int((path / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
        found.append(int(path.name))
  return sorted(found)


def small_disk(folder: pathlib.Path, size: int) -> Callable[[], None]:
  """Mounts a disk of `size` bytes. Returns a function that makes room."""
  folder.mkdir(parents=True, exist_ok=True)
  subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
  return lambda: subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], check=True)


class Refusals:
  """`rules` maps a part of a request's path to a function that returns None or a status: see `ObjectStore.refuse`."""

  def __init__(self, store: ObjectStore):
    self.rules, store.refuse = {}, self

  def __call__(self, method: str, path: str, query: dict) -> int | None:
    for part, rule in list(self.rules.items()):
      if part in path:
        return rule()
    return None


def own_mounts() -> None:
  """Starts this program again in a mount namespace of its own, where it may mount disks. They end with it."""
  if os.environ.get("STDIT_JAX_OWN_MOUNTS"):
    return
  for how in (["--mount"], ["--user", "--map-root-user", "--mount"]):
    if not subprocess.run(["unshare", *how, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], stderr=subprocess.DEVNULL).returncode:
      os.environ["STDIT_JAX_OWN_MOUNTS"] = "1"
      os.execvp("unshare", ["unshare", *how, sys.executable, "-m", "tests.long.faults", *sys.argv[1:]])
  print("warning: this user may not mount disks (unshare failed), so the rows of full disks will fail", file=sys.stderr)
