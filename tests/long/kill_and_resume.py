"""Kills a training with SIGKILL at random moments, checkpoint writes included, resumes it each time and compares the bits.

  python -m tests.long.kill_and_resume [--moments 20] [--seed 0] [--folder DIR]

About ten minutes on two cores; exit code 0 when the last checkpoint is that of the run that was left alone, bit for bit.
"""

import argparse
import pathlib
import random
import tempfile
import time

from tests import tiny_run
from tests.training import test_resume

STEPS = 300
STAGES = tuple({**stage, "steps": steps} for stage, steps in zip(test_resume.STAGES, (180, 120)))


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--moments", type=int, default=20)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--folder", type=pathlib.Path, default=None)
  arguments = parser.parse_args()
  folder = arguments.folder or pathlib.Path(tempfile.mkdtemp(prefix="kill-and-resume-"))
  (folder / "assets").mkdir(parents=True)
  tiny_run.make_assets(folder / "assets")
  settings = {"stages": STAGES, "checkpoint_every": 4, "keep_checkpoints": 100}
  config = tiny_run.write_config(folder / "alone.py", folder / "assets", folder / "alone", **settings)
  test_resume.finish(config, folder / "alone.log")
  print("the run that is left alone has ended", flush=True)

  output, log = folder / "killed", folder / "killed.log"
  config = tiny_run.write_config(folder / "killed.py", folder / "assets", output, **settings)
  rng, writing = random.Random(arguments.seed), 0
  for moment in range(arguments.moments):
    before = steps_of(output)
    process = test_resume.start(config, log)
    if moment % 3 == 0:  # in the middle of a write of a checkpoint
      wait_for(process, lambda: test_resume.writes_a_checkpoint(output))
      time.sleep(rng.uniform(0, 0.03))
    elif moment % 3 == 1:  # so many steps later
      goal = before + rng.randint(1, 12)
      wait_for(process, lambda goal=goal: steps_of(output) >= goal)
      time.sleep(rng.uniform(0, 0.3))
    else:  # at any time, the start-up included
      time.sleep(rng.uniform(1, 20))
    assert process.poll() is None, "it ended before it could be killed: fewer moments, or more steps"
    process.kill()
    process.wait()
    here = test_resume.writes_a_checkpoint(output)
    writing += here
    print(
      f"moment {moment + 1}: step {before} to {steps_of(output)}{', half a checkpoint is there' if here else ''}", flush=True
    )
  test_resume.finish(config, log)
  test_resume.assert_same_bits(folder / "alone", output, STEPS)
  assert test_resume.metrics(folder / "alone") == test_resume.metrics(output)
  print(f"the same bits after {arguments.moments} kills, {writing} of them with a checkpoint half written; {folder}")


def steps_of(output):
  return max(test_resume.metrics_steps(output), default=0)


def wait_for(process, condition, seconds=120):
  end = time.monotonic() + seconds
  while process.poll() is None and time.monotonic() < end and not condition():
    time.sleep(0.0005)


if __name__ == "__main__":
  main()
