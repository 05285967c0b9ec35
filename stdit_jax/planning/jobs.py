"""Compiles jobs, each in a process of its own, and caches the results.

A process of its own bounds the memory, and several run at a time. The cache has two levels. The first finds the result of a job
with the same configuration and code. The second finds the result of a program with the same text. For this the job is lowered,
which takes seconds. To compile it would take minutes.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from data import paths
from stdit_jax.parallel.topology import TPU_ENVIRONMENT, compiler_version
from stdit_jax.planning.programs import Job, combine, compile_program, lower, text_digest

ROOT = pathlib.Path(__file__).parents[2]


class Compiler:
  """Compiles jobs and caches their results in a folder."""

  def __init__(self, cache: str | pathlib.Path, topology: str):
    self.cache = pathlib.Path(cache).expanduser()
    self.cache.mkdir(parents=True, exist_ok=True)
    code = hashlib.sha256(compiler_version(topology).encode())
    for path in sorted([*ROOT.glob("stdit_jax/**/*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("configs/*.py")]):
      code.update(path.read_bytes())
    self._code = code.hexdigest()

  def __call__(self, job: Job) -> dict[str, Any]:
    """The result of a job (`programs.combine`). Raises ValueError with the message of the compiling process."""
    values = json.dumps(dataclasses.asdict(job), sort_keys=True)
    path = self.cache / f"job-{hashlib.sha256((self._code + values).encode()).hexdigest()[:32]}.json"
    if path.exists():
      return json.loads(path.read_text())
    command = [sys.executable, "-m", "stdit_jax.planning.jobs", str(self.cache)]
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **TPU_ENVIRONMENT, "PYTHONPATH": python_path}
    done = subprocess.run(command, input=values, capture_output=True, text=True, env=environment)
    if done.returncode:
      lines = [line for line in done.stderr.splitlines() if line.strip()]
      raise ValueError(lines[-1].removeprefix("error: ") if lines else f"the compiling process ended with {done.returncode}")
    result = json.loads(done.stdout.splitlines()[-1])
    paths.write_text(path, json.dumps(result))
    return result


def work(values: dict[str, Any], cache: str) -> dict[str, Any]:
  """Lowers the job, and compiles it if the cache has no program of the same text. Runs in the compiling process."""
  job = Job(**values)
  lowered, facts = lower(job)
  path = pathlib.Path(cache) / f"program-{text_digest(lowered, job.topology)}.json"
  if path.exists():
    compiled = json.loads(path.read_text())
  else:
    compiled = compile_program(lowered)
    paths.write_text(path, json.dumps(compiled))
  return combine(facts, compiled)


if __name__ == "__main__":
  from stdit_jax.cli import one_line_errors

  with one_line_errors():
    print(json.dumps(work(json.load(sys.stdin), sys.argv[1])))
