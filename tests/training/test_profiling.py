"""Profiles of the configured steps, and of the next three steps after SIGUSR1."""

import signal
import subprocess
import sys
import time

from tests.tiny_run import ROOT, environment, small_autoencoder, write_config


def test_profiles_by_configuration_and_by_signal(assets, tmp_path):
  """Runs in a separate process: with PyTorch in the process, jaxlib 0.10.2 can crash when a trace starts."""
  steps = {"stages": ({"name": "long", "steps": 10**6},), "profile_steps": (2, 3), "checkpoint_every": 10**5}
  config = write_config(tmp_path / "config.py", assets, tmp_path / "run", **steps, **small_autoencoder())
  log, folder = tmp_path / "log", tmp_path / "run" / "profile"
  command = [sys.executable, "-m", "stdit_jax.train", "--config", str(config)]
  with log.open("w") as output:
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT)

  def wait_for(count):
    end = time.monotonic() + 120
    while log.read_text().count("profile of steps") < count:
      assert process.poll() is None, log.read_text()[-3000:]
      assert time.monotonic() < end, log.read_text()[-3000:]
      time.sleep(0.05)

  try:
    wait_for(1)
    assert f"profile of steps 2 to 3: {folder}" in log.read_text()
    time.sleep(1.1)  # profiles are named by the time in seconds
    process.send_signal(signal.SIGUSR1)
    wait_for(2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75, log.read_text()[-3000:]
  finally:
    process.kill()
    process.wait()
  said = [line.split(":")[0].split() for line in log.read_text().splitlines() if line.startswith("profile of steps")]
  assert [int(words[5]) - int(words[3]) for words in said] == [1, 2]
  assert len(list(folder.rglob("*.xplane.pb"))) == 2
