"""Kills `python -m stdit_jax.encode` with SIGKILL at random moments and starts it again: nothing lost, nothing twice.

  python -m tests.long.kill_and_encode [--moments 10] [--seed 0] [--folder DIR]

A few minutes on two cores; exit code 0 when all shards are those of a command that was left alone, byte for byte.
"""

import argparse
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import numpy as np
import tensorflow_datasets as tfds

from tests import tiny_run

CLIPS = 300


def shards(folder):
  return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.glob("*/part-*/[!.]*array_record*"))}


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--moments", type=int, default=10)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--folder", type=pathlib.Path, default=None)
  arguments = parser.parse_args()
  folder = arguments.folder or pathlib.Path(tempfile.mkdtemp(prefix="kill-and-encode-"))
  (folder / "assets").mkdir(parents=True)
  tiny_run.make_assets(folder / "assets")
  settings = {
    "data__tables": (f"shapes://train/0/{CLIPS}",), "data__buckets": (("64p", 1, 1.0, 4), ("64p", 8, (0.5, 0.5), 2)),
    "data__frame_interval": 1, "data__workers": 0,
    **tiny_run.frozen_text(folder / "assets", "ahead"),
  }  # fmt: skip
  config = tiny_run.write_config(folder / "config.py", folder / "assets", folder / "run", **settings)

  def start(output):
    command = [sys.executable, "-m", "stdit_jax.encode", "--config", str(config), "--output", str(output)]
    command += ["--epochs", "2", "--shard-mb", "0.05"]
    own = tiny_run.environment(XLA_FLAGS=tiny_run.QUICK_FLAGS, JAX_COMPILATION_CACHE_DIR=str(folder / "xla"))
    with (folder / "log").open("a") as log:
      return subprocess.Popen(command, cwd=tiny_run.ROOT, env=own, stdout=log, stderr=subprocess.STDOUT)

  began = time.monotonic()
  assert start(folder / "alone").wait() == 0, (folder / "log").read_text()[-3000:]
  took, want = time.monotonic() - began, shards(folder / "alone")
  print(f"left alone: {len(want)} shards in {took:.0f} s", flush=True)
  killed, rng, before = folder / "killed", random.Random(arguments.seed), 0
  for moment in range(arguments.moments):
    process, goal = start(killed), before + rng.randint(0, max(1, 2 * len(want) // arguments.moments))
    while process.poll() is None and len(shards(killed)) < min(goal, len(want) - 1):
      time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.2) if goal > before else rng.uniform(0, took / 3))
    assert process.poll() is None, "it ended before it could be killed: fewer moments, or more clips"
    process.kill()
    process.wait()
    there, half = shards(killed), len(list(killed.glob("*/part-*/.*.tmp")))
    assert all(want[name] == data for name, data in there.items())
    print(f"kill {moment + 1}: {before} -> {len(there)} shards" + f", {half} half written" * bool(half), flush=True)
    before = len(there)
  assert start(killed).wait() == 0, (folder / "log").read_text()[-3000:]
  assert shards(killed) == want
  assert not list(killed.glob("*/part-*/.*"))
  for part in sorted(killed.glob("*/part-*")):
    source = tfds.builder_from_directory(part).as_data_source("train")
    keys = np.load(part / "keys.npy")
    if part.parent.name.startswith("latents"):
      found = {(r["table"], r["row"], r["num_frames"], r["height"], r["window"]) for r in source}
    else:
      found = {r["caption"] for r in source}
    assert len(found) == len(source) == len(keys), (len(found), len(source), len(keys))
    print(f"{part.relative_to(killed)}: {len(found)} different records, {len(keys)} wanted")
  print(f"the same bytes after {arguments.moments} kills; {folder}")


if __name__ == "__main__":
  main()
