"""Only one training writes to a run folder. A killed training does not block the next one."""

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
  """Starts a process on this machine that holds the folder."""
  holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
  assert holder.stdout.readline() == "held\n"
  return holder


def elsewhere(folder, count):
  """Writes the note of a process on another machine."""
  note = {"id": "a", "host": "another", "machine": "another", "process": 1, "began": "1", "count": count}
  paths.write_text(folder / NAME, json.dumps(note))


def test_a_live_holder_on_this_machine_blocks_the_folder_at_once(tmp_path):
  """A killed holder, reaped or not, does not block the folder, nor does another process that reuses its id."""
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


def test_a_counting_holder_on_another_machine_blocks_the_folder(tmp_path, capsys):
  """A silent holder counts as dead. A holder that ends during the wait frees the folder."""
  elsewhere(tmp_path, 5)
  with claim(tmp_path, print, PERIOD):
    said = f"process 1 on another was training in {tmp_path}; waiting 0 s to see if it still is\n"
    assert capsys.readouterr().out == said

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
    assert time.monotonic() - began < 60 * PERIOD  # the wait ends when the holder ends, not after three periods


@pytest.mark.parametrize(
  "text", ["", "{", "[]", '{"id": "x"}', '{"id":1,"host":0,"machine":0,"process":"","began":[],"count":{}}']
)
def test_an_unreadable_note_is_ignored(tmp_path, text):
  (tmp_path / NAME).write_text(text)
  with claim(tmp_path, print, PERIOD):
    assert json.loads((tmp_path / NAME).read_text())["process"] == os.getpid()


def test_a_holder_notices_that_its_folder_was_taken(tmp_path):
  """It leaves the note of the other process unchanged."""
  lost = threading.Event()
  with claim(tmp_path, lambda text: lost.set(), PERIOD):
    elsewhere(tmp_path, 0)
    assert lost.wait(100 * PERIOD)
  assert json.loads((tmp_path / NAME).read_text())["id"] == "a"


def test_a_second_training_of_a_folder_is_refused(assets, tmp_path):
  """The second command prints one line and writes no file. The first one continues."""
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
