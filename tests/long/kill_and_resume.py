"""Kills a training with SIGKILL at random moments, checkpoint writes included, resumes it each time and compares the bits.

  python -m tests.long.kill_and_resume [--task denoiser | autoencoder] [--moments 20] [--steps 300] [--seed 0] [--folder DIR]

About ten minutes on two cores for the denoiser; exit code 0 when the last checkpoint is that of the run that was left alone,
bit for bit, and every step has been logged once, with the same values.
"""

import time

from tests import tiny_run
from tests.long import kills
from tests.training import test_resume

# Per task: keys that it changes, and its two stages.
TASKS = {
  "denoiser": ({}, test_resume.STAGES),
  "autoencoder": (
    {
      **tiny_run.small_autoencoder(),
      "data__buckets": (("64p", 1, 1.0, 2), ("64p", 4, 1.0, 2)),
      "autoencoder__discriminator": {"features": 8, "layers": 2, "groups": 4},
    },
    ({"name": "pixels", "optimizer.accumulate": 2}, {"name": "adversary", "autoencoder.adversarial_weight": 0.5}),
  ),
}


def main():
  parser = kills.parser(__doc__, moments=20)
  parser.add_argument("--task", choices=TASKS, default="denoiser")
  parser.add_argument("--steps", type=int, default=300, help="of the run, three of five in its first stage")
  arguments = parser.parse_args()
  folder, rng = kills.begin(arguments)
  changes, stages = TASKS[arguments.task]
  first = 3 * arguments.steps // 5
  stages = tuple({**stage, "steps": steps} for stage, steps in zip(stages, (first, arguments.steps - first)))
  settings = {**changes, "stages": stages, "checkpoint_every": 4, "keep_checkpoints": 100}
  config = tiny_run.write_config(folder / "alone.py", folder / "assets", folder / "alone", **settings)
  test_resume.finish(config, folder / "alone.log")
  print("the run that is left alone has ended", flush=True)

  output, log, writing = folder / "killed", folder / "killed.log", 0
  config = tiny_run.write_config(folder / "killed.py", folder / "assets", output, **settings)
  for moment in range(arguments.moments):
    before = steps_of(output)
    process = test_resume.start(config, log)
    if moment % 3 == 0:  # in the middle of a write of a checkpoint
      kills.wait_for(process, lambda: test_resume.writes_a_checkpoint(output))
      time.sleep(rng.uniform(0, 0.03))
    elif moment % 3 == 1:  # so many steps later
      goal = before + rng.randint(1, 12)
      kills.wait_for(process, lambda goal=goal: steps_of(output) >= goal)
      time.sleep(rng.uniform(0, 0.3))
    else:  # at any time, the start-up included, but not after so many steps that other moments would find none
      goal = before + max(1, arguments.steps // arguments.moments)
      kills.wait_for(process, lambda goal=goal: steps_of(output) >= goal, rng.uniform(1, 20))
    kills.kill(process)
    here = test_resume.writes_a_checkpoint(output)
    writing += here
    print(
      f"moment {moment + 1}: step {before} to {steps_of(output)}{', half a checkpoint is there' if here else ''}", flush=True
    )
  test_resume.finish(config, log)
  test_resume.assert_same_bits(folder / "alone", output, arguments.steps)
  assert test_resume.metrics(output)[0] == list(range(1, arguments.steps + 1))
  assert test_resume.metrics(folder / "alone") == test_resume.metrics(output)
  print(f"the same bits after {arguments.moments} kills, {writing} of them with a checkpoint half written; {folder}")


def steps_of(output):
  return max(test_resume.metrics_steps(output), default=0)


if __name__ == "__main__":
  main()
