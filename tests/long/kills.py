"""What the programs that kill have in common: their arguments, a folder with assets, waiting for a moment and the kill."""

import argparse
import pathlib
import random
import tempfile
import time

from tests import tiny_run


def parser(description, moments):
  """An ArgumentParser with `--moments`, `--seed` and `--folder`; `description`: docstring of the program."""
  made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
  made.add_argument("--moments", type=int, default=moments, help="how often it is killed")
  made.add_argument("--seed", type=int, default=0, help="of the moments")
  made.add_argument("--folder", type=pathlib.Path, default=None, help="a new one, by default a temporary one; it is kept")
  return made


def begin(arguments):
  """-> (folder, in which `assets` are those of `tiny_run.make_assets`; random.Random of the moments)."""
  folder = arguments.folder or pathlib.Path(tempfile.mkdtemp(prefix="kills-"))
  (folder / "assets").mkdir(parents=True)
  tiny_run.make_assets(folder / "assets")
  return folder, random.Random(arguments.seed)


def wait_for(process, condition, seconds=120.0):
  """Returns when `condition()` holds, the process has ended, or so many seconds have passed."""
  end = time.monotonic() + seconds
  while process.poll() is None and time.monotonic() < end and not condition():
    time.sleep(0.0005)


def kill(process):
  """SIGKILL; AssertionError when the process has ended by itself."""
  assert process.poll() is None, "it ended before it could be killed: fewer moments, or more to do"
  process.kill()
  process.wait()
