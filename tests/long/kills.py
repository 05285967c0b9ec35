"""Shared by the programs that kill others: arguments, a folder with assets, waiting for a moment, the kill."""

import argparse
import pathlib
import random
import tempfile
import time

from tests import tiny_run


def parser(description, moments):
  """An ArgumentParser with `--moments`, `--seed` and `--folder`. `description`: docstring of the program."""
  made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
  made.add_argument("--moments", type=int, default=moments, help="number of kills (default: %(default)s)")
  made.add_argument("--seed", type=int, default=0, help="seed of the moments (default: %(default)s)")
  made.add_argument("--folder", type=pathlib.Path, default=None, help="new folder, which stays (default: a temporary folder)")
  return made


def begin(arguments):
  """Makes the folder, with `assets` from `tiny_run.make_assets`. Returns (folder, random.Random of the moments)."""
  folder = arguments.folder or pathlib.Path(tempfile.mkdtemp(prefix="kills-"))
  (folder / "assets").mkdir(parents=True)
  tiny_run.make_assets(folder / "assets")
  return folder, random.Random(arguments.seed)


def wait_for(process, condition, seconds=120.0):
  """Returns when `condition()` holds, the process has ended, or `seconds` have passed."""
  end = time.monotonic() + seconds
  while process.poll() is None and time.monotonic() < end and not condition():
    time.sleep(0.0005)


def kill(process):
  """Sends SIGKILL. Raises AssertionError if the process has ended by itself."""
  assert process.poll() is None, "the process ended before its kill: take fewer moments, or give it more work"
  process.kill()
  process.wait()
