"""Kills a training with SIGKILL at random moments, also while it writes a checkpoint, and resumes it. Compares the bits.

  python -m tests.long.kill_and_resume [--task denoiser | autoencoder] [--moments 20] [--steps 300] [--seed 0] [--folder DIR]

It takes about ten minutes on two cores for the denoiser. Exit code 0: the last checkpoint has the bits of an uninterrupted
run, and the log has every step once, with the same values.
"""

import time

from tests import tiny_run
from tests.long import kills
from tests.training import test_resume

# Per task: changed keys, and two stages.
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
  parser.add_argument(
    "--steps", type=int, default=300, help="of the run, 3/5 of them in the first stage (default: %(default)s)"
  )
  arguments = parser.parse_args()
  folder, rng = kills.begin(arguments)
  changes, stages = TASKS[arguments.task]
  first = 3 * arguments.steps // 5
  stages = tuple({**stage, "steps": steps} for stage, steps in zip(stages, (first, arguments.steps - first)))
  settings = {**changes, "stages": stages, "checkpoint_every": 4, "keep_checkpoints": 100}
  config = tiny_run.write_config(folder / "alone.py", folder / "assets", folder / "alone", **settings)
  test_resume.finish(config, folder / "alone.log")
  print("the uninterrupted run has ended", flush=True)

  output, log, writing = folder / "killed", folder / "killed.log", 0
  config = tiny_run.write_config(folder / "killed.py", folder / "assets", output, **settings)
  for moment in range(arguments.moments):
    before = steps_of(output)
    process = test_resume.start(config, log)
    if moment % 3 == 0:  # while it writes a checkpoint
      kills.wait_for(process, lambda: test_resume.writes_a_checkpoint(output))
      time.sleep(rng.uniform(0, 0.03))
    elif moment % 3 == 1:  # a few steps later
      goal = before + rng.randint(1, 12)
      kills.wait_for(process, lambda goal=goal: steps_of(output) >= goal)
      time.sleep(rng.uniform(0, 0.3))
    else:  # at any time, also during the start, but early enough to leave steps for the other moments
      goal = before + max(1, arguments.steps // arguments.moments)
      kills.wait_for(process, lambda goal=goal: steps_of(output) >= goal, rng.uniform(1, 20))
    kills.kill(process)
    here = test_resume.writes_a_checkpoint(output)
    writing += here
    print(f"moment {moment + 1}: step {before} to {steps_of(output)}{', half a checkpoint exists' if here else ''}", flush=True)
  test_resume.finish(config, log)
  test_resume.assert_same_bits(folder / "alone", output, arguments.steps)
  assert test_resume.metrics(output)[0] == list(range(1, arguments.steps + 1))
  assert test_resume.metrics(folder / "alone") == test_resume.metrics(output)
  print(f"the same bits after {arguments.moments} kills, {writing} of them with a checkpoint half written; {folder}")


def steps_of(output):
  return max(test_resume.metrics_steps(output), default=0)


if __name__ == "__main__":
  main()
