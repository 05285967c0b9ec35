"""Only one training writes to a run folder, and one that was killed keeps nobody out."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from data import paths
from stdit_jax.training.claim import NAME, claim
from tests.tiny_run import ROOT, run_module, small_autoencoder, write_config

PERIOD = 0.1
HOLDER = """
import sys, time
from stdit_jax.training.claim import claim
with claim(sys.argv[1], print):
  print("held", flush=True)
  time.sleep(600)
"""


def hold(folder):
  """A process of this machine that holds the folder."""
  holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
  assert holder.stdout.readline() == "held\n"
  return holder


def elsewhere(folder, count):
  """The note of a process of another machine."""
  note = {"id": "a", "host": "another", "machine": "another", "process": 1, "began": "1", "count": count}
  paths.write_text(folder / NAME, json.dumps(note))


def test_of_this_machine(tmp_path):
  """The second is refused at once; a killed one, reaped or not, and a number that another process has now are nobody."""
  holder = hold(tmp_path)
  try:
    with pytest.raises(ValueError, match=rf"process {holder.pid} on .* is training in this folder"), claim(tmp_path, print):
      pass
    assert json.loads((tmp_path / NAME).read_text())["process"] == holder.pid
    holder.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    with claim(tmp_path, print):  # not reaped yet
      assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()
  finally:
    holder.kill()
    holder.wait()
  assert not (tmp_path / NAME).exists()
  with claim(tmp_path, print):
    note = json.loads((tmp_path / NAME).read_text())
  (tmp_path / NAME).write_text(json.dumps({**note, "process": os.getppid()}))
  with claim(tmp_path, print):
    pass


def test_of_another_machine(tmp_path):
  """Who counts is there; who is silent is gone; who ends while one waits makes room."""
  elsewhere(tmp_path, 5)
  said = []
  with claim(tmp_path, print, PERIOD, said.append):
    assert said == [f"process 1 on another was training in {tmp_path}; waiting for 0 s whether it still does"]

  stop = threading.Event()

  def count():
    number = 0
    while not stop.wait(PERIOD):
      number += 1
      elsewhere(tmp_path, number)

  elsewhere(tmp_path, 0)
  other = threading.Thread(target=count)
  other.start()
  try:
    with pytest.raises(ValueError, match="process 1 on another is training in this folder"), claim(tmp_path, print, PERIOD):
      pass
  finally:
    stop.set()
    other.join()

  elsewhere(tmp_path, 0)
  threading.Timer(PERIOD, (tmp_path / NAME).unlink).start()
  began = time.monotonic()
  with claim(tmp_path, print, 60 * PERIOD):
    assert time.monotonic() - began < 60 * PERIOD  # and not three times as long


@pytest.mark.parametrize(
  "text", ["", "{", "[]", '{"id": "x"}', '{"id":1,"host":0,"machine":0,"process":"","began":[],"count":{}}']
)
def test_a_note_that_nobody_understands(tmp_path, text):
  (tmp_path / NAME).write_text(text)
  with claim(tmp_path, print, PERIOD):
    assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()


def test_taken_meanwhile(tmp_path):
  """Who slept so long that another took the folder learns it, and leaves the other's note."""
  lost = threading.Event()
  with claim(tmp_path, lambda text: lost.set(), PERIOD):
    elsewhere(tmp_path, 0)
    assert lost.wait(100 * PERIOD)
  assert json.loads((tmp_path / NAME).read_text())["id"] == "a"


def test_the_command_that_is_given_twice(assets, tmp_path):
  """The second writes nothing but one line; the first goes on."""
  settings = {**small_autoencoder(), "stages": ({"name": "one", "steps": 1},)}
  config = write_config(tmp_path / "config.py", assets, tmp_path / "run", **settings)
  holder = hold(tmp_path / "run")
  try:
    result = run_module("stdit_jax.train", "--config", config)
    assert result.returncode == 2
    assert re.fullmatch(
      r"error: config: output='.*run': process \d+ on .* is training in this folder, as its .*\n", result.stderr
    )
    assert holder.poll() is None
    assert not (tmp_path / "run" / "config.json").exists()
  finally:
    holder.kill()
    holder.wait()
  assert run_module("stdit_jax.train", "--config", config).returncode == 0
  assert not (tmp_path / "run" / NAME).exists()
