"""Stand-ins for gcloud, kubectl, docker and the Python of a worker: programs that record how they are called, as JSON lines."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]

RECORD = f"""#!{sys.executable} -SE
import json, os, pathlib, sys
folder = pathlib.Path(os.environ["STAND_INS"])
def record(**entry):
  with open(folder / "calls", "a") as file:
    file.write(json.dumps(entry) + chr(10))
def take(name, default=None):
  "The next scripted answer. The last answer repeats."
  path = folder / name
  answers = json.loads(path.read_text()) if path.exists() else [default]
  if len(answers) > 1:
    path.write_text(json.dumps(answers[1:]))
  return answers[0]
"""

# Any program. It records its arguments.
PROGRAM = """
record(argv=[pathlib.Path(sys.argv[0]).name, *sys.argv[1:]], stdin="" if sys.stdin.isatty() else sys.stdin.read(100_000))
"""

# A stand-in for gcloud with scripted states of the machine and scripted answers of its workers.
GCLOUD = """
words = sys.argv[1:]
record(argv=words)
verb = next(word for word in words if word in ("describe", "list", "create", "delete", "ssh", "scp"))
if verb == "describe":
  state = take("states")
  if state == "ABSENT":
    sys.exit("ERROR: (gcloud.compute.tpus.describe) NOT_FOUND: Resource 'projects/p/locations/z/nodes/film' was not found")
  if state == "OFFLINE":
    sys.exit("ERROR: (gcloud.compute.tpus.describe) There was a problem refreshing your current auth tokens")
  print(state)
elif verb == "list":
  print(take("nodes", "READY"))
elif verb == "create":
  sys.exit(take("create", 0))
elif verb == "ssh" and "worker.sh status" in words[-1]:
  for answer in take("workers"):
    print("stdit_jax-worker: host", answer)
"""


class StandIns:
  """A folder of programs that comes first in PATH, and the calls that these programs record."""

  def __init__(self, folder):
    self.folder = folder
    self.bin = folder / "bin"
    self.bin.mkdir()
    self.started = []
    self.environment = {**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", "STAND_INS": str(folder)}
    for name in ("STDIT_JAX_HOME", "STDIT_JAX_VENV", "PYTHON"):
      self.environment.pop(name, None)

  def program(self, name, body):
    path = self.bin / name
    path.write_text(RECORD + textwrap.dedent(body))
    path.chmod(0o755)
    return path

  def script(self, **answers):
    for name, values in answers.items():
      (self.folder / name).write_text(json.dumps(values))

  def run(self, script, *arguments, code=0, timeout=60):
    """Runs launch/SCRIPT and checks its exit code."""
    command = ["bash", str(ROOT / "launch" / script), *arguments]
    result = subprocess.run(
      command, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == code, (result.returncode, result.stdout, result.stderr)
    return result

  def start(self, script, *arguments, **options):
    """Starts launch/SCRIPT as the leader of a process group. `close` kills the group."""
    command = ["bash", str(ROOT / "launch" / script), *arguments]
    # A background program of a shell ignores ^C. Bash can't trap a signal that it ignored when it started.
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
      self.started.append(subprocess.Popen(command, env=self.environment, start_new_session=True, text=True, **options))
    finally:
      signal.signal(signal.SIGINT, old)
    return self.started[-1]

  def close(self):
    for process in self.started:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()

  @property
  def calls(self):
    path = self.folder / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition, seconds=10):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, f"the condition did not hold within {seconds} s"
    time.sleep(0.02)
