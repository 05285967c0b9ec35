"""Kills a training with SIGKILL at random moments, checkpoint writes included, resumes it each time and compares the bits.

  python -m tests.long.kill_and_resume [--moments 20] [--seed 0] [--folder DIR]

About ten minutes on two cores; exit code 0 when the last checkpoint is that of the run that was left alone, bit for bit.
"""

import argparse
import contextlib
import pathlib
import random
import subprocess
import tempfile
import time

from tests import tiny_run
from tests.training import test_resume


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--moments", type=int, default=20)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--folder", type=pathlib.Path, default=None)
  arguments = parser.parse_args()
  folder = arguments.folder or pathlib.Path(tempfile.mkdtemp(prefix="kill-and-resume-"))
  (folder / "assets").mkdir(parents=True)
  tiny_run.make_assets(folder / "assets")
  settings = {"stages": test_resume.STAGES, "checkpoint_every": 2, "keep_checkpoints": 20}
  began = time.monotonic()
  config = tiny_run.write_config(folder / "alone.py", folder / "assets", folder / "alone", **settings)
  test_resume.finish(config, folder / "alone.log")
  whole = time.monotonic() - began
  print(f"left alone: {whole:.0f} s", flush=True)

  output, log = folder / "killed", folder / "killed.log"
  config = tiny_run.write_config(folder / "killed.py", folder / "assets", output, **settings)
  rng, writing = random.Random(arguments.seed), 0
  for moment in range(arguments.moments):
    steps = max(test_resume.metrics_steps(output), default=0)
    process = test_resume.start(config, log)
    if moment % 2:  # in the middle of the next write of a checkpoint
      end = time.monotonic() + 2 * whole
      while process.poll() is None and time.monotonic() < end and not test_resume.writes_a_checkpoint(output):
        time.sleep(0.0005)
      time.sleep(rng.uniform(0, 0.05))
      writing += test_resume.writes_a_checkpoint(output)
    else:
      # Early enough that 20 moments fit in; from the start-up on.
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(rng.uniform(0.2, 1.0) * whole)
    ended = process.poll() is not None
    process.kill()
    process.wait()
    now = max(test_resume.metrics_steps(output), default=0)
    print(f"moment {moment + 1}: from step {steps} to {now}{', it had ended' if ended else ''}", flush=True)
  test_resume.finish(config, log)
  test_resume.assert_same_bits(folder / "alone", output)
  assert test_resume.metrics(folder / "alone") == test_resume.metrics(output)
  print(f"the same bits after {arguments.moments} kills, {writing} of them while a checkpoint was written; {folder}")


if __name__ == "__main__":
  main()
